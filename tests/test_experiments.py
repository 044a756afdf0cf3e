"""The recipes of experiments/: published numbers, consistent models, what they read, and one key frame end to end."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_world
import torch
from helps import helped
from nuscenes_counts import STEPS

from bevfn import catalogue, recipes, tree, upstream
from bevfn.data import paste
from bevfn.data.reading import CLASS_NAMES
from bevfn.experiments import bevfusion, bevfusion_lidar
from bevfn.metrics import read_metrics
from bevfn.models import bevdepth as bevdepth_model
from bevfn.models import bevfusion as bevfusion_model
from bevfn.synth import key_frame
from bevfn.training import assembly, checkpoint, optim, pretrained, run, tasks, train

EXPERIMENTS = {"bevfusion-lidar-camera": bevfusion, "bevfusion-camera": bevfusion, "bevfusion-lidar": bevfusion_lidar}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return small_world.index().root


def small(model: str, root: Path, **changes):
    """The published recipe on the small world."""
    config = replace(EXPERIMENTS[model].DEFAULTS[model]["nuscenes"], data_root=root)
    return replace(config, **{**({"paste": False} if model == "bevfusion-lidar" else {}), **changes})


@pytest.mark.parametrize("model", EXPERIMENTS)
@pytest.mark.parametrize("scale", ["published", "mini"])
def test_every_model_and_scale_reads_what_it_takes(model, scale, root):
    task = EXPERIMENTS[model].task(small(model, root, scale=scale))
    reading = task.data.reading(0)
    assert (reading.cameras is not None) == (model != "bevfusion-lidar")
    assert reading.points.sweeps == 9 and reading.random and not task.data.eval_reading.random
    if reading.cameras is not None:
        assert reading.cameras.image_size == ((256, 704) if scale == "published" else (64, 192))
        width = reading.cameras.image_size[1]  # which is what an image has least of
        assert reading.cameras.relative((900, 1600)) == pytest.approx(width / 704)
    tasks.check(task)
    assert len(task.data.items) > len(task.data.training)  # class-balanced


def optimizer(model, root, total, **changes):
    config = small(model, root, **changes)
    plan = tasks.Plan(steps_per_epoch=total, total_steps=total, batch=config.recipe_batch)
    return bevfusion.optimizer(config, plan)


def test_the_optimizers_are_the_published_ones(root):
    lidar, fusion = optimizer("bevfusion-lidar", root, 20_000), optimizer("bevfusion-lidar-camera", root, 6_000)
    at = [float(lidar.lr.at(torch.tensor(s))) for s in (0, 8_000, 19_999)]
    assert (
        at[0] == pytest.approx(1e-4)
        and at[1] == pytest.approx(1e-3, rel=1e-4)
        and at[2] == pytest.approx(1e-8, rel=0.1)
    )
    at = [float(fusion.lr.at(torch.tensor(s))) for s in (0, 600, 5_999)]
    assert at[0] == pytest.approx(2e-4 / 3, rel=1e-3) and at[2] == pytest.approx(2e-8, rel=0.01)
    assert at[1] == pytest.approx(2e-4 * (1 + np.cos(np.pi * 0.1)) / 2, rel=1e-3)
    for made, turn in ((lidar, 8_000), (fusion, 2_400)):
        assert float(made.beta1.at(torch.tensor(turn))) == pytest.approx(0.85 / 0.95, rel=1e-3)
        assert (made.weight_decay, made.clip_norm, made.groups) == (0.01, 35.0, ())


def test_on_the_synthetic_world_both_models_train_with_the_same_numbers():
    # Their scores at equal steps are compared (experiments/results/world_bevfusion.json): only sensors may differ.
    both = [EXPERIMENTS[model].DEFAULTS[model]["synthetic"] for model in ("bevfusion-lidar-camera", "bevfusion-lidar")]
    plan = tasks.Plan(steps_per_epoch=70, total_steps=630, batch=2)
    assert bevfusion.optimizer(both[0], plan) == bevfusion.optimizer(both[1], plan)
    # --lr is given, so recipe_lr has no effect
    own = {"model", "recipe_lr", "run_dir", "paste", "paste_off", "image_backbone_lr"}
    assert both[0].lr is not None and not both[1].paste and both[0].image_backbone_lr == 1.0
    fields = {f.name for f in dataclasses.fields(both[0])} - own
    assert {n for n in fields if getattr(both[0], n) != getattr(both[1], n)} == set()


def test_published_numbers_of_the_recipes():
    fusion, lidar = (
        bevfusion.DEFAULTS["bevfusion-lidar-camera"]["nuscenes"],
        bevfusion_lidar.DEFAULTS["bevfusion-lidar"]["nuscenes"],
    )
    assert (fusion.epochs, lidar.epochs) == (6, 20) and (fusion.eval_every, lidar.eval_every) == (1, 5)
    assert all(c.batch_size == 4 and c.recipe_batch == 32 and c.scale == "published" for c in (fusion, lidar))
    assert lidar.paste and lidar.paste_off == 5 and fusion.ema is None and not fusion.sync_statistics


def test_the_warm_up_is_as_long_as_published_in_any_run_that_is_longer(root):
    for steps, warmup in ((STEPS, 500), (501, 500), (500, 50), (40, 4)):
        made = optimizer("bevfusion-lidar-camera", root, steps)
        assert made.lr.warmup_steps == warmup


def test_multipliers_and_frozen_parts_become_optimizer_groups(root):
    made = optimizer("bevfusion-lidar-camera", root, 10, image_backbone_lr=0.1, frozen=("lidar.*",))
    assert [(g.pattern, g.lr, g.frozen) for g in made.groups] == [
        ("lidar.*", 1.0, True), ("camera.backbone.*", 0.1, False),
    ]  # fmt: skip


def test_pasting_ends_with_the_last_epochs_and_needs_its_database(root):
    config = small("bevfusion-lidar", root, paste=True)
    with pytest.raises(ValueError, match="bevfn data prepare"):
        bevfusion_lidar.task(config)
    index = bevfusion_lidar.task(replace(config, paste=False)).data.training
    paste.build(index, paste.folder(index), class_names=CLASS_NAMES, progress=False)
    data = bevfusion_lidar.task(config).data
    assert data.database is not None
    assert [data.reading(epoch).paste is not None for epoch in (0, 14, 15, 19)] == [True, True, False, False]


def test_a_database_made_otherwise_than_the_run_reads_is_refused(root):
    config = small("bevfusion-lidar", root, paste=True)
    index = bevfusion_lidar.task(replace(config, paste=False)).data.training
    paste.build(index, paste.folder(index), class_names=CLASS_NAMES, making=paste.Making(False, True), progress=False)
    with pytest.raises(ValueError, match=r"with --no-published-sweeps, but the run has --published-sweeps"):
        bevfusion_lidar.task(config)
    assert bevfusion_lidar.task(replace(config, published_sweeps=False)).data.database is not None
    paste.build(index, paste.folder(index), class_names=CLASS_NAMES, progress=False)
    assert bevfusion_lidar.task(config).data.database.making == paste.Making()


@pytest.mark.parametrize("model", EXPERIMENTS)
@pytest.mark.parametrize("published", [True, False])
def test_training_and_evaluation_move_sweeps_as_the_flag_says(model, published, root):
    data = EXPERIMENTS[model].task(small(model, root, published_sweeps=published)).data
    assert data.reading(0).points.published_sweeps == data.eval_reading.points.published_sweeps == published
    assert EXPERIMENTS[model].DEFAULTS[model]["nuscenes"].published_sweeps
    assert not EXPERIMENTS[model].DEFAULTS[model]["synthetic"].published_sweeps


def test_another_number_of_sweeps_than_the_published_takes_the_newest_in_training_too(root):
    for sweeps, choice in ((9, "random"), (4, "newest")):
        data = bevfusion_lidar.task(small("bevfusion-lidar", root, sweeps=sweeps)).data
        assert data.reading(0).points.sweep_choice == choice and data.eval_reading.points.sweep_choice == "newest"


# ----------------------------------------------------------------------------------------------------- one key frame


@pytest.fixture(scope="module")
def frame_run(tmp_path_factory):
    folder = key_frame.write_frame(tmp_path_factory.mktemp("frame"))
    config = replace(
        bevfusion_lidar.DEFAULTS["bevfusion-lidar"]["frame"], scale="mini", backend="eager", steps=2, data_root=folder,
        run_dir=tmp_path_factory.mktemp("run") / "demo",
    )  # fmt: skip
    return config, run.main(bevfusion_lidar.task, config)


def test_a_frames_run_leaves_metrics_checkpoint_picture_and_summary(frame_run):
    config, summary = frame_run
    names = {path.name for path in config.run_dir.iterdir()}
    assert names >= {"metrics.jsonl", "tensorboard", "checkpoints", "evaluations", "summary.json", "config.json"}
    assert json.loads((config.run_dir / "summary.json").read_text()) == summary
    steps = read_metrics(config.run_dir)
    assert [step["step"] for step in steps] == [1, 2]
    assert steps[0]["loss/total"] == pytest.approx(summary["first_loss"], rel=1e-6)
    assert {"overflow/points", "overflow/voxels_l0", "grad_norm", "lr"} <= steps[0].keys()
    assert summary["scores_before"].keys() >= {"recall"} and summary["scores"].keys() >= {"recall"}
    assert list((config.run_dir / "evaluations" / "step_00000002").glob("*.png"))


def test_a_run_starts_from_another_runs_checkpoint(frame_run):
    config, _ = frame_run
    folder = config.run_dir / "checkpoints" / "step_00000002"
    again = replace(config, seed=1, pretrained=(folder,))
    task = bevfusion_lidar.task(again)
    params, state = assembly.initial(tasks.Run(task, again, tasks.plan(again, task.data.items)))
    stored = checkpoint.load_tensors(folder / checkpoint.TENSORS)
    flat = {f"params.{k}": v for k, v in tree.flatten(params).items()}
    flat |= {f"state.{k}": v for k, v in tree.flatten(state).items()}
    assert all(torch.equal(leaf, stored[name]) for name, leaf in flat.items())
    # Aligned as a trained model's: products of tensors that lie where they lay in a file are rounded otherwise.
    assert all(leaf.data_ptr() % 64 == 0 for part in pretrained.read_weights(folder) for leaf in tree.leaves(part))


def test_a_lidar_only_detector_starts_a_lidar_camera_model(root, tmp_path):
    made = bevfusion_lidar.task(small("bevfusion-lidar", root))
    params, state = made.init()
    params["head"]["shared"]["bias"].fill_(0.5)
    exported = upstream.export_state(params, state, "bevfusion-lidar", {})
    path = tmp_path / "lidar.safetensors"
    upstream.write_imported(path, *upstream.import_state(exported, "bevfusion-lidar"), source="test")
    config = small("bevfusion-lidar-camera", root, pretrained=(path,))
    task = bevfusion.task(config)
    merged, _ = assembly.initial(tasks.Run(task, config, tasks.plan(config, task.data.items)))
    assert (merged["head"]["shared"]["bias"] == 0.5).all() and "camera" in merged


def test_a_later_backend_is_refused_before_anything_is_read(frame_run):
    config, _ = frame_run
    task = bevfusion_lidar.task(config)
    with pytest.raises(ValueError, match="torchair"):
        assembly.build(tasks.Run(task, replace(config, backend="torchair"), tasks.plan(config, task.data.items)))


@pytest.mark.parametrize("experiment", catalogue.EXPERIMENTS)
def test_every_flag_has_a_help_text(experiment):
    config = type(recipes.published(experiment))
    text = helped(config)
    for field in dataclasses.fields(config):
        assert f"--{field.name.replace('_', '-')}" in text or f"--no-{field.name.replace('_', '-')}" in text
    assert experiment != "bevfusion_lidar" or "camera" not in text


@pytest.mark.parametrize(
    ("family", "model"),
    [(bevfusion_model, bevfusion_model.lidar_camera()), (bevdepth_model, bevdepth_model.two_key_aggregated()),
     (bevdepth_model, bevdepth_model.matrix_vt())],
)  # fmt: skip
def test_every_batch_norm_of_a_frozen_part_is_held(family, model):
    params, state = family.init(family.mini(model), seed=0)
    for part in params:
        norms = {path.rpartition(".")[0] for path in tree.flatten(state) if path.startswith(f"{part}.")}
        frozen = optim.Config(optim.Schedule(1.0), groups=(optim.Group(f"{part}.*", frozen=True),))
        assert train.held(frozen, params, state) == norms
    assert train.held(optim.Config(optim.Schedule(1.0)), params, state) == set()
