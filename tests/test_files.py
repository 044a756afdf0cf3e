"""JSON as every reader takes it, and reading it however it is broken."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest

from bevfn import files


def test_numbers_that_json_lacks_are_written_as_words_that_float_reads():
    value = {"a": [1.5, float("nan")], "b": {"c": (float("inf"), -float("inf"))}, "d": np.float64("nan")}
    text = files.to_json(value)
    assert json.loads(text) == {"a": [1.5, "nan"], "b": {"c": ["inf", "-inf"]}, "d": "nan"}
    assert float(json.loads(text)["b"]["c"][1]) == -float("inf")


def test_what_json_can_say_comes_back():
    value = {"a": [1, 2.5, None, True, "é"], "b": {}}
    assert files.read_json(files.to_json(value, indent=1)) == value


def test_values_as_they_come_back():
    value = {"a": (1, 2.5), "b": Path("/x"), "c": float("inf")}
    assert files.as_read(value) == {"a": [1, 2.5], "b": "/x", "c": "inf"}


# Where json is called beside files.py, and why that is strict too.
ELSEWHERE = {
    "bevfn.distributed": "what processes tell each other, in which NaN may pass",
    "bevfn.training.checkpoint": "what the seal is of",
    "bevfn.training.run_folder": "values shown in sentences",
}


def test_every_json_file_is_read_and_written_by_one_module():
    """So that none holds NaN, and one that does, or is nested 200,000 deep, is one sentence."""
    repo, calling = Path(__file__).parent.parent, set()
    for top, name in (("bevfn", "bevfn"), ("kernels", "bevfn.kernels"), ("experiments", "bevfn.experiments")):
        for path in (repo / top).rglob("*.py"):
            if any(
                isinstance(node, ast.Import) and node.names[0].name == "json"
                for node in ast.walk(ast.parse(path.read_text()))
            ):
                calling.add(".".join([name, *path.relative_to(repo / top).with_suffix("").parts]))
    assert {module for module in calling if ".data." not in module} == {"bevfn.files", *ELSEWHERE}


def test_other_objects_are_refused():
    with pytest.raises(TypeError):
        files.to_json({"a": object()})


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e400",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"\xff",
        b"1" * 5000,
    ],
)
def test_whatever_is_broken_is_a_value_error(text):
    with pytest.raises(ValueError):
        files.read_json(text)
