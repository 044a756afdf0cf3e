"""`bevfn compare`: runs beside each other; `--config`: a run's flags again."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import small_runs

from bevfn import cli
from bevfn.evaluation import score, slices
from bevfn.experiments import bevdepth, bevfusion_lidar
from bevfn.files import to_json
from bevfn.training import command_line

CLASSES = ("car", "truck")


def scores(ap: float) -> score.Scores:
    errors = dict.fromkeys(score.ERRORS, 0.5)
    rows = tuple(score.ClassScore(name, 10, ap, (ap,) * 4, errors, ((ap,) * 101,) * 4) for name in CLASSES)
    return score.Scores(ap, ap, errors, rows, 4, "v1.0-mini", "mini_val")


def made(folder: Path, ap: float | None = None, **flags) -> Path:
    folder.mkdir()
    config = replace(small_runs.config("bevfusion-lidar"), run_dir=folder, **flags)
    (folder / "config.json").write_bytes(to_json(command_line.flags(config)))
    lines = [json.dumps({"step": step, "loss/total": 3.0 / step, "seconds": 1.0}) for step in range(1, 5)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    if ap is not None:
        part = {"part": "0-10", "annotated": 4, "found": 2, "recall": ap, "AP": None}
        more = {"breakdown": {"slices": {"visibility": {slices.ALL: [part]}}}}
        score.write(folder / "evaluations" / "step_00000004" / score.METRICS, scores(ap), more=more)
        (folder / "evaluations" / "step_00000004" / "report.html").write_text("")
    return folder


def bevfn(monkeypatch, capfd, *words) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["bevfn", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, "".join(capfd.readouterr())


def test_two_runs_differ_in_flags_curves_and_scores(monkeypatch, capfd, tmp_path):
    runs = made(tmp_path / "slow", 0.25, lr=1e-4), made(tmp_path / "<fast>", 0.5, lr=1e-3)
    monkeypatch.setenv("COLUMNS", "40")
    code, told = bevfn(monkeypatch, capfd, "compare", *runs, "--out", tmp_path / "out")
    assert code == 0 and "  lr: 0.0001 | 0.001\n" in told and "batch_size" not in told
    assert max(len(line) for line in told.splitlines() if line.startswith("|")) <= 40
    assert "**0.500**" in told and " slow |" in told and "car" in told
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "&lt;fast&gt;" in page and "<fast>" not in page and page.count("<picture>") == 2 and "0.0001" in page
    assert "<th>visibility 0-10</th><td>0.250</td><td>0.500</td>" in page
    assert 'href="../%3Cfast%3E/evaluations/step_00000004/report.html"' in page
    for name in ("losses.png", "classes.png"):
        picture = cv2.imdecode(np.frombuffer((tmp_path / "out" / name).read_bytes(), np.uint8), cv2.IMREAD_COLOR)
        assert min(picture.shape[:2]) > 400 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_runs_that_cannot_be_compared_by_scores_say_why(monkeypatch, capfd, tmp_path):
    runs = made(tmp_path / "a", 0.25), made(tmp_path / "b")
    code, told = bevfn(monkeypatch, capfd, "compare", *runs, "--out", tmp_path / "out")
    assert code == 0 and "1 of 2 runs have been evaluated, so no scores are compared" in told
    assert not (tmp_path / "out" / "classes.png").exists()


@pytest.mark.parametrize(
    "words, says",
    [(["{0}/a"], "takes two runs or more"), (["{0}/a", "{0}/c"], "c is no run's folder; "),
     (["{0}/a", "{0}/a/config.json"], "config.json is no run's folder; its folder is "), (["{0}/a", "{0}/a"], "is named twice")],
)  # fmt: skip
def test_a_wrong_folder_is_one_sentence(monkeypatch, capfd, tmp_path, words, says):
    made(tmp_path / "a")
    code, told = bevfn(monkeypatch, capfd, "compare", *(word.format(tmp_path) for word in words))
    assert code == 2 and says in told and told.count("\n") == 1


def test_a_config_is_replayed_but_for_what_is_given(tmp_path):
    run = made(tmp_path / "run", lr=3e-4, epochs=7, resume=True, seed=5)
    for file in (run, run / "config.json"):
        config = command_line.parse(bevfusion_lidar.DEFAULTS, ["--config", str(file), "--epochs", "2"])
        assert (config.lr, config.epochs, config.seed, config.scale) == (3e-4, 2, 5, "mini")
        assert not config.resume and config.run_dir == bevfusion_lidar.DEFAULTS["bevfusion-lidar"]["synthetic"].run_dir


def test_a_config_brings_its_model(tmp_path):
    config = replace(bevdepth.DEFAULTS["bevdepth-2key-da"]["nuscenes"], milestones=(1,), data_root=tmp_path)
    (tmp_path / "config.json").write_bytes(to_json(command_line.flags(config)))
    replayed = command_line.parse(bevdepth.DEFAULTS, [f"--config={tmp_path}"])
    assert (replayed.model, replayed.milestones) == ("bevdepth-2key-da", (1,)) and replayed.data_root == tmp_path


def test_a_config_of_another_recipe_or_of_none_is_refused(tmp_path):
    run = made(tmp_path / "run")
    with pytest.raises(ValueError, match=r"is not there \(.*\); give a run's folder"):
        command_line.parse(bevdepth.DEFAULTS, ["--config", str(tmp_path / "none")])
    with pytest.raises((ValueError, SystemExit)):
        command_line.parse(bevdepth.DEFAULTS, ["--config", str(run)])
