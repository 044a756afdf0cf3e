"""Files of figures say what made them, and what they say can be typed today; `bevfn bench --list` repeats it."""

import datetime
import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tyro

from bevfn import cli, provenance
from bevfn.training import command_line

ROOT = Path(__file__).parents[1]
INSTRUCTION_SETS = ("AVX512", "AVX2", "SSE", "NEON", "SVE256", "SVE128")
FILES = provenance.read()


def commands(content: dict) -> list[str]:
    return [content["command"]] if isinstance(content["command"], str) else content["command"]


def check_parses(command: str) -> None:
    """Raises SystemExit, or fails, if today's command line does not take these words."""
    words = shlex.split(command)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[:2] == ["python", "-m"]:
        command_line.parse(importlib.import_module(words[2]).DEFAULTS, words[3:])
    else:
        assert words[0] == "bevfn"
        in_group = words[1] in cli.GROUPS
        known = cli.GROUPS[words[1]][1] if in_group else cli.COMMANDS
        name, rest = words[1 + in_group], words[2 + in_group :]
        tyro.cli(idle(known[name]), args=rest)


def idle(command):
    """The command's flags without what it does."""

    @functools.wraps(command)
    def nothing(*_, **__):
        pass

    return nothing


def test_there_are_figures():
    assert len(FILES) > 15


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_figures_says_what_made_it(name):
    content = FILES[name]
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", content["commit"])
    assert datetime.date.fromisoformat(content["date"]) >= datetime.date(2026, 11, 1)
    assert content["machine"]["processor"]
    assert content["machine"]["instruction_set"] in INSTRUCTION_SETS
    assert content["versions"].keys() == {"python", "torch", "bevfn"} and all(content["versions"].values())
    assert commands(content)
    for command in commands(content):
        check_parses(command)


@pytest.mark.parametrize("command", ["bevfn bench step --modality lidar", "bevfn graph lidar", "make nothing"])
def test_a_command_that_is_gone_is_found(command):
    with pytest.raises((SystemExit, AssertionError)):
        check_parses(command)


def test_the_head_is_of_this_process(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bevfn", "bench", "ops", "--json", "a file.json"])
    made = provenance.write(tmp_path / "x.json", {"figures": {"a": 1}})
    assert json.loads((tmp_path / "x.json").read_text()) == made
    assert list(made) == ["command", "commit", "date", "machine", "versions", "figures"]
    assert made["command"] == "bevfn bench ops --json 'a file.json'"
    assert made["machine"]["instruction_set"] and made["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    "machine, torchs, name",
    [("x86_64", "AVX2", "AVX2"), ("x86_64", "DEFAULT", "SSE"), ("aarch64", "DEFAULT", "NEON"), ("arm64", "DEFAULT", "NEON")],
)  # fmt: skip
def test_the_instruction_set_has_a_name_on_every_machine(monkeypatch, machine, torchs, name):
    monkeypatch.setattr(provenance.platform, "machine", lambda: machine)
    monkeypatch.setattr(provenance.torch.backends.cpu, "get_cpu_capability", lambda: torchs)
    assert provenance.instruction_set() == name


def test_a_gpu_is_named_with_its_driver(monkeypatch, tmp_path):
    gpu = types.SimpleNamespace(name="NVIDIA A100", major=8, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(provenance.torch.cuda, "get_device_properties", lambda device: gpu if device == "cuda:1" else 1)
    machine = provenance.head("cuda:1")["machine"]
    assert (machine["device"], machine["capability"], machine["device_memory_gb"]) == ("NVIDIA A100", "8.0", 80.0)
    assert {"driver", "cuda"} <= machine.keys() and machine.keys() - provenance.head()["machine"].keys() == {
        "capability", "device_memory_gb", "driver", "cuda"
    }  # fmt: skip
    told = tmp_path / "version"
    assert provenance._driver(told) is None
    told.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\nGCC version: 12\n"
    )
    assert provenance._driver(told) == "550.54.15"
    told.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n")
    assert provenance._driver(told) == "535.129.03"


def test_the_commit_is_that_of_the_checkout_and_of_no_other_repository(tmp_path, monkeypatch):
    assert provenance.head()["commit"] is None or re.match(r"[0-9a-f]{7}", provenance.head()["commit"])
    subprocess.run(["git", "init", "-q", tmp_path], check=True)  # a wheel inside somebody's repository
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.head()["commit"] is None


def test_the_list_names_every_file_and_its_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bevfn", "bench", "--list"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr().out
    assert end.value.code == 0
    for name, content in FILES.items():
        assert f"{name}  {content['date']}  {content['commit']}" in printed
        assert all(command in printed for command in commands(content))


def test_a_wheel_has_no_figures_and_says_so(tmp_path):
    assert "in a checkout" in provenance.listing(tmp_path)
