"""`bevfn checkpoint export` of what was trained here: upstream's layout, and back bit for bit, for every layout."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import small_runs
import torch

import bevfn
from bevfn import catalogue, detector, tree, upstream
from bevfn.commands import checkpoint
from bevfn.upstream import checkpoints


def same(one: dict, other: dict) -> bool:
    a, b = tree.flatten(one), tree.flatten(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


OTHERS = ("bevdepth-1key", "bevdepth-2key", "bevdepth-4key")  # but for their first convolutions bevdepth-2key-da's


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (name in OTHERS)) for name in catalogue.LAYOUTS]
)
def test_a_trained_model_leaves_and_returns_bit_for_bit(layout, tmp_path, capsys):
    """At mini size; a published one is not told from it but by its numbers."""
    step = small_runs.write(tmp_path / "run", catalogue.LAYOUTS[layout])
    model = bevfn.load(step)
    checkpoint.export(step, tmp_path / "a.pth")
    said = capsys.readouterr().out
    assert f"tensors of {layout}" in said and "averaged weights; of mini size, which" in said
    again = said_call(said)
    assert (
        same(again.params, model.params) and again.reading == model.reading and again.task.network == model.task.network
    )
    found = upstream.read_state_dict(tmp_path / "a.pth")
    network = model.task.network
    params, state, report = upstream.import_state(found, layout, config=network)
    assert same(params, model.params) and same(state, model.state)
    assert not (report.missing or report.initial or report.mismatched or report.unknown or report.warnings)
    assert report.naming == checkpoints.naming(layout) and report.prefix == upstream.CHECKPOINTS[layout].prefix
    # every key that upstream's own file has, in its order
    keys = [entry.key for entry in checkpoints.entries(layout, report.naming, config=network)]
    keys += checkpoints.buffers(layout, report.naming, config=network)
    assert list(found) == [report.prefix + key for key in keys]
    again = upstream.export_state(
        params, state, layout, report.carried, config=network, naming=report.naming, prefix=report.prefix
    )
    assert list(again) == list(found) and all(torch.equal(again[key], found[key]) for key in found)


def test_weights_kernels_and_naming_are_chosen(tmp_path):
    folder = tmp_path / "run"
    step = small_runs.write(folder, "awml-camera-lidar")
    checkpoint.export(folder, tmp_path / "a.pth", averages=False, sparse="mmcv", naming="mmdet")
    found = upstream.read_state_dict(tmp_path / "a.pth")
    network = bevfn.load(step).task.network
    params, _, report = upstream.import_state(found, "awml-camera-lidar", config=network)
    assert (report.sparse, report.naming) == ("mmcv", "mmdet")
    assert same(params, bevfn.load(step, averages=False).params)
    assert not same(params, bevfn.load(step).params)


def said_call(said: str) -> detector.Detector:
    """The model that the command says how to load."""
    (call,) = re.findall(r"bevfn reads it by (bevfn\.load\(.*\))\n", said)
    return eval(call, {"bevfn": bevfn})


def test_a_run_in_another_shape_is_exported_where_the_layout_holds_it(tmp_path, capsys):
    """As of other data: the keys are the model's, the sizes its own."""
    step = small_runs.write(tmp_path / "run", "awml-lidar", range_m=60.0, intensity=True)
    checkpoint.export(step, tmp_path / "a.pth")
    model = bevfn.load(step)
    found = upstream.read_state_dict(tmp_path / "a.pth")
    assert same(upstream.import_state(found, "awml-lidar", config=model.task.network)[0], model.params)
    bounds = found["pts_middle_encoder.aug_features_max_values"]  # follow from the run's own range
    assert bounds[0] == pytest.approx(60.0)
    said = capsys.readouterr().out
    assert "scale='mini'" in said and "range_m=60.0" in said and "batch_size" not in said  # which no network is of
    assert same(said_call(said).params, model.params) and said_call(said).reading == model.reading
    with pytest.raises(ValueError, match=r"a\.pth: the checkpoint does not fit --model awml-lidar: ") as refusal:
        bevfn.load(tmp_path / "a.pth")
    assert "mini size" not in str(refusal.value)  # nor that of published classes and range


def test_a_file_of_mini_size_is_refused_with_the_flag_that_reads_it(tmp_path):
    step = small_runs.write(tmp_path / "run", "bevfusion-lidar")
    checkpoint.export(step, tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"it lacks .*; it is of mini size, which `bevfn\.load\('.*', scale='mini'\)` reads"
    ):
        bevfn.load(tmp_path / "a.pth")
    assert same(bevfn.load(tmp_path / "a.pth", scale="mini").params, bevfn.load(step).params)


@pytest.mark.parametrize("model", ["bevfusion-image", "bevfusion-lidar-masked", "bevfusion-camera"])
def test_a_model_that_upstream_does_not_have_is_refused(model, tmp_path):
    step = small_runs.write(tmp_path / "run", model)
    with pytest.raises(
        ValueError, match=f"is a {model}, of which no published layout holds all; those that do are of bevf"
    ):
        checkpoint.export(step, tmp_path / "a.pth")
    assert not (tmp_path / "a.pth").exists()


def test_what_an_export_cannot_be_is_one_sentence(tmp_path):
    step = small_runs.write(tmp_path / "run", "bevfusion-lidar")
    with pytest.raises(ValueError, match=r"bevfusion-lidar has no naming net; its files have mmdet"):
        checkpoint.export(step, tmp_path / "a.pth", naming="net")
    with pytest.raises(ValueError, match=r"a\.onnx: the name must end in \.pth or \.safetensors"):
        checkpoint.export(step, tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=r"none.safetensors is not there"):
        checkpoint.export(Path(tmp_path / "none.safetensors"), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="this command is of published files"):
        checkpoint.show(step)
    assert not (tmp_path / "a.pth").exists()


@pytest.mark.slow
def test_published_sizes_are_the_released_ones():
    """Without memory: a run at published size has every key of the published file in its shape."""
    for layout, name in catalogue.LAYOUTS.items():
        config = replace(small_runs.config(name), scale="published")
        network = small_runs.task(config).network
        ours = checkpoints.entries(layout, checkpoints.naming(layout), config=network)
        assert ours == checkpoints.entries(layout, checkpoints.naming(layout)), layout
