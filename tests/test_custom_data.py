"""docs/custom_data.md from its first line to its last, on a small folder of clouds and images, at mini size."""

import contextlib
import re
import runpy
import shlex
import shutil
import sys

import pytest
import small_own
import small_t4_world

from bevfn import cli
from bevfn.experiments import custom
from bevfn.files import read_json
from bevfn.training import command_line, run

# What makes seconds of it: one step, in this process, of the small network.
QUICK = [
    "--scale",
    "mini",
    "--steps",
    "1",
    "--batch-size",
    "1",
    "--workers",
    "0",
    "--backend",
    "eager",
    "--eval-backend",
    "eager",
    "--lr",
    "1e-3",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page's folder, after its first block: drives/ with frames.json, beside the other files that the page writes."""
    folder = tmp_path_factory.mktemp("page")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        small_own.convert(folder, patch)
    (folder / "our_car.py").write_text(small_own.blocks("python")[1])
    (folder / "both.toml").write_text(small_own.blocks("toml")[0])
    shutil.copytree(small_t4_world.root(), folder / "t4", ignore=shutil.ignore_patterns(".bevfn"))
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def command(first: str) -> list[str]:
    """The words of the page's command that begins so."""
    text = "\n".join(small_own.blocks("sh")).replace("\\\n", " ")
    (found,) = [line for line in text.splitlines() if line.startswith(first)]
    return shlex.split(found)


def trained(words: list[str], *more: str) -> dict:
    """The summary of a run of `python -m bevfn.experiments.custom ...`, quick."""
    config = command_line.parse(custom.DEFAULTS, [*words[3:], *QUICK, *more])
    return run.main(custom.task, config)


def test_a_folder_is_checked_trained_on_and_evaluated(here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command("bevfn data check"))
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    said = capsys.readouterr().out
    assert (
        "train 3, val 3" in said and "classes car, person, cone; cameras front, left" in said and "nothing is" in said
    )
    summary = trained(command("python -m bevfn.experiments.custom --data-root drives --scale"))
    assert summary["config"]["classes"] == ["car", "person", "cone"] and summary["scores"].keys() >= {"T4 mAP", "NDS"}
    words = command("bevfn eval custom")
    words[words.index("--checkpoint") + 1] = "runs/first/checkpoints/step_00000001"
    monkeypatch.setattr(sys, "argv", [*words, "--backend", "eager", "--workers", "0"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    scores = read_json((here / "runs/first/evaluations/step_00000001/metrics.json").read_bytes())
    assert scores["t4"]["mAP"] == pytest.approx(summary["scores"]["T4 mAP"], abs=1e-9) and scores["split"] == "val"


def test_cameras_range_voxels_and_classes_of_ones_own_are_trained(here):
    words = command("python -m bevfn.experiments.custom --data-root drives --model")
    summary = trained(words, "--run-dir", "runs/fusion", "--mode", "performance")
    config = summary["config"]
    assert (config["cameras"], config["classes"]) == (["front", "left"], ["car", "person"]) and summary["steps"] == 1
    assert config["bounds_m"] == [-25.6, -25.6, -3.0, 51.2, 25.6, 3.0]


def test_a_python_file_stands_for_flags(here, monkeypatch):
    path = here / "our_car.py"
    made = runpy.run_path(str(path))["DEFAULTS"]
    config = command_line.parse(made, ["--data-root", "drives", "--model", "custom-lidar-camera"])
    assert (config.classes, config.image_size, config.scan_points) == (("car", "person"), (128, 352), 60_000)
    network = custom.network(config)
    assert network.head.cells == (96, 64) and network.camera.view.grid.cells == (192, 128) and network.head.classes == 2
    monkeypatch.setattr(
        sys, "argv", [str(path), "--data-root", "drives", *QUICK, "--mode", "performance", "--run-dir", "runs/file"]
    )
    runpy.run_path(str(path), run_name="__main__")
    assert read_json((here / "runs/file/summary.json").read_bytes())["steps"] == 1


def test_a_mixture_is_trained_on(here, capsys):
    words = command("python -m bevfn.experiments.custom --data-root both.toml")
    summary = trained(words, "--run-dir", "runs/both", "--sweeps", "0")
    said = capsys.readouterr().out
    assert "7 samples an epoch (5 of drives, 2 of t4)" in said, said
    assert summary["config"]["classes"] == ["car", "person", "cyclist"] and "T4 mAP" in summary["scores"]


def test_what_the_page_says_of_columns_and_flags_is_so():
    text = small_own.PAGE.read_text()
    assert f"`--scan-points` is how many points a cloud has at most ({custom.Config().scan_points:,})" in text.replace(
        "\n", " "
    )
    for name, recipe in custom.DEFAULTS.items():
        assert re.search(rf"\| `{name}` .* {recipe['own'].epochs} epochs", text), name
