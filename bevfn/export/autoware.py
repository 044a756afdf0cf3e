"""A detector for autoware's BEVFusion node: voxels -> boxes, its sparse encoder as nodes of TIER IV's TensorRT plugins.

The encoder is written node by node (`plugin_encoder`), everything behind its BEV map is traced as any export (`flow`), and both
are one file. What it was compared with: the encoder in onnx.reference with the plugins' meanings (`plugins`), the rest in
onnxruntime, the outputs as the node reads them (`node`); TensorRT itself runs nowhere here.

Source: autoware_universe perception/autoware_bevfusion, lib/bevfusion_trt.cpp at 08375e6 (names, dtypes and shapes of inputs and
outputs); AWML projects/BEVFusion/deploy at 7a6ec07 (their meaning: containers.py, exporter.py).
"""

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common
from onnx_ir.tape import Tape
from torch import Tensor

from bevfn.data.batch import Batch
from bevfn.detector import Detector
from bevfn.export import build, flow, manifest, node, plugin_encoder, plugins, runtimes, tensorrt, verify
from bevfn.export import onnx as writer
from bevfn.files import new_folder, to_json, write_atomically, writing
from bevfn.heads import transfusion
from bevfn.models import bevfusion

INPUTS = ("voxels", "coors", "num_points_per_voxel")
OUTPUTS = ("bbox_pred", "score", "label_pred")
MAP = "lidar.bev"  # where the traced part begins
FOUND = ("boxes", "scores", "labels", "valid")

Arrays = dict[str, np.ndarray]


def folder(
    detector: Detector, reference: Detector, batch: Batch, out: Path, *, runtime: str = runtimes.NEWEST, data: str = ""
) -> str:
    """As `build.onnx_folder`, for autoware's node; runtime: of `runtimes.RUNTIMES`."""
    kind = runtimes.known(runtime)
    check(detector)
    plugins.register()
    parameters = node.of_model(detector)
    with new_folder(out) as made:
        file = made / build.FILE
        eager = build.eager(detector, batch)
        writer.save(model(detector, batch, torch.from_numpy(eager[MAP]), kind), file)
        written = onnx.load(file)
        onnx.checker.check_model(written, full_check=True)
        plugins.check(written, kind)
        tensorrt.check(written, frozenset({plugins.DOMAIN}))
        inputs = voxels(batch, detector.task.network)
        ours = run(written, inputs, eager)
        truth = eager if reference is detector else build.eager(reference, batch)
        found = {name: value for name, value in ours.items() if name not in OUTPUTS} | node.detections(ours, parameters)
        alike = _alike(eager, inputs, detector.task.network.lidar.features)
        verdict = verify.compare(found, alike, _all(truth), FOUND, detector.config.precision)
        plain = behind(written, ours[MAP])  # as it is used: the runtime may merge what is not asked for
        limits = verify.LIMITS[detector.config.precision]
        again = verify.paired(node.detections(plain, parameters), found, limits.near_m)
        failed = verdict.failed or ("" if again.share >= limits.found else "run without its boundaries it differs")
        if failed:
            raise build.Differs(f"{verdict.text()}\nrefused, nothing is written: {failed}")
        said = manifest.make(
            detector,
            file,
            inputs,
            plain,
            facts={"opset": writer.OPSET},
            runtime="onnx.reference and onnxruntime, CPU",
            packages=build.ONNX_PACKAGES,
            verdict=verdict,
            data=data,
        )
        for entry in said["inputs"]:
            entry["shape"][0] = plugin_encoder.VOXELS
        said["capacities"] |= {"sites": runtimes.MOST, "voxels": parameters["voxels_num"][2]}
        write_atomically(made / manifest.NAME, to_json(said | _plugins(runtime, written), indent=1))
        write_atomically(made / node.MODEL_FILE, node.to_yaml(parameters))
        write_atomically(made / node.NODE_FILE, node.to_yaml(node.of_node(detector, parameters, build.FILE)))
        with writing(made / build.EXAMPLE):
            np.savez_compressed(made / build.EXAMPLE, **inputs, **plain)
    return verdict.text()


def check(detector: Detector) -> None:
    """Raises ValueError, one sentence, for a model that autoware's BEVFusion node does not run."""
    network = detector.task.network
    if not isinstance(network, bevfusion.Config) or network.lidar is None:
        raise ValueError(
            f"{detector.config.model} has no sparse encoder, which autoware's BEVFusion node runs; export it --to onnx"
        )
    if network.camera is not None:
        raise ValueError(
            f"{detector.config.model} has cameras, whose part of autoware's BEVFusion node is not written yet; export it --to onnx"
        )
    runtimes.check(network.voxels.max_voxels[1], None)


def _plugins(runtime: str, written: onnx.ModelProto) -> dict[str, Any]:
    """What of the manifest is of this kind of file alone."""
    nodes = [made.op_type for made in written.graph.node if made.domain == plugins.DOMAIN]
    return {"autoware": {"runtime": runtime, "plugins": {name: nodes.count(name) for name in sorted(set(nodes))}}}


# -------------------------------------------------------------------------------------------------------------- graph


def model(detector: Detector, batch: Batch, bev: Tensor, runtime: runtimes.Runtime) -> ir.Model:
    """The whole graph; bev: an example of the encoder's map."""
    network = detector.task.network
    grid = network.voxels
    traced = flow.make(detector, batch, table=_stock(), decode=outputs, begins={MAP: bev})
    made = writer.translated(traced)
    common.ShapeInferencePass()(made)
    graph = made.graph
    tape = Tape(graph)
    count = plugin_encoder.VOXELS
    given = (
        plugin_encoder.value("voxels", plugin_encoder.FLOAT, (count, grid.max_points, len(network.lidar.features))),
        plugin_encoder.value("coors", plugin_encoder.INT32, (count, 3)),
        plugin_encoder.value("num_points_per_voxel", plugin_encoder.INT32, (count,)),
    )
    (begin,) = [value for value in graph.inputs if value.name == MAP]
    begin.name = f"{MAP}.traced"
    written = plugin_encoder.write(
        plugin_encoder.Nodes(tape),
        *given,
        detector.params["lidar"],
        detector.state["lidar"],
        config=network.lidar.encoder,
        fourier=network.lidar.fourier,
        grid=network.sparse_grid,
        runtime=runtime,
        half=detector.config.precision == "fp16",
    )
    ir.convenience.replace_all_uses_with(begin, written)
    graph.inputs[:] = given
    tensorrt.without_equal_bools(graph)
    made.opset_imports[plugins.DOMAIN] = plugins.VERSION
    return made


def _stock() -> dict[Any, Any]:
    """`onnx.table`, without what is before the map: it is not in the graph."""
    return {operator: function for operator, function in writer.table().items() if operator.namespace != "bevfn"}


def outputs(made: dict) -> dict[str, Tensor]:
    """`bevfusion.apply`'s outputs -> the node's: "bbox_pred" [10 Q] (centre [cells], height of the gravity centre [m], log of length,
    width, height [m], sine and cosine of the yaw, velocity [m/s]), "score" [Q], "label_pred" [Q] int64."""
    head = made["head"]
    pred, labels = head["pred"][-1], head["query_labels"]  # B Q
    classes = torch.arange(pred["heatmap"].shape[-1], device=labels.device)
    own = labels[..., None] == classes  # B Q K
    score = (torch.sigmoid(pred["heatmap"]) * pred["query_heatmap_score"] * own).amax(-1)
    box = torch.cat([pred[name] for name in transfusion.OUTPUTS], dim=-1)  # B Q 10
    return {"bbox_pred": box[0].t(), "score": score[0], "label_pred": labels[0]}


# ------------------------------------------------------------------------------------------------------- verification


def voxels(batch: Batch, network: bevfusion.Config) -> Arrays:
    """What the node's own voxelizer makes of a batch: "voxels" [n P F] (points in their order, then zeros), "coors" [n 3] (z, y, x),
    "num_points_per_voxel" [n]."""
    grid = network.voxels
    assert network.lidar is not None and batch.points is not None and batch.points_valid is not None
    found, _ = bevfusion.voxelise(batch.points, batch.points_valid, grid, train=False)
    there = found["count"][0] > 0
    coords, counts = found["coords"][0][there].numpy(), found["count"][0][there].numpy()
    points = batch.points[0][batch.points_valid[0]].numpy()
    points = points[np.isfinite(points).all(1)]
    lower, size = np.asarray(grid.lower, np.float32), np.asarray(grid.size, np.float32)
    cell = np.floor((points[:, :3] - lower) / size).astype(np.int64)
    inside = ((cell >= 0) & (cell < grid.grid)).all(1)
    points, cell = points[inside], cell[inside]
    key, keys = (np.ravel_multi_index(cells.T, grid.grid) for cells in (cell, coords.astype(np.int64)))
    order = np.argsort(keys)
    place = np.searchsorted(keys, key, sorter=order).clip(max=len(keys) - 1)
    voxel = order[place]
    points, voxel = points[keys[voxel] == key], voxel[keys[voxel] == key]  # others are of voxels beyond the capacity
    together = np.argsort(voxel, kind="stable")
    points, voxel = points[together], voxel[together]
    rank = np.arange(len(voxel)) - np.searchsorted(voxel, voxel)
    first = rank < grid.max_points
    made = np.zeros((len(keys), grid.max_points, len(network.lidar.features)), np.float32)
    made[voxel[first], rank[first]] = points[first][:, network.lidar.features]
    return {"voxels": made, "coors": np.ascontiguousarray(coords[:, ::-1]), "num_points_per_voxel": counts}


def run(written: onnx.ModelProto, inputs: Arrays, boundaries: Collection[str]) -> Arrays:
    """Outputs and those of the boundaries that the file has: the encoder in onnx.reference, the rest in onnxruntime."""
    here = _computed(written, {MAP, "voxels.features", *boundaries})
    before = here[: here.index(MAP) + 1]
    encoder = onnx.utils.Extractor(written).extract_model(list(INPUTS), before)
    found = dict(zip(before, ReferenceEvaluator(encoder, new_ops=list(plugins.MEANINGS)).run(before, inputs)))
    return found | behind(written, found[MAP], boundaries)


def behind(written: onnx.ModelProto, bev: np.ndarray, boundaries: Collection[str] = ()) -> Arrays:
    """Outputs, and boundaries behind the map, from the map on."""
    here = _computed(written, {MAP, *boundaries})
    rest = onnx.utils.Extractor(written).extract_model([MAP], [*OUTPUTS, *here[here.index(MAP) + 1 :]])
    with tempfile.TemporaryDirectory(prefix="bevfn-export-") as place:
        onnx.save(rest, Path(place) / build.FILE)
        return verify.run(Path(place) / build.FILE, {MAP: bev})


def _computed(written: onnx.ModelProto, names: Collection[str]) -> list[str]:
    """Those that are values of the file, in the order in which they are computed."""
    return [name for made in written.graph.node for name in made.output if name in names]


def _alike(eager: Arrays, inputs: Arrays, columns: tuple[int, ...]) -> Arrays:
    """Eager boundaries without the rows of padding, in the columns that the node gives."""
    made = dict(eager)
    for name in eager:
        if name.startswith("lidar.") and name.endswith((".features", ".coords")):
            made[name] = eager[name][eager[f"{name.rpartition('.')[0]}.valid"]]
    made["voxels.features"] = eager["voxels.features"][0, : len(inputs["voxels"])][:, columns]
    return _all(made)


def _all(eager: Arrays) -> Arrays:
    """Detections of which all are valid: the node leaves out none by its place."""
    return eager | {"valid": np.ones_like(eager["valid"])}
