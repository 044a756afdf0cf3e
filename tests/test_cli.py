"""The console commands: help, and one sentence for a user's mistake."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import small_root

from bevfn import cli
from bevfn.commands import meant
from bevfn.training import limits


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


HELPED = """
import sys
from bevfn import cli
from bevfn.commands import meant
inside = [[group, name] for group, (_, commands) in cli.GROUPS.items() for name in commands]
for words in ([], *([name] for name in cli.COMMANDS), *inside):
    sys.argv = ["bevfn", *words, "--help"]
    try:
        cli.main()
    except SystemExit as end:
        assert end.code == 0, words
    heavy = {"torch", "matplotlib", "sklearn", "scipy", "cv2", "nuscenes"} & set(sys.modules)
    assert not heavy, (words, heavy)
"""


def test_help_waits_for_no_library_that_takes_a_second_to_import():
    """Of all commands; but a recipe's own."""
    done = subprocess.run([sys.executable, "-c", HELPED], capture_output=True, text=True)
    said = 1 + len(cli.COMMANDS) + sum(len(inside) for _, inside in cli.GROUPS.values())
    assert done.returncode == 0 and done.stdout.count("usage: bevfn") == said, done.stderr


@pytest.mark.parametrize("typed", ["-m bevfn.experiments.bevfusion --help", "-m bevfn.cli train awml --help"])
def test_a_recipes_help_waits_for_torch_alone(typed):
    """Its flags are those of a config beside its model, so that torch is imported; nothing else that takes long is."""
    done = subprocess.run([sys.executable, "-X", "importtime", *typed.split()], capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "usage: " in done.stdout and "torch" in imported
    slow = {"torch._dynamo", "scipy.spatial", "scipy.optimize", "matplotlib", "sklearn", "nuscenes", "torch_npu"}
    found = slow & imported
    assert not found


def test_a_list_of_commands_says_what_each_is_for():
    for known in (cli.COMMANDS, *(inside for _, inside in cli.GROUPS.values())):
        for name in known:
            ours, real = inspect.getdoc(known.listed(name)), inspect.getdoc(known[name])
            assert ours and real.startswith(ours)


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


def commands() -> dict[str, Callable]:
    inside = {f"{group} {name}": made for group, (_, found) in cli.GROUPS.items() for name, made in found.items()}
    return inside | {name: made for name, made in cli.COMMANDS.items() if name not in cli.GROUPS}


def test_every_number_of_every_command_has_its_limit():
    for name, command in commands().items():
        for flag in inspect.signature(command).parameters.values():
            if re.search(r"\b(int|float)\b", str(flag.annotation)):
                assert flag.name in limits.LIMITS, f"bevfn {name}: {flag.name}"


@pytest.mark.parametrize(
    "words",
    [
        "eval bevfusion_lidar --checkpoint x --batch-size 0",
        "eval bevfusion_lidar --checkpoint x --site-capacity 5 0",
        "bench step --repeats 0",
        "bench views --threads -1",
        "graph bevdepth --batch-size 0",
        "data synth OUT --image-size 0 160",
        "data check . --workers -1",
    ],
)
def test_a_number_that_cannot_be_meant_is_refused_by_its_flag(monkeypatch, capfd, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    code, text = call(monkeypatch, capfd, *words.split())
    assert code == 2 and re.fullmatch(r"bevfn: --[a-z-]+ (0|-1) must be at least [01]\n", text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["export x.pth --out o", "predict x.pth . --out o"])
def test_a_choice_of_numbers_needs_no_limit(monkeypatch, capfd, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    code, text = call(monkeypatch, capfd, *words.split(), "--fuser-kernel", "3")
    assert code == 2 and "x.pth is not there" in text


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


def test_what_is_meant_by_other_tools_words_is_there():
    known = {"bevfn " + name for name in cli.COMMANDS}
    known |= {f"bevfn {group} {name}" for group, (_, inside) in cli.GROUPS.items() for name in inside}
    assert {f"bevfn {word}" for word in meant.ELSEWHERE.values()} <= known
    assert not {*meant.ELSEWHERE, *meant.NAMES} & set(cli.COMMANDS)
    flags = {"--" + name.replace("_", "-") for name in inspect.signature(cli.COMMANDS["eval"]).parameters}
    assert set(re.findall(r"--[\w-]+", " ".join(meant.OF_EVAL.values()))) <= flags and not set(meant.OF_EVAL) & flags


HINTS = {
    "steps": int | None,
    "lr": float,
    "sizes": tuple[int, ...],
    "pair": tuple[int, int] | None,
    "split": str | None,
}


@pytest.mark.parametrize(
    "words",
    [
        "--steps 3 --lr=1e-3",
        "--steps None",
        "--sizes 1 2 3 --lr inf",
        "--pair None",
        "--pair None place",
        "--pair 90 160 place --steps 2",
        "--sizes 1 2 place",
        "--steps 3 place",
        "--split two --sizes",
        "--other x",
    ],
)
def test_words_that_are_numbers_pass(words):
    limits.check_words(HINTS, words.split())


@pytest.mark.parametrize(
    "words, says",
    [
        ("--steps 2.5", "--steps 2.5 must be a whole number, at least 1"),
        ("--lr 0,1", "--lr 0,1 must be a number, above 0"),
        ("--lr None", "--lr None must be a number, above 0"),
        ("--sizes x 1", "--sizes x must be whole numbers"),
        ("--pair 1 x place", "--pair x must be whole numbers"),
        ("--steps=\x1b", "--steps \\x1b must be a whole number, at least 1"),
    ],
)
def test_words_that_are_none_are_named(words, says):
    with pytest.raises(ValueError, match=re.escape(says) + "$"):
        limits.check_words(HINTS, words.split())
