"""`bevfn.load`: one object from wherever weights lie, with a run's own recipe; and what it refuses in one sentence."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import small_runs
import small_weights
import torch

import bevfn
from bevfn import catalogue, detector, tree, upstream
from bevfn.data import scene
from bevfn.data.batch import collate
from bevfn.synth import key_frame
from bevfn.training import checkpoint, located, run_folder

LIDAR = "bevfusion-lidar"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two steps, the first of which scored best."""
    folder = tmp_path_factory.mktemp("run") / "run"
    first = small_runs.write(folder, LIDAR, sweeps=1, published_sweeps=False)
    leaves = checkpoint.read(first)
    leaves["params.head.shared.bias"] += 1.0
    checkpoint.save_step(first.with_name(run_folder.step_name(2)), leaves, {"step": 2})
    checkpoint.keep_best(first.parent, first.name, 0.5)
    return folder


@pytest.fixture(scope="module")
def frame(tmp_path_factory) -> Path:
    return key_frame.write_frame(tmp_path_factory.mktemp("frame"), image_size=(90, 160))


def same(one: dict, other: dict) -> bool:
    a, b = tree.flatten(one), tree.flatten(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_importing_bevfn_loads_no_torch_and_offers_load():
    code = "import sys, bevfn; print('torch' in sys.modules, callable(bevfn.load))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False True"


@pytest.mark.parametrize(
    "inside, step", [("", 1), ("best", 1), ("checkpoints", 1), ("checkpoints/best", 1), ("checkpoints/best.json", 1),
                     ("latest", 2), ("checkpoints/step_00000002", 2)],
)  # fmt: skip
def test_a_run_its_best_its_latest_and_a_step_are_found(trained, inside, step):
    assert located.whole(trained / inside) == trained / "checkpoints" / run_folder.step_name(step)


def test_a_run_is_loaded_with_its_recipe_and_its_averages(trained):
    model = bevfn.load(trained)
    config = small_runs.config(LIDAR, sweeps=1, published_sweeps=False)
    params, state = small_runs.weights(config)
    assert same(model.params, tree.map(lambda leaf: 0.75 * leaf, params)) and same(model.state, state)
    plain = bevfn.load(trained, averages=False)
    assert same(plain.params, params) and (model.averaged, plain.averaged) == (True, False)
    assert model.reading.points is not None and model.reading.points.sweeps == 1
    assert not model.reading.points.published_sweeps and model.classes == model.reading.class_names
    assert bevfn.load(trained, published_sweeps=True).reading.points.published_sweeps
    with pytest.raises(FrozenInstanceError):
        model.params = {}


def test_predict_is_the_tasks_own_and_detect_reads_the_frame(trained, frame):
    model = bevfn.load(trained)
    index = detector.inputs.read(frame)
    batch, _ = collate([scene.load(index, 0, model.reading)], capacities=model.reading.capacities)
    outputs = model.predict(batch)
    (found,) = model.detect(frame).values()
    assert np.array_equal(found.boxes, outputs["boxes"][0][outputs["valid"][0]].numpy()) and found.boxes.shape[1] == 9
    assert same(model.task.predict(model.params, model.state, batch), outputs)


def test_clouds_of_other_columns_are_read_by_detect_and_sample(trained, frame, tmp_path):
    model, rows = bevfn.load(trained), np.fromfile(frame / key_frame.LIDAR_FILE, "<f4").reshape(-1, 5)
    for name, count in (("five", 5), ("four", 4)):
        (tmp_path / name).mkdir()
        rows[:, :count].tofile(tmp_path / name / "a.bin")
    (usual,) = model.detect(tmp_path / "five").values()
    (found,) = model.detect(tmp_path / "four", columns="x y z intensity").values()
    assert np.array_equal(found.boxes, usual.boxes) and len(found.boxes) > 10
    sample = model.sample(tmp_path / "four", columns="x y z intensity")
    assert np.array_equal(sample.points, model.sample(tmp_path / "five").points)
    with pytest.raises(ValueError, match="which fits four float32 a point"):
        model.sample(tmp_path / "four")


def test_a_published_file_is_imported_on_the_fly_as_the_imported_one(tmp_path, monkeypatch):
    """At mini size, whose shapes the recipe's flag says."""
    model = small_runs.config(LIDAR)
    params, state = small_runs.weights(model)
    network = small_runs.task(model).network
    exported = upstream.export_state(params, state, LIDAR, {}, config=network)
    for name in ("a.pth", "b.safetensors"):
        upstream.write_state_dict(tmp_path / name, exported, sparse="spconv2")
        made = bevfn.load(tmp_path / name, scale="mini")
        assert same(made.params, params) and same(made.state, state) and made.config.model == LIDAR
        assert made.config.sweeps == 9 and not made.config.augment and not made.averaged
    *trees, report = upstream.import_state(exported, LIDAR, config=network)
    upstream.write_imported(tmp_path / "c.safetensors", *trees, report, source="a.pth")
    assert same(bevfn.load(tmp_path / "c.safetensors", scale="mini").params, params)
    with pytest.raises(ValueError, match=r"a\.pth: the checkpoint does not fit --model bevfusion-lidar: "):
        bevfn.load(tmp_path / "a.pth")


def test_a_layout_of_a_whole_model_names_its_first_model():
    assert set(catalogue.LAYOUTS) == set(catalogue.CHECKPOINTS) - set(catalogue.PARTS)
    assert catalogue.LAYOUTS["bevfusion-lidar"] == "bevfusion-lidar" and catalogue.LAYOUTS["matrixvt"] == "matrixvt"
    assert catalogue.LAYOUTS["bevdepth-1key"] == "bevdepth-1key-ema"
    assert catalogue.MODELS["bevfusion-camera"].layout is None


def test_flags_of_a_release_of_awml_are_told_by_its_shapes():
    from bevfn.experiments import awml
    from bevfn.models import awml as networks

    assert awml.released(networks.lidar(intensity=True), "awml-lidar") == {"intensity": True}
    assert awml.released(networks.lidar(), "awml-lidar") == {"intensity": False}
    assert awml.released(networks.camera_lidar(fuser_kernel=3), "awml-camera-lidar") == {"fuser_kernel": 3}


# --- refusals ----------------------------------------------------------------------------------------------------


def refused(says: str, path: Path, **flags) -> None:
    with pytest.raises(ValueError, match=says):
        bevfn.load(path, **flags)


def test_a_path_without_weights_is_one_sentence(trained, frame, tmp_path):
    refused(r"none.pth is not there", tmp_path / "none.pth")
    refused("is not a training checkpoint: it has no meta.json", frame)
    refused(r"frame\.json", frame / "frame.json")
    (tmp_path / "checkpoints").mkdir()
    refused("holds no whole checkpoint; give a run's folder with checkpoints", tmp_path)
    refused("has no best checkpoint; give a run's", tmp_path / "best")


def test_a_checkpoint_of_another_model_is_named(trained, tmp_path):
    refused(r"config\.json is of another experiment", trained, model="bevfusion-lidar-camera")
    refused("bevdepth-9key is unknown; choose one of bevfusion-lidar-camera", trained, model="bevdepth-9key")
    refused("has no such flag; leave out --turns", trained, turns=3)
    other = small_runs.write(tmp_path / "other", LIDAR)
    stored = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(stored | {"scale": "published"}))
    refused("does not fit bevfusion-lidar, published size: .* more differences", other)
    refused(
        r"step_00000001 \(of bevfusion-lidar, mini size\) does not fit bevfusion-lidar, published size: .*: float32 .* in the "
        "checkpoint, float32 .* in bevfusion-lidar, published size",
        trained,
        scale="published",
    )


def test_a_step_that_left_its_run_needs_its_model_named(trained, tmp_path):
    step = tmp_path / "step_00000001"
    step.symlink_to(trained / "checkpoints" / "step_00000001")
    refused(r"lies in no run folder that names its model \(.*config\.json\); name the model", step)
    assert same(bevfn.load(step, model=LIDAR, scale="mini").params, bevfn.load(trained).params)


def test_a_part_and_a_foreign_model_are_no_detectors(tmp_path):
    torch.save(small_weights.upstream_state("resnet50"), tmp_path / "part.pth")
    refused("part.pth is resnet50, a part that models start from", tmp_path / "part.pth")
    torch.save({"pts_bbox_head.x.weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    refused(
        "looks like a detector of the CenterPoint or BEVDet family, which is no detector that bevfn reads",
        tmp_path / "foreign.pth",
    )


def test_a_pretraining_detects_nothing(tmp_path, frame):
    model = bevfn.load(small_runs.write(tmp_path / "run", "bevfusion-lidar-masked"))
    with pytest.raises(ValueError, match="is a pretraining of bevfusion-lidar-masked, which detects nothing"):
        model.detect(frame)


def test_t4_images_are_read_as_what_lies_there_is(trained):
    model = bevfn.load(trained)
    assert model.at(None).config.data_root is None and model.at(Path("x")).config == replace(
        model.config, data_root=Path("x")
    )


# --- in a notebook ------------------------------------------------------------------------------------------------


def test_a_detector_reads_batches_and_names_its_boundaries(trained, frame):
    model = bevfn.load(trained)
    sample = model.sample(frame)
    batch = model.batch(sample, sample)
    outputs = model.outputs(batch)
    assert {"lidar.bev", "head.dense_heatmap", "bev.neck"} <= set(tree.flatten(outputs))
    assert same(model.task.decode(outputs), model.predict(batch))
    with pytest.raises(ValueError, match="has 1 key frames; 1 is none of them"):
        model.sample(frame, 1)
    few = replace(model, config=replace(model.config, point_capacity=100))
    with pytest.warns(UserWarning, match="overflow/points: .* points did not fit"):
        assert few.batch(sample).points.shape[1] == 100


def test_predictions_have_gradients(trained, frame):
    model = bevfn.load(trained)
    batch = model.batch(model.sample(frame))

    def size(points):
        return model.predict(replace(batch, points=points))["boxes"][..., 3:6].sum()

    assert float(torch.func.grad(size)(batch.points).abs().sum()) > 0


def test_reprs_are_a_line_without_numbers(trained, frame):
    model = bevfn.load(trained)
    assert repr(model).startswith("Detector bevfusion-lidar, mini size: ") and repr(model).endswith("step_00000001")
    sample = model.sample(frame)
    batch = model.batch(sample, sample)
    count = len(sample.points)
    assert repr(sample) == f"Sample {sample.token} (lidar): {count:,} points, {len(sample.boxes)} boxes"
    assert repr(batch) == (
        f"Batch of 2 (lidar): {count:,} + {count:,} of {batch.points.shape[1]:,} points, "
        f"{len(sample.boxes)} + {len(sample.boxes)} of 160 boxes"
    )
    said = []
    torch.func.vmap(lambda one: said.append(repr(replace(batch, **one))) or one["points"].sum())(tree.flatten(batch))
    assert said == ["Batch, one sample of it (lidar): 70,000 points, 160 boxes"]
    assert "Batch of 2 (lidar): 70,000 points" in repr(batch.to("meta"))
