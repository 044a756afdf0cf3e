"""Pretraining as a recipe: a run from its command to a detector that starts from it, what is taken and left out, and refusals."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import small_t4_world
import small_world
import test_awml
import test_bevfusion
import torch

from bevfn import tree
from bevfn.commands import evaluate
from bevfn.data import scene, source
from bevfn.experiments import awml, bevfusion, bevfusion_lidar, pretrain
from bevfn.metrics import read_metrics
from bevfn.models import awml as t4_detectors
from bevfn.models import bevfusion as detectors
from bevfn.models import image_branch, masked_voxels
from bevfn.training import assembly, checkpoint, run, tasks

SMALL = {
    "scale": "published", "backend": "eager", "eval_backend": "eager", "steps": 2, "batch_size": 2, "workers": 0, "sweeps": 1,
    "eval_first": False, "augment": True, "lr": 1e-3, "point_capacity": 12_000,
}  # fmt: skip
ON_T4 = {"lidar": "awml-lidar", "both": "awml-camera-lidar", "camera": "awml-camera"}
ALIKE = {"awml-lidar-offline-masked"}  # trains as another one does


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Networks of the smallest size behind the recipes' names."""
    with pytest.MonkeyPatch.context() as patch:
        lidar, camera, both = (test_bevfusion.tiny(sensors) for sensors in ("lidar", "camera", "lidar-camera"))
        for recipe, name, network in (
            (pretrain, "bevfusion-lidar-masked", masked_voxels.Config(lidar, channels=8)),
            (pretrain, "bevfusion-image", image_branch.Config(both, channels=8)),
            (pretrain, "bevfusion-camera-image", image_branch.Config(camera, channels=8)),
            (bevfusion_lidar, "bevfusion-lidar", lidar),
            (bevfusion, "bevfusion-lidar-camera", both),
            (bevfusion, "bevfusion-camera", camera),
            (pretrain, "awml-lidar-masked", masked_voxels.Config(test_awml.tiny(t4_detectors.lidar()), channels=8)),
            (pretrain, "awml-image", image_branch.Config(test_awml.tiny(t4_detectors.camera_lidar()), channels=8)),
            *((awml, name, test_awml.tiny(awml.NETWORKS[name]())) for name in ON_T4.values()),
        ):
            patch.setitem(recipe.NETWORKS, name, lambda network=network: network)
        yield


def root_of(model):
    return small_t4_world.root() if model.startswith("awml") else small_world.index().root


def config_of(recipe, model, **changes):
    return replace(recipe.DEFAULTS[model]["synthetic"], **(SMALL | {"data_root": root_of(model)} | changes))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """{model: (config, summary)} of a run of each."""
    made = {}
    for model in SCORES:
        config = config_of(pretrain, model, run_dir=tmp_path_factory.mktemp(model) / "run", checkpoint_every=1)
        made[model] = config, run.main(pretrain.task, config)
    return made


def last(config):
    return config.run_dir / "checkpoints" / "step_00000002"


SCORES = {
    "bevfusion-lidar-masked": {"AP", "chance AP", "IoU"},
    "bevfusion-image": {"2D mAP", "depth error"},
    "bevfusion-camera-image": {"2D mAP", "depth error"},
    "awml-lidar-masked": {"AP", "chance AP", "IoU"},
    "awml-image": {"2D mAP", "depth error"},
}


def test_every_model_is_run_or_like_one_that_is():
    assert SCORES.keys() | ALIKE == pretrain.NETWORKS.keys()


@pytest.mark.parametrize("model", SCORES)
def test_a_run_trains_and_scores_its_pretext_not_detections(ran, model):
    config, summary = ran[model]
    assert summary["steps"] == 2 and summary["scores"].keys() <= SCORES[model] and summary["scores"]
    folder = config.run_dir / "evaluations" / "step_00000002"
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "summary.md"}
    assert json.loads((folder / "metrics.json").read_text()).items() >= summary["scores"].items()
    assert f"{4 if model.startswith('awml') else 3} key frames" in (folder / "summary.md").read_text()
    assert checkpoint.best(config.run_dir / "checkpoints") is not None
    assert [step["step"] for step in read_metrics(config.run_dir)] == [1, 2]


@pytest.mark.parametrize("model", SCORES)
def test_a_checkpoint_is_evaluated_by_its_command(ran, model, tmp_path, capsys):
    config, summary = ran[model]
    done = evaluate.evaluate("pretrain", checkpoint=last(config), backend="eager", workers=0, out=tmp_path / "e")
    numbers = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert done == 0 and next(iter(summary["scores"])) in capsys.readouterr().out
    assert {name: numbers[name] for name in summary["scores"]} == pytest.approx(summary["scores"], rel=1e-5)
    with pytest.raises(ValueError, match=f"{model} detects nothing, so --tta flip has no boxes to merge; leave it out"):
        evaluate.evaluate("pretrain", checkpoint=last(config), tta="flip", workers=0, out=tmp_path / "f")


@pytest.mark.parametrize("model", ["bevfusion-lidar-masked", "bevfusion-image"])
def test_a_resumed_run_is_the_one_that_was_not_stopped(ran, model, tmp_path):
    config, summary = ran[model]
    again = replace(config, run_dir=tmp_path / "run", resume=True)
    shutil.copytree(config.run_dir, again.run_dir)
    for path in (last(again), again.run_dir / "evaluations", again.run_dir / "summary.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run.main(pretrain.task, again)["scores"] == summary["scores"]
    ours, theirs = (checkpoint.load_tensors(last(c) / checkpoint.TENSORS) for c in (config, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(leaf, theirs[name]) for name, leaf in ours.items())


STARTED = [
    (bevfusion_lidar, "bevfusion-lidar", "bevfusion-lidar-masked", {"lidar", "bev"}),
    (bevfusion, "bevfusion-lidar-camera", "bevfusion-image", {"camera.backbone", "camera.neck"}),
    (bevfusion, "bevfusion-camera", "bevfusion-camera-image",
     {"camera.backbone", "camera.neck", "camera.view.depth_net"}),
    (awml, "awml-lidar", "awml-lidar-masked", {"lidar", "bev"}),
    (awml, "awml-camera-lidar", "awml-image", {"camera.backbone", "camera.neck"}),
    (awml, "awml-camera", "awml-image", {"camera.backbone", "camera.neck"}),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "detector", "model", "taken"), STARTED)
def test_a_detector_starts_from_it_and_every_tensor_is_accounted_for(ran, recipe, detector, model, taken, capsys):
    config = config_of(recipe, detector, pretrained=(last(ran[model][0]),))
    made = recipe.task(config)
    started = assembly.initial(tasks.Run(made, config, tasks.plan(config, made.data.items)))
    stored = checkpoint.load_tensors(last(config_ran := ran[model][0]) / checkpoint.TENSORS)
    stored = {name: leaf for name, leaf in stored.items() if name.startswith(("params.", "state."))}
    count = 0
    for part, leaves, fresh in zip(("params", "state"), started, made.init()):
        initial = tree.flatten(fresh)
        for name, leaf in tree.flatten(leaves).items():
            is_taken = any(name == path or name.startswith(f"{path}.") for path in taken)
            count += is_taken
            assert torch.equal(leaf, stored[f"{part}.{name}"] if is_taken else initial[name]), name
    own = [name for name in stored if name.split(".")[1] == "pretext"]
    assert count + len(own) == len(stored) and own
    printed = capsys.readouterr().out
    assert f"{count} tensors from {last(config_ran)}, whose other {len(own)} served its pretraining alone" in printed
    assert "of head" in printed.replace("head.", "head ") and "at init" in printed


def test_bev_layers_of_another_width_are_refused_by_name(ran):
    files = tuple(last(ran[model][0]) for model in ("bevfusion-lidar-masked", "bevfusion-image"))
    config = config_of(bevfusion, "bevfusion-lidar-camera", pretrained=files)
    made = bevfusion.task(config)
    with pytest.raises(ValueError, match=r"bev.backbone.* is \[8, 72, 3, 3\] in .* but \[8, 16, 3, 3\]"):
        assembly.initial(tasks.Run(made, config, tasks.plan(config, made.data.items)))


def test_at_published_size_bev_layers_of_both_detectors_are_the_same():
    assert detectors.lidar_only().backbone == detectors.lidar_camera().backbone


def test_a_detector_without_the_branch_refuses_it(ran):
    config = config_of(bevfusion_lidar, "bevfusion-lidar", pretrained=(last(ran["bevfusion-image"][0]),))
    made = bevfusion_lidar.task(config)
    with pytest.raises(ValueError, match=r"camera.*which the model lacks: it is a checkpoint of another model"):
        assembly.initial(tasks.Run(made, config, tasks.plan(config, made.data.items)))


def test_a_detector_trains_from_it(ran, tmp_path):
    files, folder = (last(ran["bevfusion-lidar-masked"][0]),), tmp_path / "d"
    config = config_of(bevfusion_lidar, "bevfusion-lidar", pretrained=files, run_dir=folder, mode="performance")
    assert run.main(bevfusion_lidar.task, config)["steps"] == 2


def test_awmls_fusion_trains_from_both_branches_and_says_what_has_another_shape(ran, tmp_path, capsys):
    files = tuple(last(ran[model][0]) for model in ("awml-lidar-masked", "awml-image"))
    config = config_of(
        awml, "awml-camera-lidar", pretrained=files, run_dir=tmp_path / "d", mode="performance", clip_norm=35.0
    )
    assert run.main(awml.task, config)["steps"] == 2
    printed = capsys.readouterr().out
    assert "at init, params.lidar.conv_input.conv.weight is [3, 3, 3, 32, 8]" in printed  # Fourier features there
    assert all(f"tensors from {path}, whose other" in printed for path in files)


# ------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("model", pretrain.NETWORKS)
@pytest.mark.parametrize("kind", ["published", "synthetic"])
def test_readings_are_what_the_networks_take(model, kind):
    on = {"published": next(iter(pretrain.DEFAULTS[model].values()))} | pretrain.DEFAULTS[model]
    small_images = {"published_resize": False} if model.startswith("awml") else {}
    task = pretrain.task(replace(on[kind], data_root=root_of(model), scale="published", **small_images))
    tasks.check(task)
    for reading in (task.data.reading(0), task.data.eval_reading):
        assert (reading.points is None) == reading.depth == (not model.endswith("-masked"))
    assert not task.data.eval_reading.random and task.data.reading(0).random == (kind == "published")
    assert len(task.data.items) == len(task.data.training)  # not balanced by labels


def bare(index):
    """The index without a single annotation."""
    none = {"boxes": np.zeros((0, 9)), "valid": np.zeros(0, bool), "num_lidar_points": np.zeros(0, np.int64)}
    none |= dict.fromkeys(("names", "attributes", "visibility", "annotations"), ())
    return replace(index, frames=tuple(replace(frame, **none) for frame in index))


def test_masked_voxels_need_no_labels_and_read_none():
    splits = source.Source(bare(small_world.training()), bare(small_world.index()))
    config = config_of(pretrain, "bevfusion-lidar-masked")
    task = pretrain.task(config, splits)
    tasks.check(task)
    unlabelled = scene.load(splits.training, 0, task.data.eval_reading)
    assert unlabelled.counts["empty/boxes"] == 0
    labelled = scene.load(small_world.training(), 0, task.data.eval_reading)
    assert labelled.boxes.shape == (0, 9) and np.array_equal(labelled.points, unlabelled.points)
    for model in ("bevfusion-image", "bevfusion-camera-image"):
        with pytest.raises(ValueError, match="no annotations of the classes"):
            tasks.check(pretrain.task(config_of(pretrain, model), splits))


def test_the_flags_reach_the_losses():
    task = pretrain.task(config_of(pretrain, "bevfusion-lidar-masked", mask_ratios=(0.3, 0.2), mask_edges=(9.0,)))
    network = task.loss.keywords["config"]
    assert (network.ratios, network.edges) == ((0.3, 0.2), (9.0,)) == (
        task.predict.keywords["config"].ratios, task.predict.keywords["config"].edges
    )  # fmt: skip
    assert (
        pretrain.task(config_of(pretrain, "bevfusion-image", depth_loss=1.5)).loss.keywords["config"].depth_weight
        == 1.5
    )


def test_awmls_flags_reach_the_network_and_its_reading():
    network, wide = (
        pretrain.task(config_of(pretrain, "awml-lidar-masked", **how)).loss.keywords["config"].detector
        for how in ({"intensity": True, "scale": "mini"}, {"range_m": 60.0})
    )
    assert network.lidar.fourier.frequencies == 5 and wide.voxels.upper[0] == 60.0
    reach = (30.0, 30.0, 30.0, 20.0, 10.0)
    data = pretrain.task(config_of(pretrain, "awml-image", class_reach=reach)).data
    assert data.reading(0).class_reach == data.eval_reading.class_reach == reach
    assert pretrain.without_labels(replace(awml.TRAIN, class_reach=reach)).class_reach == ()  # of no classes


@pytest.mark.parametrize(
    ("model", "changes", "sentence"),
    [
        ("awml-image", {"fuser_kernel": 3}, "--fuser-kernel is of awml-camera-lidar, and awml-image has no fuser"),
        ("awml-image", {"intensity": True}, "--intensity is of awml-lidar, and what awml-image reads is fixed"),
        (
            "awml-lidar-masked",
            {"class_reach": (9.0,) * 5},
            "--class-reach is of boxes, and awml-lidar-masked reads none",
        ),
        (
            "awml-lidar-masked",
            {"data_root": "nuscenes"},
            "is no T4 data set.*but awml-lidar-masked is trained on T4 data",
        ),
        (
            "bevfusion-image",
            {"data_root": "t4"},
            "is a T4 data set, but bevfusion-image .* models of bevfn.experiments.awml",
        ),
    ],
)
def test_what_is_not_of_the_data_or_the_model_is_refused(model, changes, sentence):
    roots = {"nuscenes": small_world.index().root, "t4": small_t4_world.root()}
    changes = {name: roots.get(value, value) if name == "data_root" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=sentence):
        pretrain.task(config_of(pretrain, model, **changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mask_ratios": (1.0,), "mask_edges": ()}, "--mask-ratios 1 must be above 0 and below 1"),
        ({"mask_edges": (0.0, 5.0)}, "--mask-edges 0 must be above 0"),
        ({"mask_ratios": (0.5,)}, "ratios .* need one edge less"),
        ({"depth_loss": -1.0}, "--depth-loss -1 must be at least 0"),
    ],
)
def test_flags_that_mean_nothing_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrain.task(config_of(pretrain, "bevfusion-lidar-masked", **changes))
