"""What the README and the docs say can be run, runs."""

import ast
import dataclasses
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from helps import helped

from bevfn import catalogue

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def test_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_search_of_the_docs_asks_a_recipe_for_flags_that_it_has():
    """Optuna need not be here; what the block sets is set on the recipe's own dataclass, which refuses another name."""
    (block,) = re.findall(
        r"```python\n((?:(?!```).)*optuna.*?)```", (ROOT / "docs/training.md").read_text(), flags=re.DOTALL
    )
    recipe = importlib.import_module(
        re.search(r"from (bevfn\.experiments) import (\w+) as recipe", block).expand(r"\1.\2")
    )
    base = eval(re.search(r"^BASE = (.*?)(?:  #|$)", block, flags=re.MULTILINE)[1], {"recipe": recipe})
    (call,) = (n for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "replace")
    given = {word.arg for word in call.keywords}
    assert {"lr", "run_dir"} <= given <= {field.name for field in dataclasses.fields(base)}


def test_the_site_has_every_page_and_reads_modules_that_exist():
    site, pages = (ROOT / "mkdocs.yml").read_text(), sorted((ROOT / "docs").glob("*.md"))
    assert [page.name for page in pages if f"- docs/{page.name}\n" not in site] == []
    (plugins,) = re.findall(r"^plugins:\n((?: .*\n)+)", site, flags=re.MULTILINE)
    asked = re.findall(r"^  - (\w+)", plugins, flags=re.MULTILINE)
    assert asked == ["search", "mkdocstrings"] and "\n  font: false" in site  # others ask the network
    modules = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), flags=re.MULTILINE)
    assert len(modules) > 10 and all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_paths_of_a_page_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert all((page.parent / link).exists() for link in links), links
    modules = set(re.findall(r"`((?:bevfn|kernels|experiments|layers|views|heads|backbones|models)/[\w/]+\.py)`", text))
    missing = [m for m in modules if not (ROOT / m).exists() and not (ROOT / "bevfn" / m).exists()]
    assert missing == []


def test_lines_of_the_ascend_page_are_read_on_a_terminal():
    """An engineer beside a device has the file and no browser."""
    lines = (ROOT / "docs/ascend.md").read_text().splitlines()
    assert [f"{i}: {len(line)} characters" for i, line in enumerate(lines, 1) if len(line) > 120] == []


def test_an_extra_is_installed_from_a_clone_as_everybody_says_it():
    """Nothing is on PyPI under our name."""
    sources = [path for room in ("bevfn", "kernels", "experiments") for path in (ROOT / room).rglob("*.py")]
    told = "".join(path.read_text() for path in [*PAGES, *sources])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "'bevfn[" not in told and set(re.findall(r"'\.\[(\w+)\]'", told)) <= set(extras)


def test_nothing_that_is_shipped_points_at_what_lies_beside_our_own_clone():
    rooms = ("bevfn", "kernels", "experiments", "notebooks")
    sources = [
        path for room in rooms for ending in ("py", "cpp", "ipynb") for path in (ROOT / room).rglob(f"*.{ending}")
    ]
    told = [path for path in [*PAGES, *sources, ROOT / "bevfn/ascend/a2.json"] if "shared/" in path.read_text()]
    assert told == []  # experiments/results alone, which keep the commands as typed


def test_the_table_of_models_is_the_catalogues():
    assert catalogue.table() in (ROOT / "README.md").read_text(), f"the README's table should be\n{catalogue.table()}"


def commands(page: Path) -> list[list[str]]:
    """The words of every command of ours in a page's code, blocks and `inline`, without the shell's."""
    text = page.read_text().replace("\\\n", " ")
    code = [
        *re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL),
        *re.findall(r"^    (\S.*)$", text, flags=re.MULTILINE),
    ]
    lines = [line for block in code for line in block.splitlines()] + re.findall(
        r"`((?:bevfn|python|torchrun) [^`]+)`", text
    )
    words = [line.partition("  #")[0].split() for line in lines]
    return [
        line for line in words if line[:1] == ["bevfn"] or any(word.startswith("bevfn.experiments.") for word in line)
    ]


def flags(words: list[str]) -> set[str]:
    return {word.strip("[]").partition("=")[0] for word in words if word.strip("[").startswith("--")}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_of_a_page_are_known_to_the_parsers_with_every_flag(page):
    from bevfn.cli import COMMANDS, GROUPS

    for words in commands(page):
        if words[0] == "bevfn":
            known = GROUPS[words[1]][1] if words[1] in GROUPS else COMMANDS
            name = words[2 if words[1] in GROUPS else 1] if len(words) > 1 + (words[1] in GROUPS) else ""
            for choice in name.split("|") if name and not name.startswith("-") else []:
                text = helped(known[choice])
                assert all(flag in text for flag in flags(words)), words
        else:
            place = next(i for i, word in enumerate(words) if word.startswith("bevfn.experiments."))
            module = importlib.import_module(words[place])
            text = helped(module.Config)
            assert all(flag in text for flag in flags(words[place:])), words


def test_pages_have_commands_and_targets_that_exist():
    found = [words for page in PAGES for words in commands(page)]
    assert len(found) > 30 and {"torchrun", "python", "bevfn"} <= {words[0] for words in found}
    targets = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(f"\n{target}:" in makefile for target in targets)
