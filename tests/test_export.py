"""`bevfn export`: an ONNX file that onnxruntime runs as the eager detector, what lies beside it, and what is refused."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import small_exports
import small_runs
import torch
from PIL import Image
from small_exports import LIDAR, export, flow_of, refused, shown

import bevfn
from bevfn import geometry, tree
from bevfn.data.reading import Points, Reading
from bevfn.export import build, flow, manifest, translations, verify
from bevfn.export import onnx as writer
from bevfn.kernels.voxelize import voxelize
from bevfn.parity import golden
from bevfn.synth import key_frame

# --- operators: graphs of a few nodes, in onnxruntime as in torch


def computed(step, *given: torch.Tensor, folder: Path) -> list[np.ndarray]:
    made = flow_of(step, *given, table=writer.table())
    writer.write(made, folder / "op.onnx")
    return list(verify.run(folder / "op.onnx", {name: value.numpy() for name, value in made.inputs.items()}).values())


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


CASES = {
    # 153391691 // 7 is right beyond 2^24, where torch.onnx's float32 is not
    "floor": (lambda x: [torch.div(x, 7, rounding_mode="floor")], [ints(7 * 16777217 + 3, 2**30 + 13, -15, -14, 0)]),
    "floor by a tensor": (lambda x, y: [torch.div(x, y, rounding_mode="floor")], [ints(-15, 15, -14), ints(4, -4, 7)]),
    "trunc": (lambda x: [torch.div(x, 7, rounding_mode="trunc")], [ints(7 * 16777217 + 3, -15, 15)]),
    "operator": (lambda x: [x // 7, x % 7], [ints(7 * 16777217 + 3, 2**30 + 13, -15)]),
    "index_add": (lambda x, i, y: [x.index_add(0, i, y)], [torch.zeros(4, 2), ints(1, 3, 1), torch.rand(3, 2)]),
    "index_add of integers": (
        lambda x, i, y: [x.index_add(0, i, y)],
        [ints(0, 0, 2**30), ints(2, 0, 2), ints(1, 2, 3)],
    ),
    "index_add of halves": (
        lambda x, i, y: [x.index_add(0, i, y)],
        [torch.zeros(4).half(), ints(1, 3, 1), torch.tensor([1.0, 2.0, 3.0]).half()],
    ),
    "index of int32": (lambda x, i: [x[i], x[:, i[:1]]], [torch.rand(4, 2), ints(1, 0, 1)]),
    "index_put of int32": (
        lambda x, i, y: [x.index_put([i], y), x.index_put([i, i[[1]]], y[:, 0])],
        [torch.zeros(4, 4), ints(1, 3, 0), torch.rand(3, 4)],
    ),
    "index_put that adds": (
        lambda x, i, y: [x.index_put([i], y, accumulate=True), x.index_put([i, i], y[:, 0], accumulate=True)],
        [torch.ones(4, 4), ints(1, 3, 1), torch.rand(3, 4)],
    ),
    "index_put that adds halves": (
        lambda x, i, y: [x.index_put([i], y, accumulate=True)],
        [torch.zeros(4).half(), ints(1, 3, 1), torch.tensor([1.0, 2.0, 3.0]).half()],
    ),
    "sort": (lambda x: torch.sort(x, dim=1, stable=True), [torch.tensor([[3, 1, 2**24 + 1, 1, 2**24, 3]])]),
    "falling sort of an outer axis": (
        lambda x: torch.sort(x, dim=0, stable=True, descending=True),
        [torch.tensor([[3.0, 1.0], [3.0, 2.0], [4.0, 1.0]])],
    ),
    "clamp with an integer and a float": (
        lambda x: [x.clamp(0, 1e6), x.clamp(min=1)],
        [torch.tensor([-1.5, 2e6, 3.0])],
    ),
    "sum of integers": (lambda x: [x.sum(1), x.cumsum(1)], [torch.tensor([[2**24, 1, 1]], dtype=torch.int32)]),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_translated_as_torch_computes_it(name, tmp_path):
    step, given = CASES[name]
    found, expected = computed(step, *given, folder=tmp_path), step(*given)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert ours.dtype == theirs.numpy().dtype and np.array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("name", ["floor", "index_add", "index of int32", "index_put of int32", "sort"])
def test_torchs_own_translation_is_still_wrong(name, tmp_path, monkeypatch):
    """Or ours can go."""
    monkeypatch.setattr(translations, "TABLE", {})
    monkeypatch.setattr(translations, "DECOMPOSITIONS", {})
    step, given = CASES[name]
    try:
        found = computed(step, *given, folder=tmp_path)
    except (ValueError, RuntimeError, onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph):
        return
    assert not np.array_equal(found[0], step(*given)[0].numpy())


def test_voxels_and_depth_maps_are_the_operators_bit_for_bit(tmp_path):
    """Sorted as bits of floats on Ascend, as integers here; equal cells keep their points' order."""
    drawn = torch.Generator().manual_seed(0)
    points = torch.rand(1, 300, 5, generator=drawn) * 4
    points[0, 5, 3] = float("nan")
    how = {"lower": (0.0, 0.0, 0.0), "size": (1.0, 1.0, 1.0), "grid": (4, 3, 4), "max_points": 3, "max_voxels": 30}

    def voxels(points, valid):
        return voxelize(points, valid, **how)

    valid = torch.rand(1, 300, generator=drawn) < 0.9
    found = computed(voxels, points, valid, folder=tmp_path)
    for ours, theirs in zip(found[1:], voxels(points, valid)[1:]):
        assert np.array_equal(ours, theirs.numpy())
    assert np.allclose(found[0], voxels(points, valid)[0].numpy(), rtol=1e-6)

    def depths(u, v, depth, valid):
        return [geometry.depth_map((u, v, depth), valid, (4, 6))]

    planes = [torch.rand(1, 2, 40, generator=drawn) * 7 for _ in range(3)]
    (made,) = computed(depths, *planes, valid[:, :40], folder=tmp_path)
    assert np.array_equal(made, depths(*planes, valid[:, :40])[0].numpy())


def test_an_operator_without_a_translation_is_named_with_its_layer_and_line(tmp_path):
    def layer(x):
        return [x.view(torch.int32)]

    with pytest.raises(ValueError, match=r"no translation of aten\.view\.dtype, at .*test_export\.py:\d+ in .*layer"):
        computed(layer, torch.eye(3), folder=tmp_path)
    assert not list(tmp_path.iterdir())


REFUSED = {  # translated, but of other arguments
    "index_add.default with these arguments (index_add is translated along the first axis and without a factor), at": (
        lambda x: [x.index_add(1, torch.tensor([0, 2]), x[:, :2])]
    ),
    "div.Tensor_mode with these arguments (div with a rounding mode is translated of integers), at": (
        lambda x: [torch.div(x, 7.0, rounding_mode="floor")]
    ),
}


@pytest.mark.parametrize("says", REFUSED)
def test_arguments_without_a_translation_are_named_with_their_layer_and_line(says, tmp_path):
    with pytest.raises(
        ValueError, match=rf"of aten\.{re.escape(says)} .*test_export\.py:\d+ in .*; write one in"
    ) as refusal:
        computed(REFUSED[says], torch.eye(3), folder=tmp_path)
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


def test_weights_beyond_a_file_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(writer, "PROTOBUF", 100)
    weight = torch.rand(8, 8)
    with pytest.raises(ValueError, match="more than the 2 GB of an ONNX file; export with --precision fp16"):
        computed(lambda x: [x @ weight], torch.rand(4, 8), folder=tmp_path)
    assert not list(tmp_path.iterdir())


# --- the whole detector


@pytest.fixture(scope="module")
def exported(trained, frame, tmp_path_factory) -> Path:
    """LiDAR-only, from points, by the command."""
    out = tmp_path_factory.mktemp("export") / "out"
    with pytest.MonkeyPatch.context() as patch:
        assert export(patch, trained, "--out", out, "--data", frame) == 0
    return out


def test_the_file_is_stock_onnx_with_fixed_shapes(exported):
    model = onnx.load(exported / build.FILE)
    onnx.checker.check_model(model)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)] and not model.functions
    assert {node.domain for node in model.graph.node} == {""} and len(model.graph.node) < 1600
    for value in (*model.graph.input, *model.graph.output):
        assert all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim)
    assert sorted(path.name for path in exported.iterdir()) == ["example.npz", "manifest.json", "model.onnx"]
    assert str(Path(bevfn.__file__).parent).encode() not in (exported / build.FILE).read_bytes()


def test_the_runtime_finds_what_the_detector_finds(exported, trained, frame):
    made, batch = shown(bevfn.load(trained), frame)
    expected = {name: value.numpy() for name, value in made.predict(batch).items()}
    found = verify.run(
        exported / build.FILE, {"points": batch.points.numpy(), "points_valid": batch.points_valid.numpy()}
    )
    boxes = verify.paired(found, expected, 0.01)
    assert found.keys() == expected.keys() and boxes.found == boxes.detections == boxes.reference == 100
    assert all(found[name] == expected[name] for name in found if name.startswith("overflow/"))


def test_the_manifest_says_what_is_needed_to_use_the_file(exported, trained, frame):
    said = json.loads((exported / manifest.NAME).read_text())
    model = onnx.load(exported / build.FILE)
    for kind, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
        assert [entry["name"] for entry in said[kind]] == [value.name for value in values]
        for entry, value in zip(said[kind], values):
            tensor = value.type.tensor_type
            assert entry["shape"] == [d.dim_value for d in tensor.shape.dim] and entry["meaning"]
            assert np.dtype(entry["dtype"]) == onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    assert said["file"]["sha256"] == manifest.checksum(exported / build.FILE) and said["model"] == LIDAR
    step = "checkpoints/step_00000001"
    weights = {"file": "train_state.safetensors", "sha256": manifest.checksum(next(trained.rglob("*.safetensors")))}
    assert said["checkpoint"] == {"name": f"{trained.name}/{step}", **weights}
    assert said["verified"]["on"].endswith(f" of {frame.name}")
    assert said["averages"] is True
    points, cameras = said["reading"]["points"], said["reading"]["cameras"]
    assert cameras is None and points.pop("rule") == manifest.POINTS
    assert points == {
        **{"sweeps": 1, "sweep_choice": "newest", "pad_empty_sweeps": False, "published_sweeps": True, "close_m": 1.0},
        **{"range_m": [-54.0, -54.0, -5.0, 54.0, 54.0, 3.0]},
    }
    assert '"/' not in (exported / manifest.NAME).read_text()  # it leaves this machine
    room = said["capacities"]
    assert (room["points"], room["voxels"], room["sites"]) == (40_000, 20_000, [20_000, 15_000, 9_000])
    assert room["voxel_grid"]["cells"] == [384, 384, 40] and said["classes"][0] == "car" and said["cameras"] == []
    verified = said["verified"]
    assert verified["failed"] == "" and verified["boxes"]["found"] == 100 and verified["boxes"]["largest_m"] < 1e-3
    assert len(verified["boundaries"]) > 30 and 0 < max(verified["boundaries"].values()) < 1e-4
    assert verified["boundaries"]["voxels.coords"] == 0
    assert set(verified["boxes"]["differences"]) == {"score", "size", "yaw_rad", "velocity_mps"}
    assert max(verified["boxes"]["differences"].values()) < 1e-4
    counts = verified["counts"]
    assert counts.pop("points") > 10_000
    assert set(counts) == {"overflow/points", *(f"overflow/voxels_{level}" for level in ("l0", "l1", "l2", "out"))}
    assert not any(counts.values())
    inside = {name for node in model.graph.node for name in node.output}
    assert set(verified["boundaries"]) <= inside  # a user adds one as an output and sees where a runtime goes astray


def test_the_example_is_of_the_file(exported):
    example = np.load(exported / build.EXAMPLE)
    said = json.loads((exported / manifest.NAME).read_text())
    found = verify.run(exported / build.FILE, {entry["name"]: example[entry["name"]] for entry in said["inputs"]})
    assert all(np.array_equal(value, example[name]) for name, value in found.items())


def test_what_does_not_fit_is_counted_by_the_file(exported):
    """More voxels than the file has room for: every point its own."""
    drawn = np.random.default_rng(0)
    points = np.zeros((1, 40_000, 5), np.float32)
    points[..., :3] = drawn.uniform((-50, -50, -4), (50, 50, 2), (40_000, 3))
    found = verify.run(exported / build.FILE, {"points": points, "points_valid": np.ones((1, 40_000), bool)})
    assert found["overflow/voxels_l0"] > 10_000 and found["overflow/voxels_l1"] > 0


def test_the_sample_of_the_page_reads_the_file(exported, frame, monkeypatch, capsys, tmp_path):
    """docs/deploy.md: onnxruntime and numpy alone, in about twenty lines."""
    page = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text()
    (sample,) = [block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "onnxruntime" in block]
    assert "bevfn" not in sample and "torch" not in sample and sum(map(bool, sample.splitlines())) < 25
    (tmp_path / "lidar").symlink_to(exported)
    (tmp_path / "scan.bin").symlink_to(frame / key_frame.LIDAR_FILE)
    monkeypatch.chdir(tmp_path)
    exec(compile(sample.replace(">= 0.1", ">= 0.0"), "docs/deploy.md", "exec"), {})  # nobody trained this model
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 100 and all(len(re.findall(r"-?\d+\.\d+", line)) >= 10 for line in lines)


@pytest.fixture(scope="module")
def from_voxels(trained, frame, tmp_path_factory) -> Path:
    """The same from voxels, by the command."""
    out = tmp_path_factory.mktemp("export") / "out"
    with pytest.MonkeyPatch.context() as patch:
        assert export(patch, trained, "--out", out, "--data", frame, "--input", "voxels") == 0
    return out


def test_a_file_from_voxels_finds_what_the_one_from_points_finds(exported, from_voxels):
    example, whole = np.load(from_voxels / build.EXAMPLE), np.load(exported / build.EXAMPLE)
    said = json.loads((from_voxels / manifest.NAME).read_text())
    assert [entry["name"] for entry in said["inputs"]] == list(flow.VOXELS) and "warnings" not in said["file"]
    found = verify.run(from_voxels / build.FILE, {name: example[name] for name in flow.VOXELS})
    boxes = verify.paired(found, whole, 0.01)
    assert boxes.found == boxes.detections == boxes.reference == 100
    sorts = [
        sum(node.op_type == "TopK" for node in onnx.load(path / build.FILE).graph.node)
        for path in (from_voxels, exported)
    ]
    assert sorts[0] < sorts[1]  # the voxelizer's is cut off


def test_half_precision_is_a_file_with_weights_as_halves(exported, trained, frame, monkeypatch, capsys, tmp_path):
    """On a key frame that has more points and voxels than there is room for, which is told."""
    out = tmp_path / "out"
    room = ("--point-capacity", 20_000, "--voxel-capacity", 3_000)
    assert export(monkeypatch, trained, "--out", out, "--data", frame, "--precision", "fp16", *room) == 0
    counts = json.loads((out / manifest.NAME).read_text())["verified"]["counts"]
    assert counts["points"] == 20_000 and counts["overflow/points"] > 0 and counts["overflow/voxels_l0"] > 0
    said, dropped = capsys.readouterr().out, counts["overflow/points"]
    assert f"overflow/points: {dropped:,} points did not fit and were dropped; raise --point-capacity" in said
    assert f"overflow/voxels_l0: {counts['overflow/voxels_l0']:,} voxels did not fit" in said
    said, example = json.loads((out / manifest.NAME).read_text()), np.load(out / build.EXAMPLE)
    found = verify.run(out / build.FILE, {name: example[name] for name in ("points", "points_valid")})
    assert all(np.array_equal(value, example[name]) for name, value in found.items())
    assert said["precision"] == "fp16" and said["verified"]["failed"] == ""
    assert 0 < said["verified"]["boxes"]["median_m"] < 0.05  # of the eager float32 detector's
    sizes = [(path / build.FILE).stat().st_size for path in (out, exported)]
    weights = onnx.load(out / build.FILE).graph.initializer
    halves = sum(math.prod(held.dims) for held in weights if held.data_type == onnx.TensorProto.FLOAT16)
    assert halves > 0.8 * tree.num_elements(bevfn.load(trained).params) and sizes[1] - sizes[0] > 1.5 * halves


def test_openvino_needs_voxels_in(exported, from_voxels, monkeypatch, tmp_path):
    """Of points it makes wrong voxels without a word, since its TopK keeps no order among equals: docs/deploy.md, the manifest."""
    said = json.loads((exported / manifest.NAME).read_text())
    assert said["file"]["warnings"] == [build.OPENVINO] and "export --input voxels" in build.OPENVINO
    openvino = pytest.importorskip(
        "openvino", reason="OpenVINO (60 MB) is of no test: `pip install -e '.[openvino]'`, then this test runs"
    )
    core = openvino.Core()

    def run(file: Path, *inside: str) -> dict[str, np.ndarray]:
        model, example = onnx.load(file / build.FILE), np.load(file / build.EXAMPLE)
        given = {value.name: example[value.name] for value in model.graph.input}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inside)
        onnx.save(model, tmp_path / "asked.onnx")
        compiled = core.compile_model(
            core.read_model(tmp_path / "asked.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        return {next(iter(port.names)): value for port, value in compiled(given).items()}

    example = np.load(exported / build.EXAMPLE)
    points = {name: example[name] for name in ("points", "points_valid")}
    ours = verify.run(exported / build.FILE, points, ["voxels.coords"])["voxels.coords"]
    theirs = run(exported, "voxels.coords")["voxels.coords"]
    assert verify.error(theirs, ours) > 0.01, "OpenVINO's voxels are right now: take the advice out of docs/deploy.md"
    page = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text()
    (sample,) = [block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "openvino" in block]
    (tmp_path / "lidar").symlink_to(from_voxels)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(sample, "docs/deploy.md", "exec"), names)
    assert verify.error(names["found"]["boxes"], names["example"]["boxes"]) < 1e-4


def test_a_cloud_of_other_columns_is_what_a_file_is_verified_on(exported, trained, frame, monkeypatch, tmp_path):
    rows = np.fromfile(frame / key_frame.LIDAR_FILE, "<f4").reshape(-1, 5)
    rows[:, :4].tofile(tmp_path / "four.bin")
    arguments = ("--data", tmp_path / "four.bin", "--columns", "x y z intensity", "--no-averages")
    assert export(monkeypatch, trained, "--out", tmp_path / "out", *arguments) == 0
    ours, theirs = (np.load(folder / build.EXAMPLE)["points"] for folder in (tmp_path / "out", exported))
    assert np.array_equal(ours, theirs)
    said, before = (json.loads((folder / manifest.NAME).read_text()) for folder in (tmp_path / "out", exported))
    assert said["averages"] is False and said["checkpoint"] == before["checkpoint"]  # which has both


# --- refusals: one sentence, nothing left


CAPACITIES = [
    ("--voxel-capacity", 0, "--voxel-capacity 0 must be at least 1\n"),
    (
        "--voxel-capacity",
        99_999_999_999,
        "--voxel-capacity 99999999999 must be at least 1 and at most 2147483647\n",
    ),
    (
        "--site-capacity",
        5,
        "--site-capacity 5 must be 3 numbers, one for each of the 2 stride-2 convolutions of bevfusion-lidar's sparse encoder at "
        "mini size and one for conv_out\n",
    ),
]


def test_what_is_wrong_is_one_sentence_and_nothing_is_written(trained, exported, frame, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    refused(monkeypatch, capsys, "exists and is not empty; choose another --out", trained, "--out", exported)
    refused(monkeypatch, capsys, "none.pth is not there", tmp_path / "none.pth", "--out", out)
    for other in ("bevdepth-2key", "awml-lidar"):
        refused(
            monkeypatch,
            capsys,
            f"is of another experiment, bevfusion-lidar, not {other}",
            trained,
            "--out",
            out,
            "--model",
            other,
        )
    for flag, value, says in CAPACITIES:
        refused(monkeypatch, capsys, says, trained, "--out", out, flag, value)
    for flag in ("--scene", "--version"):
        says = f"{flag} is of --data; give --data, or leave {flag} out"
        refused(monkeypatch, capsys, says, trained, "--out", out, flag, "v1")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(monkeypatch, capsys, str(empty), trained, "--out", out, "--data", empty)
    masked = small_runs.write(tmp_path / "masked", "bevfusion-lidar-masked").parent.parent
    refused(monkeypatch, capsys, "is a pretraining of", masked, "--out", out, "--data", frame)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "masked"]


def test_voxels_of_a_camera_model_are_refused(frame, monkeypatch, capsys, tmp_path):
    run = small_runs.write(tmp_path / "run", "bevdepth-1key-ema").parent.parent
    arguments = (run, "--out", tmp_path / "out", "--data", frame, "--input", "voxels")
    refused(monkeypatch, capsys, "bevdepth-1key-ema makes no voxels; leave out --input voxels", *arguments)
    assert not (tmp_path / "out").exists()


def test_sigterm_leaves_nothing(trained, tmp_path):
    """While the file is written, to a folder whose parent is missing too; exit code 143."""
    out, place = tmp_path / "new" / "out", tmp_path / "temporary"
    place.mkdir()
    command = [sys.executable, "-m", "bevfn.cli", "export", str(trained), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(place)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while not list(tmp_path.glob("new/.out.*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=300)
    assert process.returncode == 143 and error == "bevfn: stopped by SIGTERM; what was written before is whole\n"
    assert list(tmp_path.iterdir()) == [place] and not list(place.glob("bevfn*"))


def test_a_file_that_differs_is_not_left(trained, frame, monkeypatch, capsys, tmp_path):
    """A runtime that computes something else, from the voxels on."""
    honest = verify.run

    def wrong(path, given, boundaries=()):
        return {
            name: value + 1 if name == "lidar.bev" else value for name, value in honest(path, given, boundaries).items()
        }

    monkeypatch.setattr(verify, "run", wrong)
    assert export(monkeypatch, trained, "--out", tmp_path / "new" / "out", "--data", frame) == 1
    assert "refused, nothing is written: lidar.bev differs by" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_extra_is_named_where_it_is_missing(trained, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(monkeypatch, capsys, "pip install -e '.[export]'", trained, "--out", tmp_path / "out")


# --- the comparison


def outcome(**changes) -> dict[str, np.ndarray]:
    """What is detected and counted, and boundaries in the order in which they are computed; changes: by name, "." as "__"."""
    boxes = np.zeros((1, 4, 9), np.float32)
    boxes[0, :, 0] = [0, 10, 20, 30]
    boxes[0, :, 3:] = [4, 2, 1.5, 3.1, 5, 0]
    valid = np.array([[True, True, True, False]])
    made = {
        "boxes": boxes,
        "scores": np.full((1, 4), 0.5, np.float32),
        "labels": np.array([[0, 0, 1, 1]]),
        "valid": valid,
        "overflow/voxels_l1": np.array(0),
        "voxels.coords": np.arange(30).reshape(1, 10, 3),
        "lidar.bev": np.ones(8, np.float32),
        "head.query_index": np.arange(100)[None],
        "head.pred.0.dim": np.ones(8, np.float32),
    }
    return made | {name.replace("__", "."): value for name, value in changes.items()}


NAMES = ("boxes", "scores", "labels", "valid", "overflow/voxels_l1")
DETECTED = NAMES[:4]


def judged(precision="fp32", **changes) -> verify.Verdict:
    return verify.compare(outcome(**changes), outcome(), outcome(), NAMES, precision)


def test_boxes_are_compared_as_sets_of_what_is_valid():
    swapped = np.array([1, 0, 2, 3])
    same = outcome()
    moved = {name: same[name][:, swapped] for name in DETECTED}
    assert judged(**moved).failed == "" and judged(**moved).boxes.largest_m == 0
    nowhere = same["boxes"].copy()
    nowhere[0, 3] = 99  # not valid
    assert judged(boxes=nowhere).failed == ""
    beside = np.float32([0.2, 0, 0, 0, 0, 0, 0, 0, 0])
    assert "0 of 3 detections are within 0.05 m" in judged(boxes=same["boxes"] + beside).failed
    assert judged("fp16", boxes=same["boxes"] + beside).failed == ""
    assert "2 of 3" in judged(labels=np.array([[0, 0, 0, 0]])).failed
    assert "3 of 4" in judged(valid=np.ones((1, 4), bool)).failed  # one that nobody else found


WRONG = {  # column, the wrong value, what is said
    "length and width swapped": (
        slice(3, 5),
        [2, 4],
        "3 of 3 detections differ from the eager float32 detector's in size by",
    ),
    "height": (5, 3, "in size by more than"),
    "yaw": (6, 3.1 + 1.5, "in yaw by more than"),
    "velocity": (slice(7, 9), [50, 50], "in velocity by more than"),
    "velocity turned round": (slice(7, 9), [-5, 0], "in velocity by more than"),
    "not a number": (7, np.nan, "3 of 3 detections have values that are not finite"),
}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("what", WRONG)
def test_a_box_in_its_place_that_is_another_is_refused(what, precision):
    columns, value, says = WRONG[what]
    boxes = outcome()["boxes"]
    boxes[..., columns] = value
    assert says in judged(precision, boxes=boxes).failed


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_scores_are_judged_and_a_yaw_is_an_angle(precision):
    same = outcome()
    small = judged(precision, scores=same["scores"] * np.float32(0.01))
    assert "in score by more than" in small.failed and small.boxes.differences["score"] == pytest.approx(0.495)
    some = same["scores"].copy()
    some[0, 1] = np.nan
    assert "1 of 3 detections have values that are not finite" in judged(precision, scores=some).failed
    turned = same["boxes"].copy()
    turned[..., 6] -= 2 * np.pi
    assert judged(precision, boxes=turned).failed == ""
    assert judged(precision, boxes=turned).boxes.differences["yaw_rad"] < 1e-5
    near = same["boxes"].copy()
    near[..., 3:] += 0.05  # by what halves may differ and float32 may not
    assert bool(judged(precision, boxes=near).failed) == (precision == "fp32")


def test_what_the_head_computes_of_another_query_is_told_not_judged():
    other = np.arange(100)[None]
    other[0, 7] = 0
    zero, wrong = np.zeros(8, np.float32), np.full(8, 1.01, np.float32)
    assert judged(head__query_index=other, head__pred__0__dim=zero).failed == ""
    assert judged(head__query_index=other, head__pred__0__dim=zero).boundaries["head.pred.0.dim"] == 1
    assert judged(head__query_index=np.arange(100)[None, ::-1], head__pred__0__dim=zero).failed == ""  # the same ones
    assert judged(head__query_index=0 * other).failed.startswith("head.query_index differs by 9.9e-01")
    assert judged(lidar__bev=wrong).failed.startswith("lidar.bev differs by 1.0e-02")
    assert judged(head__pred__0__dim=wrong).failed.startswith("head.pred.0.dim differs by 1.0e-02")
    assert judged(lidar__bev=wrong * np.nan).failed.startswith("lidar.bev differs by nan")
    assert judged("fp16", head__query_index=0 * other, lidar__bev=zero).failed.startswith(
        "lidar.bev differs by 1.0e+00"
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_voxels_shapes_and_counts_are_the_same_whatever_lies_behind(precision):
    """A boundary of integers that differs excuses none of floats."""
    coords, far = outcome()["voxels.coords"], np.full(8, 1e6, np.float32)
    says = "voxels.coords differs by"
    assert judged(precision, voxels__coords=coords[..., ::-1], lidar__bev=far).failed.startswith(says)
    assert judged(precision, voxels__coords=coords[:, ::-1]).failed.startswith(says)  # their features are row by row
    one = coords.copy()
    one[0, 3] = 0
    assert judged(precision, voxels__coords=one, lidar__bev=far * np.nan).failed.startswith(says)
    more = np.arange(36).reshape(1, 12, 3)
    says = "voxels.coords has the shape (1, 12, 3), not (1, 10, 3)"
    assert judged(precision, voxels__coords=more, lidar__bev=far).failed == says
    says = "head.query_index has the shape (1, 50), not (1, 100)"
    assert judged(precision, head__query_index=np.arange(50)[None]).failed == says
    elsewhere, place = np.zeros(1000, int), np.zeros(1000, int)
    elsewhere[0] = 1
    maps = {"frames.0.view.place": place, "frames.0.bev": np.ones(8, np.float32)}

    def pooled(cells: np.ndarray, factor: float) -> str:
        made = maps | {"frames.0.view.place": cells, "frames.0.bev": maps["frames.0.bev"] * np.float32(factor)}
        return verify.compare(outcome(**made), outcome(**maps), outcome(), NAMES, precision).failed

    assert pooled(elsewhere, 1.05) == "" and pooled(place, 1.05).startswith("frames.0.bev differs by 5.0e-02")
    assert pooled(elsewhere, 1e6).startswith("frames.0.bev differs by 1.0e+06")  # one of a thousand is not that much
    assert pooled(place + 1, 1).startswith("frames.0.view.place differs by 1.0e+00")
    lost = {"overflow/voxels_l1": np.array(5)}
    assert judged(precision, **lost).failed == "overflow/voxels_l1 is 5, not 0"


# --- every family


def as_the_manifest_says(how: dict, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """(an image, image_aug), by the numbers and the rule of a manifest alone."""
    picture, (rows, columns) = Image.open(file).convert("RGB"), how["image_size"]
    cover = max(rows / picture.height, columns / picture.width)
    factor = cover if how["resize"] is None else how["resize"] * cover / how["covering"]
    height, width = int(picture.height * factor), int(picture.width * factor)
    left, top = int(max(0, width - columns) / 2), height - rows
    seen = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + columns, top + rows))
    moved = np.diag([factor, factor, 1.0, 1.0])
    moved[:2, 3] = -left, -top
    return np.asarray(seen), moved


def test_how_points_are_read_is_said_with_the_numbers_of_the_reading():
    """As published of BEVFusion: nine sweeps; at random a pool is named."""
    published = Points(sweeps=9, pad_empty_sweeps=True, published_sweeps=True)
    said = manifest.reading(Reading(points=published))
    assert said["cameras"] is None and (said["points"]["sweeps"], said["points"]["range_m"]) == (9, None)
    assert said["points"]["pad_empty_sweeps"] is said["points"]["published_sweeps"] is True
    drawn = Points(sweeps=2, sweep_choice="random", sweep_pool=5)
    assert manifest.reading(Reading(points=drawn))["points"]["sweep_pool"] == 5 and "sweep_pool" not in said["points"]
    assert set(re.findall(r"`(\w+)`", manifest.POINTS)) <= {*said["points"], "sweep_pool"}


def test_a_model_of_own_classes_and_cameras_is_exported(frame, monkeypatch, tmp_path):
    """Two cameras in an order of one's own, images of another shape, three classes, another range."""
    classes, cameras, range_m = (
        ["person", "car", "cone"],
        ["CAM_BACK", "CAM_FRONT"],
        (-25.6, -25.6, -5.0, 25.6, 25.6, 3.0),
    )
    own = {"classes": tuple(classes), "small_classes": ("person",), "cameras": tuple(cameras)}
    own |= {"image_size": (128, 384), "bounds_m": range_m, "voxel_m": (0.2, 0.2, 0.2)}
    run = small_runs.write(tmp_path / "run", "custom-lidar-camera", **small_exports.SMALL, **own).parent.parent
    assert export(monkeypatch, run, "--out", tmp_path / "out", "--data", frame) == 0
    said = json.loads((tmp_path / "out" / manifest.NAME).read_text())
    assert (said["model"], said["classes"], said["cameras"]) == ("custom-lidar-camera", classes, cameras)
    shapes = {entry["name"]: entry["shape"] for entry in said["inputs"]}
    assert shapes["images"] == [1, 1, 2, 32, 96, 3]  # a quarter: of mini size
    example = np.load(tmp_path / "out" / build.EXAMPLE)
    info = json.loads((frame / "frame.json").read_text())["data_list"][0]["images"]
    for i, channel in enumerate(cameras):
        seen, moved = as_the_manifest_says(said["reading"]["cameras"], frame / info[channel]["img_path"])
        assert np.array_equal(example["images"][0, 0, i], seen) and np.allclose(example["image_aug"][0, 0, i], moved)
    grid = said["capacities"]["voxel_grid"]
    assert (*grid["lower"], *grid["upper"]) == range_m and said["verified"]["failed"] == ""
    assert set(np.unique(np.load(tmp_path / "out" / build.EXAMPLE)["labels"])) <= {0, 1, 2}


FAMILIES = ("bevfusion-lidar-camera", "bevfusion-camera", "bevdepth-2key-da", "matrixvt")


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES)
def test_a_small_model_of_every_family_is_exported(model, frame, monkeypatch, tmp_path):
    run = small_runs.write(tmp_path / "run", model).parent.parent
    assert export(monkeypatch, run, "--out", tmp_path / "out", "--data", frame) == 0
    said = json.loads((tmp_path / "out" / manifest.NAME).read_text())
    assert len(said["cameras"]) == 6 and "images" in [entry["name"] for entry in said["inputs"]]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bevnext-stage1", "bevnext-stage2", "awml-lidar", "awml-camera-lidar"])
def test_models_agree_at_every_boundary_until_rounding_chooses(model, frame, tmp_path):
    """Not in their boxes: nobody trained them, many scores are equal, and which are the highest is left open."""
    made, batch = shown(bevfn.load(small_runs.write(tmp_path / "run", model)), frame)
    graph = flow.make(made, batch, table=writer.table())
    names = writer.write(graph, tmp_path / build.FILE)
    found = verify.run(tmp_path / build.FILE, {name: value.numpy() for name, value in graph.inputs.items()}, names)
    task = made.task
    assert task.apply is not None
    with torch.no_grad():
        eager = tree.flatten(task.apply(made.params, made.state, batch)[0])
    errors = {name: verify.error(found[name], eager[name].numpy()) for name in names}
    chosen = [i for i, name in enumerate(names) if name == "head.query_index" and errors[name]]
    before = names[: chosen[0]] if chosen else names
    assert len(before) > 20 and max(errors[name] for name in before) < 1e-5


# --- published sizes


CASES_OF_MODELS = ("bevfusion_lidar", "bevfusion_lidar_cam", "bevdepth_r50_2key", "matrixvt_r50", "bevnext_stage1")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES_OF_MODELS)
def test_a_published_model_is_exported_with_golden_weights(case, monkeypatch, tmp_path):
    folder = Path(__file__).parents[2] / "shared" / "goldens" / case
    if not folder.is_dir():
        pytest.skip("golden weights are made from ../shared/goldens, which is not here")
    torch.save(golden.fill_case(folder), tmp_path / "golden.pth")
    assert export(monkeypatch, tmp_path / "golden.pth", "--out", tmp_path / "out") == 0
    verified = json.loads((tmp_path / "out" / manifest.NAME).read_text())["verified"]
    assert verified["boxes"]["largest_m"] < 0.05
