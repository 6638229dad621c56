"""What an installation needs is declared, and a wheel without extras quantizes and runs a model."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from test_cli import QUANTIZE, write_model, write_text

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "slim_jax", "convert")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

CHAT = """
import sys
from convert import load_source
tokenizer = load_source(sys.argv[1]).tokenizer
tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
print(tokenizer.apply_chat_template([{"role": "user", "content": "w5 w6"}], tokenize=False))
"""


def normal(name: str) -> str:
    """A distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_every_import_is_declared():
    modules = set().union(
        *(imported(path) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    )
    modules -= {*sys.stdlib_module_names, *PACKAGES, "jaxlib"}  # jax asks for the jaxlib that fits
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["scores"]]
    declared = {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}
    distributions = {"lm_eval": ["lm_eval"]} | packages_distributions()  # only that extra may be absent
    for module in sorted(modules):
        owners = {normal(owner) for owner in distributions[module]}
        assert owners & declared, f"{module} is imported, none of {sorted(owners)} is declared"


def test_every_dependency_has_a_lower_bound():
    assert [line for line in PROJECT["dependencies"] if ">=" not in line] == []


def test_packages_say_that_they_are_typed():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)
    assert all("py.typed" in data[package] for package in PACKAGES)


@pytest.mark.slow
def test_a_wheel_without_extras(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    venv.create(tmp_path / "venv", with_pip=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(*command: object) -> str:
        done = subprocess.run(
            [str(tmp_path / "venv/bin" / str(command[0])), *map(str, command[1:])],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip = ("python", "-m", "pip", "--disable-pip-version-check")
    call(*pip, "wheel", "--no-deps", "--wheel-dir", "wheels", source)
    call(*pip, "install", next((tmp_path / "wheels").glob("*.whl")))
    call(*pip, "check")
    shutil.rmtree(source)

    assert "slim-jax quantize" in call("slim-jax", "--help")
    assert call("python", "-m", "slim_jax", "--version") == call("slim-jax", "--version")
    model, text = write_model(tmp_path / "hf"), write_text(tmp_path / "calib.txt", 300, 1)
    call("slim-jax", "quantize", model, "q2", "--calibration", text, *QUANTIZE)
    assert call("slim-jax", "generate", "q2", "--prompt", "w5 w6", "--max-tokens", "4").startswith("w5 w6")
    call("slim-jax", "export", "q2", "packed", "--format", "safetensors")
    assert call("slim-jax", "generate", "packed", "--prompt", "w5 w6", "--max-tokens", "4").startswith("w5")
    assert call("python", "-c", CHAT, model).split() == ["w5", "w6"]
