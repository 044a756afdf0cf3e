"""The console commands: help, and one sentence for a user's mistake."""

import json
import subprocess
import sys

import pytest
import small_root

from bevfn import cli


def run(*arguments):
    module = arguments[0]
    done = subprocess.run([sys.executable, "-m", module, *arguments[1:]], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def call(monkeypatch, capfd, *arguments):
    """The same in this process."""
    monkeypatch.setattr(sys, "argv", ["bevfn", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, "".join(capfd.readouterr())


@pytest.mark.parametrize("arguments", [["--help"], ["parity", "--help"]])
def test_help_explains(arguments):
    code, text = run("bevfn.cli", *arguments)
    assert code == 0 and "usage:" in text


@pytest.mark.parametrize("group", list(cli.GROUPS))
def test_groups_explain_themselves_and_their_commands(monkeypatch, capfd, group):
    code, text = call(monkeypatch, capfd, group, "--help")
    assert code == 0 and f"usage: bevfn {group} [-h] {{{','.join(cli.GROUPS[group][1])}}}" in text
    for command in cli.GROUPS[group][1]:
        code, text = call(monkeypatch, capfd, group, command, "--help")
        assert code == 0 and f"usage: bevfn {group} {command} " in text


def test_unknown_command_of_a_group_is_named(monkeypatch, capfd):
    code, text = call(monkeypatch, capfd, "data", "chek")
    assert code == 2 and "chek" in text and "check" in text


def test_unknown_flag_is_named():
    code, text = run("bevfn.experiments.bevfusion", "--precison", "fp16")
    assert code == 2 and "--precison" in text and "--precision" in text  # and what was probably meant


def test_missing_case_is_one_sentence():
    code, text = run("bevfn.cli", "parity", "/nowhere")
    assert code == 2 and text.startswith("bevfn: /nowhere") and len(text.splitlines()) == 1


def test_frame_without_a_folder_is_one_sentence(tmp_path):
    code, text = run("bevfn.experiments.bevfusion", "--data", "frame", "--run-dir", str(tmp_path / "run"))
    assert code == 2 and "--data-root" in text
    assert not (tmp_path / "run").exists()


def test_data_check_says_what_is_missing(tmp_path, monkeypatch, capfd):
    root = small_root.write(tmp_path / "nuscenes")
    code, text = call(monkeypatch, capfd, "data", "check", root)
    assert code == 0 and text.splitlines()[0] == f"{root}  v1.0-mini  samples: mini_train 4, mini_val 4"
    next((root / "sweeps/LIDAR_TOP").glob("*")).unlink()
    code, text = call(monkeypatch, capfd, "data", "check", root, "--json", tmp_path / "report.json", "--show", 0)
    assert code == 1 and "1 missing" in text
    assert len(json.loads((tmp_path / "report.json").read_text())["problems"]) == 1


def test_data_check_of_a_wrong_root_is_one_sentence(tmp_path, monkeypatch, capfd):
    root = small_root.write(tmp_path / "nuscenes")
    code, text = call(monkeypatch, capfd, "data", "check", root / "samples")
    assert (
        code == 2
        and text == f"bevfn: {root / 'samples'} is inside the data set; give the folder above it as root: {root}.\n"
    )


def test_data_prepare_makes_the_index_and_the_database(tmp_path, monkeypatch, capfd):
    root = small_root.write(tmp_path / "nuscenes")
    code, text = call(monkeypatch, capfd, "data", "prepare", root)
    assert code == 0 and text.startswith("4 key frames of v1.0-mini mini_train\n")
    code, text = call(monkeypatch, capfd, "data", "check", root, "--split", "mini_train")
    assert code == 0 and "mini_train: index yes; GT-paste database yes" in text
    code, text = call(monkeypatch, capfd, "data", "prepare", root, "--no-published-sweeps", "--no-depth")
    assert code == 0 and "objects (--no-published-sweeps --published-paste)" in text
