"""JSON as every reader takes it, and reading it however it is broken."""

import ast
import json
import os
from pathlib import Path

import numpy as np
import pytest

from bevfn import files
from bevfn.commands import bench, data, graph, parity


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


def test_an_output_that_cannot_be_written_is_named_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    files.check_json(None)
    files.check_json(tmp_path / "new" / "a.json")
    files.check_json(tmp_path / "file")  # is replaced
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(
        ValueError, match=rf"cannot make the output folder .*: {tmp_path}/file is no folder; choose another --json"
    ):
        files.check_json(tmp_path / "file" / "below" / "a.json")
    with pytest.raises(ValueError, match=r"--json .* is a folder; name a file"):
        files.check_json(tmp_path)
    with pytest.raises(ValueError, match=r"cannot write to the output folder /proc/\d+/fd: .*; choose another --out"):
        files.check_writable(Path(f"/proc/{os.getpid()}/fd"))


@pytest.mark.parametrize("command", [data.check, bench.ops, graph.graph, parity.parity])
def test_every_command_checks_its_json_file_first(tmp_path, command):
    """Before it looks at what it is about, which is not there."""
    arguments = () if command is bench.ops else ("bevfusion",) if command is graph.graph else (tmp_path / "nowhere",)
    with pytest.raises(ValueError, match=r"--json .* is a folder; name a file"):
        command(*arguments, json_file=tmp_path)


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "a" / "out"
    files.check_new_folder(out)
    with files.new_folder(out) as folder:
        (folder / "x").write_text("1")
        assert not out.exists()
    assert (out / "x").read_text() == "1" and sorted(p.name for p in out.parent.iterdir()) == ["out"]
    for failed in (tmp_path / "b", tmp_path / "c" / "d" / "out", tmp_path / "a" / "e" / "out"):
        with pytest.raises(KeyError), files.new_folder(failed) as folder:
            (folder / "x").write_text("1")
            raise KeyError
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["a", "a/out", "a/out/x"]
    with pytest.raises(ValueError, match="out exists and is not empty; choose another --out, or empty it"):
        files.check_new_folder(out)
