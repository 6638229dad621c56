"""Prints the lowest version that pyproject.toml allows of every dependency, as pip takes it."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    print(re.sub(r">=([^,;\s]+)[^;]*", r"==\1", requirement))
