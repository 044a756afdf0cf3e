"""`bevfn export --to air`: an Ascend graph with its weights inside that computes, from its file, what the detector does."""

import json
from pathlib import Path

import ge_graphs
import numpy as np
import pytest
import torch
from small_exports import export, flow_of, refused, shown

import bevfn
from bevfn import tree
from bevfn.ascend import lower, torchair
from bevfn.ascend.fixes import rewrites
from bevfn.export import air, build, manifest, verify

ge_graphs.need_torchair()


@pytest.fixture(scope="module")
def exported(trained, frame, tmp_path_factory) -> Path:
    """LiDAR-only, from points, by the command."""
    out = tmp_path_factory.mktemp("export") / "out"
    with pytest.MonkeyPatch.context() as patch:
        assert export(patch, trained, "--out", out, "--data", frame, "--to", "air") == 0
    return out


def model_of(folder: Path):
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    made = ModelDef()
    made.ParseFromString((folder / air.FILE).read_bytes())
    return made


def test_weights_are_constants_and_data_nodes_are_the_inputs_alone(exported, trained):
    (graph,) = model_of(exported).graph
    said = json.loads((exported / manifest.NAME).read_text())
    data = sorted((op.attr["index"].i, op.name) for op in graph.op if op.type == "Data")
    assert [name for _, name in data] == [entry["name"] for entry in said["inputs"]] == ["points", "points_valid"]
    constants = sum(len(op.attr["value"].t.data) for op in graph.op if op.type == "Const")
    assert constants > 4 * 0.9 * tree.num_elements(bevfn.load(trained).params)  # a few are folded into others
    (end,) = [op for op in graph.op if op.type == "NetOutput"]
    assert len(end.input) == len(end.input_desc) == len(said["outputs"])
    read = {name.rpartition(":")[0] for op in graph.op for name in op.input}
    assert {op.name for op in graph.op} - {end.name} <= read  # nothing is left of what only a boundary needed
    assert sorted(path.name for path in exported.iterdir()) == ["example.npz", "manifest.json", "model.air"]


def test_the_manifest_has_every_boundary_and_where_it_is_in_the_graph(exported):
    said = json.loads((exported / manifest.NAME).read_text())
    names = {op.name for op in model_of(exported).graph[0].op}
    values, verified = said["file"]["values"], said["verified"]
    assert values.keys() == verified["boundaries"].keys() and len(values) > 30
    assert {value.rpartition(":")[0] for value in values.values()} <= names
    assert verified["failed"] == "" and "A2" in verified["runtime"] and verified["boxes"]["found"] == 100
    assert 0 < max(verified["boundaries"].values()) < 1e-4 and verified["boundaries"]["voxels.coords"] == 0
    assert said["file"]["sha256"] == manifest.checksum(exported / air.FILE) and "torch_npu" in said["versions"]


def test_what_runs_is_the_file(exported, tmp_path):
    """It gives its example; with one weight of it changed, it differs and is refused."""
    example = np.load(exported / build.EXAMPLE)
    said = json.loads((exported / manifest.NAME).read_text())
    given = {entry["name"]: example[entry["name"]] for entry in said["inputs"]}
    names = [entry["name"] for entry in said["outputs"]]

    def found(file: Path):
        return dict(zip(names, air.run(file, given)[0], strict=True))

    assert all(np.array_equal(value, example[name]) for name, value in found(exported / air.FILE).items())
    model = model_of(exported)
    weights = [op for op in model.graph[0].op if op.type == "Const" and len(op.attr["value"].t.desc.shape.dim) == 4]
    held = weights[len(weights) // 2].attr["value"].t
    held.data = (1.5 * np.frombuffer(held.data, np.float32)).tobytes()
    (tmp_path / air.FILE).write_bytes(model.SerializeToString())
    verdict = verify.compare(found(tmp_path / air.FILE), dict(example), dict(example), names, "fp32")
    assert "detections are within 0.05 m" in verdict.failed


@pytest.mark.slow
def test_half_precision_and_voxels_in(trained, frame, tmp_path):
    full, batch = shown(bevfn.load(trained), frame)
    half, _ = shown(bevfn.load(trained, precision="fp16"), frame)
    build.folder(air.KIND, half, full, batch, tmp_path / "half", entry="voxels")
    kinds = [op.attr["value"].t.desc.dtype for op in model_of(tmp_path / "half").graph[0].op if op.type == "Const"]
    from torchair._ge_concrete_graph.ge_ir_pb2 import DataType

    assert DataType.Value("DT_FLOAT16") in kinds
    said = json.loads((tmp_path / "half" / manifest.NAME).read_text())
    assert said["inputs"][0]["name"] == "voxel_features" and said["precision"] == "fp16"


def tiny() -> tuple:
    weight = torch.rand(8, 8)
    made = flow_of(lambda x: [x @ weight, x], torch.rand(4, 8), table=lower.tables(), bits=True)
    rewrites.apply(made.module)
    return made


def test_a_graph_beyond_what_a_protobuf_holds_is_refused(monkeypatch, tmp_path):
    for most in (100, 300):  # the weights alone; with the graph
        monkeypatch.setattr(air, "PROTOBUF", most)
        with pytest.raises(ValueError, match=r"more than the 2 GB of an \.air, which is one protobuf message"):
            air.write(tiny(), tmp_path / air.FILE)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(air, "PROTOBUF", 2**20)
    run, _ = air.write(tiny(), tmp_path / air.FILE)
    assert len(run({"a": np.ones((4, 8), np.float32)}, False)) == 2


def test_an_operator_without_a_converter_is_named_with_its_line(tmp_path):
    def layer(x):
        return [torch.special.bessel_j0(x)]

    made = flow_of(layer, torch.rand(4), table=lower.tables(), bits=True)
    rewrites.apply(made.module)
    with pytest.raises(
        ValueError, match=r"no Ascend converter for .*bessel_j0.* at .*test_export_air\.py:\d+ in .*layer"
    ):
        air.write(made, tmp_path / air.FILE)
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_is_one_sentence_and_nothing_is_written(trained, exported, monkeypatch, capsys, tmp_path):
    to = ("--to", "air")
    refused(monkeypatch, capsys, "exists and is not empty; choose another --out", trained, "--out", exported, *to)
    other = ("--model", "bevdepth-2key")
    refused(monkeypatch, capsys, "is of another experiment", trained, "--out", tmp_path / "out", *to, *other)
    monkeypatch.setattr(torchair, "loaded", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(monkeypatch, capsys, "run `make npu`", trained, "--out", tmp_path / "out", *to)
    assert not list(tmp_path.iterdir())
