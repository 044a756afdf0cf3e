"""The console commands: help, and one sentence for a user's mistake."""

import subprocess
import sys

import pytest


def run(*arguments):
    module = arguments[0]
    done = subprocess.run([sys.executable, "-m", module, *arguments[1:]], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["parity", "--help"], ["checkpoint", "import", "--help"]])
def test_help_explains(arguments):
    code, text = run("bevfn.cli", *arguments)
    assert code == 0 and "usage:" in text


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


def test_missing_frame_folder_is_one_sentence_and_leaves_nothing(tmp_path):
    code, text = run(
        "bevfn.experiments.bevfusion", "--data-root", str(tmp_path / "none"), "--run-dir", str(tmp_path / "run")
    )
    assert code == 2 and "frame.json" in text and "Traceback" not in text
    assert not (tmp_path / "run").exists()
