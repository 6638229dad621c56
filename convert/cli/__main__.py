"""``python -m convert.cli``."""

from convert.cli.program import main

main()
