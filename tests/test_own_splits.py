"""Splits and versions with names of their own: trained on, evaluated and scored by their key frames, or refused at once."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import small_root
import small_world
import tiny_experiment

from bevfn import cli
from bevfn.data import check, nuscenes, source, tables
from bevfn.data.index import pack
from bevfn.evaluation import score
from bevfn.evaluation.results import KNOWN_ATTRIBUTES
from bevfn.training import evaluations, run

VERSION = "v7-ours"
CONFIG = tiny_experiment.Config(
    steps=1, batch_size=1, lr=1e-4, version=VERSION, train_split="streets", eval_split="yards"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The small world under another version's name, with scenes and splits of other names."""
    root = small_world.copy(tmp_path_factory.mktemp("own") / "world")
    (root / "v1.0-trainval").rename(root / VERSION)
    path = root / VERSION / "scene.json"
    scenes = json.loads(path.read_text())
    path.write_text(json.dumps([row | {"name": f"drive {i}"} for i, row in enumerate(scenes)]))
    (root / VERSION / "splits.json").write_text(json.dumps({"streets": ["drive 0"], "yards": ["drive 1"]}))
    return root


def test_own_splits_train_and_are_scored(world, tmp_path, capsys, monkeypatch):
    config = replace(CONFIG, data_root=world, run_dir=tmp_path / "run")
    summary = run.main(tiny_experiment.task, config)
    folder = tmp_path / "run" / "evaluations" / "step_00000001"
    scores = score.read(folder / "metrics.json")
    assert (scores.version, scores.split, scores.frames) == (VERSION, "yards", 3) and summary["scores"].keys() >= {
        "NDS"
    }
    assert {c.name: c.annotated for c in scores.classes}["car"] > 0  # of the scene's own annotations
    # The folder alone is no evaluation: without its metrics, a resumed run makes it again.
    assert run.main(tiny_experiment.task, replace(config, resume=True))["steps"] == 1
    assert "is finished" in capsys.readouterr().out
    (folder / "metrics.json").unlink()
    again: list[int] = []
    monkeypatch.setattr(evaluations, "evaluate", lambda run, train_state, done, **_: again.append(done) or {})
    run.main(tiny_experiment.task, replace(config, resume=True))
    assert "is finished" not in capsys.readouterr().out and again == [1]


SHARING = {"streets": ["drive 0"], "yards": ["drive 1"], "all": ["drive 0", "drive 1"]}


def test_splits_that_share_scenes_are_found_and_refused_before_the_first_step(world, tmp_path, monkeypatch, capsys):
    path = world / VERSION / "splits.json"
    whole = path.read_text()
    try:
        path.write_text(json.dumps(SHARING))
        with pytest.raises(
            ValueError,
            match=r"3 of the 3 key frames of the evaluation split 'yards' are in the training split 'all' too",
        ):
            run.main(
                tiny_experiment.task, replace(CONFIG, data_root=world, train_split="all", run_dir=tmp_path / "run")
            )
        shared = [f.what for f in check.check(world).findings if f.kind == "refused"]
        assert [s for s in shared if "share" in s] == [
            "the splits streets, all share 1 scene, drive 0", "the splits yards, all share 1 scene, drive 1"
        ]  # fmt: skip
        for train, good in (("streets", True), ("all", False)):
            report = check.check(world, training=train, evaluation="yards")
            assert any("share" in f.what for f in report.findings) != good and set(report.samples) == {
                train,
                "yards",
            }
        monkeypatch.setattr(
            sys, "argv", ["bevfn", "data", "check", str(world), "--train-split", "all", "--eval-split", "yards"]
        )
        with pytest.raises(SystemExit, match="1"):
            cli.main()
        assert "refused: the splits all, yards share 1 scene, drive 1: it refuses" in capsys.readouterr().out
    finally:
        path.write_text(whole)
    assert not (tmp_path / "run").exists()


def test_the_default_splits_may_not_share_scenes_either(tmp_path):
    root = small_root.write(tmp_path / "root")
    assert tables.shared_scenes(root, small_root.VERSION) == {}
    (root / small_root.VERSION / "splits.json").write_text(json.dumps({"mini_val": ["scene-0061", "scene-0103"]}))
    assert tables.shared_scenes(root, small_root.VERSION) == {("mini_train", "mini_val"): ["scene-0061"]}
    with pytest.raises(ValueError, match=r"4 of the 8 key frames .* 'mini_train' too, such as those of scene-0061,"):
        source.open(root, small_root.VERSION)
    (root / small_root.VERSION / "splits.json").unlink()
    # The same split for both must be asked for.
    with pytest.raises(ValueError, match="--train-split mini_val is what would be evaluated on too"):
        source.open(root, small_root.VERSION, "mini_val")
    assert tables.shared_scenes(root, small_root.VERSION, "mini_val") == {("mini_val", "mini_val"): ["scene-0103"]}
    assert tables.shared_scenes(root, small_root.VERSION, "mini_val", "mini_val") == {}


def test_splits_that_must_be_named_are_asked_for(world):
    with pytest.raises(
        ValueError,
        match=r"v7-ours, has no splits of nuScenes' names; name with --train-split and --eval-s.* streets, yards",
    ):
        source.open(world, VERSION)
    with pytest.raises(ValueError, match=r"name with --eval-split what to take of streets, yards"):
        source.open(world, VERSION, "streets")
    with pytest.raises(
        ValueError, match=r"has no scene of the split 'val'; the splits with scenes there .* are streets, yards"
    ):
        source.open(world, VERSION, "streets", "val")
    opened = source.open(world, VERSION, "streets", "yards")
    assert (opened.training.split, opened.evaluation.split) == ("streets", "yards")
    assert not set(opened.training.positions) & set(opened.evaluation.positions)


def test_one_frame_has_no_splits(tmp_path):
    (tmp_path / "frame.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no splits; leave out the split 'val'"):
        source.open(tmp_path, "v1.0-trainval", evaluation="val")


def test_defaults_are_nuscenes_where_there_are_such(tmp_path):
    root = small_root.write(tmp_path / "root")
    assert tables.default_splits(root, small_root.VERSION) == ("mini_train", "mini_val")
    opened = source.open(root, small_root.VERSION, evaluation="mini_train")
    assert opened.training is opened.evaluation and opened.training.split == "mini_train"


def test_a_split_without_annotations_is_refused_before_the_first_step(world, tmp_path):
    path = world / VERSION / "sample_annotation.json"
    whole = path.read_text()
    evaluated = set(nuscenes.index(world, VERSION, "yards").positions)
    try:
        path.write_text(json.dumps([row for row in json.loads(whole) if row["sample_token"] not in evaluated]))
        with pytest.raises(
            ValueError, match=r"split 'yards'\) has no annotations of the ten classes, so nothing can be sc"
        ):
            run.main(tiny_experiment.task, replace(CONFIG, data_root=world, run_dir=tmp_path / "run"))
    finally:
        path.write_text(whole)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("attributes", ["vehicle.flying", "vehicle.moving, vehicle.parked"])
def test_attributes_that_cannot_be_scored_are_refused_before_the_first_step(attributes):
    frames = [replace(frame, attributes=(attributes,) * len(frame.names)) for frame in small_world.index()]
    source.check_scored(small_world.index(), KNOWN_ATTRIBUTES)
    with pytest.raises(
        ValueError, match=rf"annotates the attribute '{attributes}', which nuScenes' scores do not know"
    ):
        source.check_scored(replace(small_world.index(), frames=pack(frames)), KNOWN_ATTRIBUTES)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"../x": ["scene-0061"]}, r"splits.json: '../x' cannot name a split, since files are named after it"),
        ({"a": ["scene-9999"]}, r"splits.json: a names the scene 'scene-9999', which scene.json has not"),
        ({"a\x1b": ["scene-0061"]}, r"splits.json: 'a\\x1b' cannot name a split"),
        ({"mine": "scene-0061"}, r"splits.json: mine must be a list of names of scenes"),
        ({"mine": [["scene-0061"]]}, r"splits.json: mine must be a list of names of scenes"),
        (["mine"], r"splits.json holds a list, not a dict"),
    ],
)
def test_splits_that_are_no_lists_of_scenes_are_refused(tmp_path, content, says):
    root = small_root.write(tmp_path / "root")
    (root / small_root.VERSION / "splits.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=says):
        nuscenes.index(root, small_root.VERSION, "mini_train")
