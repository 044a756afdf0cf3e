"""The recipe from the command line's config to its files, on a generated frame."""

import json

import pytest
import torch

from bevfn import checkpoint, report, tree
from bevfn.experiments import bevfusion as experiment


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = experiment.Config(
        modality="lidar", scale="mini", backend="eager", steps=2, run_dir=tmp_path_factory.mktemp("run") / "demo"
    )
    return config, experiment.main(config)


def test_a_run_leaves_metrics_checkpoint_picture_and_summary(run):
    config, summary = run
    names = {path.name for path in config.run_dir.iterdir()}
    assert names >= {"metrics.jsonl", "tensorboard", "checkpoints", "detections.png", "summary.json"}
    assert json.loads((config.run_dir / "summary.json").read_text()) == summary
    steps = report.read_metrics(config.run_dir)
    assert [step["step"] for step in steps] == [1, 2]
    assert steps[0]["loss/total"] == pytest.approx(summary["first_loss"], rel=1e-6)
    assert {"overflow/points", "overflow/voxels_l0", "grad_norm", "lr"} <= steps[0].keys()


def test_the_checkpoint_of_a_run_loads_into_a_fresh_train_state(run):
    config, _ = run
    model = experiment.model_config(config)
    fresh, _ = experiment.build(config, model)
    loaded, meta = checkpoint.load_step(config.run_dir / "checkpoints" / "step_00000002", fresh)
    assert meta["step"] == 2 and int(loaded.step) == 2
    assert not torch.equal(loaded.params["head"]["shared"]["weight"], fresh.params["head"]["shared"]["weight"])


@pytest.mark.parametrize("modality", ["lidar-camera", "lidar", "camera"])
@pytest.mark.parametrize("scale", ["published", "mini"])
def test_every_modality_and_scale_has_a_consistent_model(modality, scale):
    model = experiment.model_config(experiment.Config(modality=modality, scale=scale))
    assert (model.camera is None) == (modality == "lidar") and (model.lidar is None) == (modality == "camera")


def test_the_recipes_run_through_their_published_schedules():
    lidar = experiment.recipe(experiment.Config(modality="lidar", steps=100, lr=None))
    fusion = experiment.recipe(experiment.Config(steps=1000, lr=None))
    at = [float(lidar.lr.at(torch.tensor(s))) for s in (0, 40, 99)]
    assert at[0] == pytest.approx(1e-4) and at[1] == pytest.approx(1e-3, rel=0.01) and at[2] < 2e-6
    assert float(fusion.lr.at(torch.tensor(0))) == pytest.approx(2e-4 / 3, rel=1e-3)
    assert float(lidar.beta1.at(torch.tensor(40))) == pytest.approx(0.85 / 0.95, rel=1e-3)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="--data-root"):
        experiment.Config(data="frame")
    with pytest.raises(ValueError, match="--steps 0"):
        experiment.Config(steps=0)
    with pytest.raises(ValueError, match="torchair"):
        experiment.step_of(experiment.Config(scale="mini", modality="lidar", backend="torchair"))


def test_a_run_starts_from_another_runs_checkpoint(run):
    config, _ = run
    again = experiment.Config(
        modality="lidar", scale="mini", seed=1, pretrained=(config.run_dir / "checkpoints" / "step_00000002",)
    )
    params, state = experiment.initial(again, experiment.model_config(again))
    stored = checkpoint.load_tensors(config.run_dir / "checkpoints" / "step_00000002" / checkpoint.TENSORS)
    flat = {f"params.{k}": v for k, v in tree.flatten(params).items()}
    flat |= {f"state.{k}": v for k, v in tree.flatten(state).items()}
    assert all(torch.equal(leaf, stored[name]) for name, leaf in flat.items())


def test_a_lidar_only_detector_starts_a_lidar_camera_model(tmp_path):
    from bevfn import upstream

    lidar_config = experiment.Config(modality="lidar")
    params, state = experiment.initial(lidar_config, experiment.model_config(lidar_config))
    params["head"]["shared"]["bias"].fill_(0.5)
    exported = upstream.export_state(params, state, "bevfusion-lidar", {})
    path = tmp_path / "lidar.safetensors"
    again = upstream.import_state(exported, "bevfusion-lidar")
    upstream.write_imported(path, *again, source="test")
    config = experiment.Config(pretrained=(path,))
    merged, _ = experiment.initial(config, experiment.model_config(config))
    assert (merged["head"]["shared"]["bias"] == 0.5).all()
    assert "camera" in merged
