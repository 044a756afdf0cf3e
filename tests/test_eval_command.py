"""`bevfn eval`: the scores that the run itself got, a submission, and checkpoints that do not fit."""

import json
import shutil
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_root
import small_world

from bevfn import cli, detector, distributed, waiting
from bevfn.commands import scoring as evaluate
from bevfn.data import batch, scene
from bevfn.evaluation import apart, score
from bevfn.experiments import bevfusion_lidar
from bevfn.training import checkpoint, run


@pytest.fixture(scope="module")
def trained(bare_runs, tmp_path_factory):
    config = replace(
        bevfusion_lidar.DEFAULTS["bevfusion-lidar"]["nuscenes"], data_root=small_world.index().root, scale="mini", backend="eager", steps=1,
        eval_backend="eager", workers=0, batch_size=1, sweeps=1, paste=False, norm_momentum=0.1,
        run_dir=tmp_path_factory.mktemp("run") / "run",
    )  # fmt: skip
    with bare_runs():
        run.main(bevfusion_lidar.task, config)
    return config, config.run_dir / "checkpoints" / "step_00000001"


def bevfn(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["bevfn", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.mark.parametrize(
    "experiment, before, name",
    [
        ("bevfusion", {"modality": "camera", "source_size": [900, 1600], "image_backbone_lr": 0.1}, "bevfusion-camera"),
        (
            "bevfusion_lidar",
            {"modality": "lidar", "source_size": [900, 1600], "image_backbone_lr": 1.0},
            "bevfusion-lidar",
        ),
        ("bevdepth", {"model": "two-key-cbgs-da-ema", "source_size": [450, 800]}, "bevdepth-2key-da-ema"),
        ("matrixvt", {"model": "matrixvt"}, "matrixvt"),
    ],
)
def test_the_config_of_a_run_from_before_the_catalogue_is_read(experiment, before, name, tmp_path):
    """Its checkpoints fit: leaves have the paths that they had."""
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 2, **before}))
    config = detector.run_config(experiment, tmp_path / "checkpoints" / "step_00000001", None, None)
    assert (config.model, config.epochs) == (name, 2)


def test_a_checkpoint_that_left_its_run_is_said_to_be_read_as_published(tmp_path, capsys):
    (tmp_path / "step_00000001").mkdir()
    made = [
        detector.run_config("bevfusion", tmp_path / "step_00000001", root, None)
        for root in (small_world.unmade(), None)
    ]
    assert [config.published_sweeps for config in made] == [True, False] and [config.scale for config in made] == [
        "published",
        "mini",
    ]
    said = capsys.readouterr().out.splitlines()
    assert "lies in no run folder" in said[0] and said[0].endswith("read with bevfusion's published settings")
    assert said[1].endswith("read with bevfusion's settings for the synthetic world (no --data-root)")


FAST = ("--backend", "eager", "--workers", "0")


def test_a_checkpoint_scores_as_its_run_did(trained, monkeypatch, capsys, tmp_path):
    config, checkpoint = trained
    monkeypatch.setattr(waiting, "EVERY_S", 0.02)
    assert bevfn(monkeypatch, "eval", "bevfusion_lidar", "--checkpoint", checkpoint, "--out", tmp_path, *FAST) == 0
    ours, theirs = (
        json.loads((folder / "results_nusc.json").read_text())
        for folder in (tmp_path, config.run_dir / "evaluations" / checkpoint.name)
    )
    assert ours == theirs and (tmp_path / "report.html").is_file()
    told = capsys.readouterr().out
    assert "mAP" in told and "scoring: 0 s so far" in told
    counts = json.loads((tmp_path / "metrics.json").read_text())["counts"]
    assert counts["points"] > 3000 and {"bad/points", "empty/points", "overflow/voxels_out"} <= set(counts)
    assert not {"empty/boxes", "overflow/boxes"} & set(counts)  # which tell of what is learned
    assert not any(count for name, count in counts.items() if name.startswith("overflow/"))


def test_boxes_of_half_precision_are_told_against_those_of_float32(trained, monkeypatch, capsys, tmp_path):
    """After one step no box is sure: all count here, and where the heatmap is flat rounding chooses other queries."""
    monkeypatch.setattr(apart, "LEAST", 0.0)
    how = ("--precision", "fp16", "--against", "fp32", "--out", tmp_path, *FAST)
    code = bevfn(monkeypatch, "eval", "bevfusion_lidar", "--checkpoint", trained[1], *how)
    told = json.loads((tmp_path / "apart.json").read_text())
    assert told["boxes"] > 100 and code == (0 if told["ok"] else 1)
    assert (told["precision"], told["against"]) == ("fp16", "fp32")
    printed = capsys.readouterr().out
    assert f"fp16 against fp32: {told['matched']:,} of {told['boxes']:,} boxes" in printed
    for name, stated in apart.STATED.items():
        assert told[name]["stated"] == stated and 0 < told[name]["median"] < stated
    assert (tmp_path / "metrics.json").is_file()


@pytest.mark.parametrize("augment", [True, False])
def test_key_frames_are_looked_at_in_mirrors_too(augment, trained, monkeypatch, capsys, tmp_path):
    """The same graph four times, over batches that say how they are mirrored; a model that has seen no mirrors is warned of."""
    run_dir = shutil.copytree(trained[0].run_dir, tmp_path / "run")
    told = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(told | {"augment": augment}))
    checkpoint = run_dir / "checkpoints" / trained[1].name
    sides, detect = [], evaluate.detect

    def watched(predict, *others, **settings):
        def told(params, state, batch):
            sides.append(tuple(batch.base_aug[0].diagonal()[:2].tolist()))
            return predict(params, state, batch)

        return detect(told, *others, **settings)

    monkeypatch.setattr(evaluate, "detect", watched)
    asked = ("eval", "bevfusion_lidar", "--checkpoint", checkpoint, "--out", tmp_path, "--tta", "flip", *FAST)
    assert bevfn(monkeypatch, *asked) == 0
    assert ("was trained without --augment and saw nothing mirrored" in capsys.readouterr().out) == (not augment)
    frames = len(sides) // 4
    assert sides == [side for side in ((1, 1), (-1, 1), (1, -1), (-1, -1)) for _ in range(frames)] and frames > 0
    assert (tmp_path / "metrics.json").is_file()


def test_a_precision_against_itself_is_refused(trained, monkeypatch, capsys, tmp_path):
    how = ("--against", "fp32", "--out", tmp_path, *FAST)
    assert bevfn(monkeypatch, "eval", "bevfusion_lidar", "--checkpoint", trained[1], *how) == 2
    assert "is run in fp32 anyway, so --against fp32 compares nothing" in " ".join(capsys.readouterr().err.split())


def test_what_evaluation_drops_is_printed_and_in_metrics_and_report(trained, monkeypatch, capsys, tmp_path):
    """As of a LiDAR that is denser than the run's, and misses returns; the capacities are flags."""
    root = small_world.copy(tmp_path / "world")
    last = root / small_world.index()[2].lidar_path  # no other key frame's sweep
    cloud = np.fromfile(last, "<f4").reshape(-1, 5)
    cloud[5:12, :3] = np.nan
    last.write_bytes(cloud.tobytes())
    small = ("--point-capacity", 1000, "--voxel-capacity", 300, "--site-capacity", 200, 100, 50)
    arguments = ("eval", "bevfusion_lidar", "--checkpoint", trained[1], "--out", tmp_path, "--data-root", root, *FAST)
    assert bevfn(monkeypatch, *arguments, *small) == 0
    counts = json.loads((tmp_path / "metrics.json").read_text())["counts"]
    assert counts["points"] == 3 * 1000
    printed = capsys.readouterr().out
    assert counts["bad/points"] == 7 and "bad/points: 7 points have numbers that are not finite" in " ".join(
        printed.split()
    )
    for name in ("points", "voxels_l0", "voxels_l1", "voxels_l2", "voxels_out"):
        assert counts[f"overflow/{name}"] > 0
        assert f"overflow/{name}: {counts[f'overflow/{name}']:,} " in (tmp_path / "summary.md").read_text()
        assert f"overflow/{name}" in printed and f"overflow/{name}" in (tmp_path / "report.html").read_text()
    share = counts["overflow/points"] / (counts["overflow/points"] + 3000)
    assert f"raise --point-capacity, or accept the loss ({share:.1%} of all in range)." in printed


def test_points_of_the_oldest_sweeps_are_cut_first(trained):
    config = replace(trained[0], sweeps=3)
    data = bevfusion_lidar.task(config).data
    sample = scene.load(data.evaluation, 2, data.eval_reading)
    lags = sample.points[:, 4]
    starts = np.flatnonzero(np.diff(lags, prepend=-1.0) > 0)
    assert len(starts) == 4 == len(set(lags)) and lags[0] == 0 and (np.diff(lags) >= 0).all()
    room = replace(data.eval_reading.capacities, points=int(starts[2]) + 10)
    made, counts = batch.collate([sample], capacities=room)
    assert counts["overflow/points"] == len(lags) - room.points > 0
    np.testing.assert_array_equal(made.points[0], sample.points[: room.points])  # two whole scans, and of the third


def test_capacities_of_points_are_not_for_camera_models(monkeypatch, capsys, tmp_path):
    arguments = (
        "eval",
        "bevdepth",
        "--checkpoint",
        tmp_path,
        "--data-root",
        small_world.index().root,
    )
    assert bevfn(monkeypatch, *arguments, "--point-capacity", 5) == 2
    assert "bevdepth reads no LiDAR points or sweeps; leave out --point-capacity" in capsys.readouterr().err


def test_sweeps_move_as_the_run_or_the_flag_says_and_an_older_config_is_named(trained, monkeypatch, capsys, tmp_path):
    config, checkpoint = trained
    shutil.copytree(config.run_dir, tmp_path / "old")
    stored = json.loads((config.run_dir / "config.json").read_text())
    del stored["published_sweeps"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(stored))
    asked = []
    monkeypatch.setattr(
        evaluate, "detect", lambda *given, **_: asked.append(given[4].points.published_sweeps) or ({}, {})
    )
    monkeypatch.setattr(evaluate, "judge", lambda *_, **__: types.SimpleNamespace(text=""))
    command = ("eval", "bevfusion_lidar", *FAST, "--checkpoint")
    bevfn(monkeypatch, *command, checkpoint)
    bevfn(monkeypatch, *command, checkpoint, "--published-sweeps", "False")
    assert "older" not in capsys.readouterr().out
    old = (*command, tmp_path / "old" / "checkpoints" / checkpoint.name)
    bevfn(monkeypatch, *old)
    bevfn(monkeypatch, *old, "--data-root", config.data_root)
    said = "config.json is of an older bevfn, which did not have all flags: taken as published_sweeps False"
    assert capsys.readouterr().out.count(said) == 2
    assert asked == [True, False, False, False]  # older runs moved them right


def test_the_device_is_the_runs_where_it_is_here(trained, monkeypatch, capsys, tmp_path):
    made = copied(trained[1], tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["device"] == "cpu"  # what auto was when it was trained
    asked = []
    monkeypatch.setattr(evaluate, "detect", lambda *_, **settings: asked.append(settings["device"]) or ({}, {}))
    monkeypatch.setattr(evaluate, "judge", lambda *_, **__: types.SimpleNamespace(text=""))
    (tmp_path / "config.json").write_text(json.dumps(stored | {"device": "cuda:7"}))
    assert bevfn(monkeypatch, "eval", "bevfusion_lidar", "--checkpoint", made, *FAST) == 0
    assert f"device {distributed.chosen('auto')} (the run's cuda:7 is not here)" in capsys.readouterr().out
    assert bevfn(monkeypatch, "eval", "bevfusion_lidar", "--checkpoint", made, *FAST, "--device", "cpu") == 0
    assert "is not here" not in capsys.readouterr().out and asked == [distributed.chosen("auto"), "cpu"]


def test_the_metric_is_the_data_sets_own_unless_the_flag_names_one(trained, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(evaluate, "detect", lambda *_, **__: ({}, {}))
    monkeypatch.setattr(
        evaluate, "judge", lambda index, *_, **__: asked.append(index.judge) or types.SimpleNamespace(text="")
    )
    command = ("eval", "bevfusion_lidar", *FAST, "--checkpoint", trained[1])
    assert bevfn(monkeypatch, *command) == bevfn(monkeypatch, *command, "--metric", "t4") == 0
    assert asked == ["nuscenes", "t4"]


def test_the_test_split_gets_a_submission_instead_of_scores(trained, monkeypatch, tmp_path):
    _, checkpoint = trained
    root = small_root.write(tmp_path / "root", version="v1.0-test", scenes=("scene-0077",), annotated=False)
    code = bevfn(
        monkeypatch, "eval", "bevfusion_lidar", "--checkpoint", checkpoint, "--out", tmp_path / "out", *FAST,
        "--data-root", root, "--version", "v1.0-test", "--split", "test",
    )  # fmt: skip
    assert code == 0
    with zipfile.ZipFile(tmp_path / "out" / "submission.zip") as archive:
        document = json.loads(archive.read(archive.namelist()[0]))
    assert len(document["results"]) == 4 and document["meta"]["use_lidar"] and not document["meta"]["use_camera"]
    assert not (tmp_path / "out" / "metrics.json").exists()


def unscorable(root: Path) -> None:
    """Attributes that nuScenes' scores do not know."""
    path = root / "v1.0-trainval" / "attribute.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([row | {"name": "vehicle.flying"} for row in rows]))


def occupied(root: Path) -> None:
    (root / "out").write_text("a file")


@pytest.mark.parametrize(
    "change, says", [(unscorable, "annotates the attribute 'vehicle.flying'"), (occupied, "/out is no folder; choose another")]
)  # fmt: skip
def test_what_ends_without_scores_ends_before_the_model_runs(trained, monkeypatch, capsys, tmp_path, change, says):
    root = small_world.copy(tmp_path / "world")
    change(root)
    monkeypatch.setattr(evaluate, "detect", lambda *_, **__: pytest.fail("the model ran"))
    arguments = ("eval", "bevfusion_lidar", "--checkpoint", trained[1], *FAST, "--data-root", root)
    assert bevfn(monkeypatch, *arguments, "--out", root / "out" / "below") == 2
    assert says in capsys.readouterr().err
    assert change is occupied or not (root / "out").exists()


def test_where_scoring_fails_the_detections_stay_and_are_no_evaluation(trained, monkeypatch, capsys, tmp_path):
    arguments = ("eval", "bevfusion_lidar", "--checkpoint", trained[1], "--out", tmp_path, *FAST)
    (tmp_path / "metrics.json").write_text("{}")  # of an evaluation before

    def fails(*_, **__):
        raise ValueError("the devkit cannot score these.")

    monkeypatch.setattr(score, "score", fails)
    assert bevfn(monkeypatch, *arguments) == 2
    says = f"the devkit cannot score these; the detections are in {tmp_path}/results_nusc.json, without scores"
    assert says in capsys.readouterr().err
    assert len(json.loads((tmp_path / "results_nusc.json").read_text())["results"]) == 3
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("split, trained_on", [("train", True), ("val", False), ("both", True)])
def test_scenes_that_the_run_was_trained_on_are_told(trained, monkeypatch, capsys, tmp_path, split, trained_on):
    root = small_world.copy(tmp_path / "world")
    scenes = [row["name"] for row in json.loads((root / "v1.0-trainval" / "scene.json").read_text())]
    (root / "v1.0-trainval" / "splits.json").write_text(json.dumps({"both": scenes}))
    monkeypatch.setattr(evaluate, "detect", lambda *_, **__: ({}, {}))
    monkeypatch.setattr(evaluate, "judge", lambda *_, **__: types.SimpleNamespace(text=""))
    arguments = ("eval", "bevfusion_lidar", "--checkpoint", trained[1], *FAST, "--data-root", root, "--out", tmp_path)
    assert bevfn(monkeypatch, *arguments, "--split", split) == 0
    said = f"warning: 1 of the {2 if split == 'both' else 1} scenes of split '{split}' were trained on, so these scores"
    assert (said in capsys.readouterr().out) == trained_on


def test_a_checkpoint_of_another_model_is_refused(trained, monkeypatch, capsys):
    _, checkpoint = trained
    assert bevfn(monkeypatch, "eval", "bevfusion", "--checkpoint", checkpoint, *FAST) == 2
    assert "is of the recipe bevfusion_lidar (bevfusion-lidar), not of " in capsys.readouterr().err
    inside = trained[0].run_dir / "checkpoints" / "step_00000001" / "train_state.safetensors"
    assert (
        bevfn(monkeypatch, "eval", "bevfusion", "--checkpoint", inside, *FAST, "--data-root", small_world.index().root)
        == 2
    )
    assert str(inside) in capsys.readouterr().err


def test_a_missing_checkpoint_is_named(monkeypatch, capsys, tmp_path):
    assert bevfn(
        monkeypatch, "eval", "bevfusion_lidar", "--checkpoint", tmp_path / "no.safetensors", *FAST, "--data-root",
        small_world.index().root,
    ) == 2  # fmt: skip
    assert "no.safetensors" in capsys.readouterr().err


def copied(checkpoint: Path, folder: Path) -> Path:
    """The run's config and one checkpoint, elsewhere."""
    made = Path(shutil.copytree(checkpoint, folder / "checkpoints" / checkpoint.name))
    shutil.copy(checkpoint.parent.parent / "config.json", folder)
    return made


def test_a_checkpoint_with_a_flipped_bit_is_refused(trained, monkeypatch, capsys, tmp_path):
    made = copied(trained[1], tmp_path)
    content = bytearray((made / "train_state.safetensors").read_bytes())
    content[-3] ^= 4
    (made / "train_state.safetensors").write_bytes(content)
    assert bevfn(monkeypatch, "eval", "bevfusion_lidar", "--checkpoint", made, *FAST) == 2
    assert "train_state.safetensors is damaged: its size or CRC" in capsys.readouterr().err


def test_a_checkpoint_with_weights_that_are_nan_is_refused(trained, monkeypatch, capsys, tmp_path):
    made = copied(trained[1], tmp_path)
    leaves = checkpoint.read(made)
    leaves["params.head.shared.bias"][0] = float("nan")
    checkpoint.save_step(made, leaves, {"step": 1})
    assert bevfn(monkeypatch, "eval", "bevfusion_lidar", "--checkpoint", made, *FAST) == 2
    assert "params.head.shared.bias is NaN or infinite; take an older checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [[], {"batch_size": "four"}, {"data_root": 3}, {"precision": "fp8"}, {"frozen": [1]}]
)
def test_a_runs_config_of_another_type_is_one_sentence(trained, monkeypatch, capsys, tmp_path, change):
    made = copied(trained[1], tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | change if isinstance(change, dict) else change))
    assert bevfn(monkeypatch, "eval", "bevfusion_lidar", "--checkpoint", made, *FAST) == 2
    error = capsys.readouterr().err
    assert "config.json is damaged" in error and "Traceback" not in error


def test_an_evaluation_never_overwrites_another(trained, monkeypatch, capsys, tmp_path):
    made = copied(trained[1], tmp_path)
    asked = []
    monkeypatch.setattr(evaluate, "detect", lambda *_, **__: ({}, {}))

    def judged(_, __, ___, out, **____):
        asked.append(out)
        out.mkdir(parents=True)
        return types.SimpleNamespace(text="")

    monkeypatch.setattr(evaluate, "judge", judged)
    command = ("eval", "bevfusion_lidar", "--checkpoint", made, *FAST)
    assert bevfn(monkeypatch, *command) == bevfn(monkeypatch, *command) == 0
    home = tmp_path / "evaluations"
    assert asked == [home / f"{made.name}_val", home / f"{made.name}_val_2"]
    (home / made.name).mkdir()  # as the run itself makes it
    (home / made.name / "metrics.json").write_text("{}")
    monkeypatch.chdir(home / made.name)
    for out in (home / made.name, ".", home / "missing" / ".." / made.name):
        assert bevfn(monkeypatch, *command, "--out", out) == 2
        assert "is the run's own evaluation; choose another --out" in capsys.readouterr().err and len(asked) == 2
