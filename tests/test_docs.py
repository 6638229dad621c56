"""What the documentation shows runs as it is written."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_snippets_of_jax_programs():
    found = snippets("jax-programs.md")
    assert len(found) == 3
    space: dict[str, object] = {"__name__": "snippet"}  # one: the second goes on from the first
    for code in found:
        exec(compile(code, "jax-programs.md", "exec"), space)


def test_every_page_is_in_the_site():
    nav = (DOCS.parent / "mkdocs.yml").read_text().partition("nav:")[2]
    assert {page.name for page in DOCS.glob("*.md")} == set(re.findall(r"[\w-]+\.md", nav))
    assert {page.name for page in DOCS.glob("notebooks/*")} == set(re.findall(r"[\w-]+\.ipynb", nav))
