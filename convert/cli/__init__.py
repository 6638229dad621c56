"""The command line ``slim-jax``. :func:`main` is the program, :func:`run` runs one command."""

from convert.cli.program import main as main
from convert.cli.program import run as run
