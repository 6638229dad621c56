"""Prints the lowest version of every dependency that pyproject.toml has a lower bound for, as pip takes it."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    print(re.sub(r">=([^,;\s]+)[^;]*", r"==\1", requirement))
