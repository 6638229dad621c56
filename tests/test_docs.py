"""The documentation's examples run as written, and its defaults and file names are correct."""

import functools
import importlib
import re
from pathlib import Path

import pytest
import typer

from convert.cli.program import app
from slim_jax import SlimConfig
from slim_jax.config import LENGTH, SAMPLES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
COMMANDS = typer.main.get_command(app).commands
DEFAULT = SlimConfig().resolved()


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_snippets_of_jax_programs():
    found = snippets("jax-programs.md")
    assert len(found) == 3
    space: dict[str, object] = {"__name__": "snippet"}  # one namespace, because snippets build on each other
    for code in found:
        exec(compile(code, "jax-programs.md", "exec"), space)


def test_every_page_is_in_the_site():
    nav = (DOCS.parent / "mkdocs.yml").read_text().partition("nav:")[2]
    assert {page.name for page in DOCS.glob("*.md")} == set(re.findall(r"[\w-]+\.md", nav))
    assert {page.name for page in DOCS.glob("notebooks/*")} == set(re.findall(r"[\w-]+\.ipynb", nav))


def tree() -> dict[str, list[str]]:
    """The files that the drawing in docs/architecture.md names, by folder."""
    drawing = (
        (DOCS / "architecture.md").read_text().partition("```\n")[2].partition("```")[0].replace("─", "")
    )
    found: dict[str, str] = {}
    folder = ""
    for line in drawing.splitlines():
        start, rest = re.fullmatch(r"(?:(\S+/) )? *(.*)", line).groups()
        folder = start or folder
        found[folder] = f"{found.get(folder, '')} {rest}"
    plain = {name: re.sub(r"\([^)]*\)", "", text) for name, text in found.items()}
    return {name: re.findall(r"\w+(?=\s*(?:,|;|$))", text) for name, text in plain.items()}


@pytest.mark.parametrize(
    "folder", [name for name in tree() if name.startswith(("pallas", "slim", "convert"))]
)
def test_the_drawing_names_every_file(folder):
    files = {file.stem for file in (ROOT / folder).glob("*.py") if not file.stem.startswith("__")}
    assert set(tree()[folder]) == files


def test_the_drawing_has_every_folder():
    packages = [
        file.parent
        for top in ("pallas_kernels", "slim_jax", "convert")
        for file in (ROOT / top).rglob("__init__.py")
    ]
    assert {f"{path.relative_to(ROOT)}/" for path in packages} == tree().keys() - {"bench/,", "tests/", ""}


def help_of(command: str, name: str) -> str:
    return next(option.help for option in COMMANDS[command].params if option.name == name)


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_help_says_the_defaults(command):
    more, most = DEFAULT.embedding_bits - DEFAULT.bits, SlimConfig(bits=7).resolved().embedding_bits
    assert f"Default: {DEFAULT.bits}." in help_of(command, "bits")
    assert f"Default: {DEFAULT.group_size}." in help_of(command, "group_size")
    assert f"Default: --bits + {more}, at most {most};" in help_of(command, "embedding_bits")
    assert f"Default: {LENGTH}," in help_of(command, "length")
    assert next(option.default for option in COMMANDS[command].params if option.name == "samples") == SAMPLES
    good = re.search(r"Default: (\w+)\.", help_of(command, "preset"))[1]
    assert SlimConfig.preset(good).resolved() == DEFAULT


def test_pages_say_the_defaults():
    usage, baseline = (DOCS / "usage.md").read_text(), SlimConfig(method="gptq").resolved()
    assert f"{DEFAULT.bits} bits, groups of {DEFAULT.group_size}, calibration" in usage
    assert f"{SAMPLES} of {LENGTH} without |" in usage
    cells = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", usage, re.MULTILINE))
    for name in ("asymmetric", "damping", "refine"):
        one, other = getattr(DEFAULT, name), getattr(baseline, name)
        assert cells[name] == f"{one:g} where scales are searched, else {other:g}"
    more = DEFAULT.embedding_bits - DEFAULT.bits
    assert cells["embedding_bits"].startswith(f"bits + {more}, at most 8;")
    wide = SlimConfig(bits=4).resolved().embedding_group_size
    assert cells["embedding_group_size"] == f"{wide}; {DEFAULT.embedding_group_size} for 4 bits or less"
    clip = SlimConfig(learn="clip").resolved().learning_rate
    assert cells["learning_rate"] == f"{DEFAULT.learning_rate:g}; where clipping is learned {clip:g}"
    rates = [SlimConfig(bits=bits).resolved().tune_rate for bits in (2, 3)]
    assert cells["tune_rate"].startswith("{:g} below 3 bits, {:g} below 4".format(*rates))
    words = {1: "one bit more", 2: "two bits more", 3: "three bits more"}
    for page in (DOCS / "method.md", DOCS / "quality.md"):
        assert re.findall(r"\w+ bits? more(?= than the (?:blocks|layers)| \()", page.read_text()) != []
        assert set(re.findall(r"\w+ bits? more(?= than the (?:blocks|layers)| \()", page.read_text())) == {
            words[more]
        }


PAGES = {file.name: file.read_text() for file in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
HELP = {name: command.help or "" for name, command in COMMANDS.items()}


def test_the_first_command_is_one():
    texts = [*PAGES.values(), *HELP.values(), typer.main.get_command(app).help]
    first = [
        line for text in texts for line in re.findall(r"slim-jax quantize smollm2 out/q3 [^#\n]*[^#\s]", text)
    ]
    assert len(first) >= 3
    assert len(set(first)) == 1


def test_commands_have_the_options_that_pages_show():
    blocks = [block for text in PAGES.values() for block in re.findall(r"```\n(.*?)```", text, re.DOTALL)]
    shown = re.findall(r"^slim-jax (\w+) (.*)$", "\n".join(blocks), re.MULTILINE)
    assert len(shown) > 10
    for command, rest in shown:
        known = {
            name for option in COMMANDS[command].params for name in (*option.opts, *option.secondary_opts)
        }
        assert set(re.findall(r"(?<=\s)--[a-z-]+", rest)) <= known, (command, rest)


def exists(name: str) -> bool:
    """True if a module, or an attribute of one, has this dotted name."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name == "lm_eval":  # an extra that is not installed
                return True
            continue
        return (
            functools.reduce(lambda owner, part: getattr(owner, part, None), parts[cut:], found) is not None
        )
    return False


def test_names_in_prose_exist():
    """Modules move: pages, docstrings and comments that name them move with them."""
    code = [
        file
        for top in ("pallas_kernels", "slim_jax", "convert", "bench")
        for file in ROOT.glob(f"{top}/**/*.py")
    ]
    texts = {**PAGES, **{str(file.relative_to(ROOT)): file.read_text() for file in code}}
    pattern = re.compile(r"`((?:slim_jax|pallas_kernels|convert)(?:\.\w+)+)`")
    named = {(name, page) for page, text in texts.items() for name in pattern.findall(text)}
    assert len(named) > 50
    assert sorted((name, page) for name, page in named if not exists(name)) == []
