"""What the README and the docs say can be run, runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_paths_of_a_page_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert all((page.parent / link).exists() for link in links), links
    modules = set(re.findall(r"`((?:bevfn|kernels|experiments|layers|views|heads|backbones|models)/[\w/]+\.py)`", text))
    missing = [m for m in modules if not (ROOT / m).exists() and not (ROOT / "bevfn" / m).exists()]
    assert missing == []


def test_commands_of_the_readme_are_known_to_the_parsers():
    from bevfn.cli import COMMANDS, GROUPS

    text = (ROOT / "README.md").read_text()
    words = set(re.findall(r"^(?:\$ )?bevfn (\w+)", text, flags=re.MULTILINE))
    assert words and words <= COMMANDS.keys()
    for group, (_, commands) in GROUPS.items():
        assert set(re.findall(rf"bevfn {group} (\w+)", text)) <= commands.keys()
    targets = set(re.findall(r"^make (\w+)", text, flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(f"\n{target}:" in makefile for target in targets)
