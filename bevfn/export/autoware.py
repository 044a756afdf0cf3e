"""A detector for autoware's BEVFusion node: voxels -> boxes, its sparse encoder as nodes of TIER IV's TensorRT plugins.

The encoder is written node by node (`plugin_encoder`), everything behind its BEV map is traced as any export (`flow`), and both
are one file. With cameras their features are a second file, and what of their branch is dynamic is written too
(`plugin_camera`). What it was compared with: the plugins' nodes in onnx.reference with their meanings (`plugins`), the rest in
onnxruntime, the outputs as the node reads them (`node`); TensorRT itself runs nowhere here.

Source: autoware_universe perception/autoware_bevfusion, lib/bevfusion_trt.cpp at 08375e6 (names, dtypes and shapes of inputs and
outputs); AWML projects/BEVFusion/deploy at 7a6ec07 (their meaning: containers.py, exporter.py).
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
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
from bevfn.export import build, flow, manifest, node, plugin_camera, plugin_encoder, plugins, runtimes, tensorrt, verify
from bevfn.export import onnx as writer
from bevfn.files import new_folder, write_atomically
from bevfn.heads import transfusion
from bevfn.models import bevfusion
from bevfn.training import limits

IMAGES_FILE = "image_backbone.onnx"
INPUTS = ("voxels", "coors", "num_points_per_voxel")
OUTPUTS = ("bbox_pred", "score", "label_pred")
MAP = "lidar.bev"  # where the traced part begins
FEATURES = "camera.neck.0"  # with cameras, there too, and where their own file ends
FOUND = ("boxes", "scores", "labels", "valid")
RUNTIME = "onnx.reference and onnxruntime, CPU"

Arrays = dict[str, np.ndarray]


def folder(
    detector: Detector,
    reference: Detector,
    batch: Batch,
    out: Path,
    *,
    runtime: str = runtimes.NEWEST,
    picture: tuple[int, int] | None = None,
    data: str = "",
    counts: Mapping[str, int] = build.NONE,
) -> str:
    """As `build.folder`, for autoware's node; runtime: of `runtimes.RUNTIMES`; picture: rows and columns of the cameras'
    own images, where the model reads any."""
    kind = runtimes.known(runtime)
    check(detector)
    plugins.register()
    parameters = node.of_model(detector, picture, batch)
    eager = build.eager(detector, batch)
    check_sites(eager, detector)
    with new_folder(out) as made:
        inputs = given(batch, detector.task.network)
        ours: Arrays = {}
        cameras = None if detector.task.network.camera is None else made / IMAGES_FILE
        if cameras is not None:
            images = {plugin_camera.IMAGES: inputs[plugin_camera.IMAGES]}
            ours = behind(written(backbone(detector, batch), cameras, kind), images, [plugin_camera.FEATURES], eager)
            ours[FEATURES] = ours.pop(plugin_camera.FEATURES)
            inputs |= {plugin_camera.FEATURES: ours[FEATURES]}
        main = written(model(detector, batch, eager, kind), made / build.FILE, kind)
        ours |= run(main, inputs, eager)
        # As it is used: the runtime may merge what is not asked for.
        plain = behind(main, {name: ours[name] for name in begins(detector)}, OUTPUTS)
        compared = build.Compared(
            inputs=inputs,
            outputs=plain,
            found={name: value for name, value in ours.items() if name not in OUTPUTS}
            | node.detections(ours, parameters),
            again=node.detections(plain, parameters),
            eager=_alike(eager, inputs, detector.task.network.lidar.features),
            truth=_all(eager if reference is detector else build.eager(reference, batch)),
            names=FOUND,
            counts=counts,
        )
        how = {"facts": {"opset": writer.OPSET}, "packages": build.ONNX_PACKAGES, "data": data, "runtime": RUNTIME}
        verdict, said = build.judged(detector, made / build.FILE, compared, **how)
        del said["capacities"]["points"]  # of which the graph has no fixed number
        said["capacities"] |= {"sites": runtimes.ROOM, "voxels": parameters["voxels_num"][2]}
        _dynamic(said["inputs"])
        said["autoware"] = {"runtime": runtime, **_about(main, ours, cameras)}
        build.describe(made, said, compared)
        write_atomically(made / node.MODEL_FILE, node.to_yaml(parameters))
        own = node.of_node(detector, parameters, build.FILE, IMAGES_FILE)
        write_atomically(made / node.NODE_FILE, node.to_yaml(own))
        write_atomically(made / node.REMAPPER_FILE, node.to_yaml(node.of_remapper()))
    return verdict.text()


def check(detector: Detector) -> None:
    """Raises ValueError, one sentence, for a model that autoware's BEVFusion node does not run."""
    network = detector.task.network
    if not isinstance(network, bevfusion.Config) or network.lidar is None:
        raise ValueError(
            f"{detector.config.model} has no sparse encoder, which autoware's BEVFusion node runs; export it --to onnx"
        )
    if network.camera is not None and not network.camera.view.lidar_depth:
        raise ValueError(
            f"{detector.config.model} sees no LiDAR depth, which autoware's BEVFusion node gives; export it --to onnx"
        )
    limits.check({"voxel_capacity": network.voxels.max_voxels[1]}, runtimes.LIMITS)


def check_sites(eager: Mapping[str, np.ndarray], detector: Detector) -> None:
    """Raises ValueError, one sentence, where the detector drops sites of the key frame, which the plugins would keep."""
    for name, count in eager.items():
        if name.startswith("overflow/") and name != "overflow/voxels_l0" and count > 0:
            room = " ".join(map(str, detector.task.network.lidar.encoder.capacities))
            raise ValueError(
                f"{name}: {int(count):,} sites of the verified key frame do not fit --site-capacity {room}, and the graph, which "
                f"has room for {runtimes.ROOM:,} of each level, would keep them; raise it"
            )


def _dynamic(inputs: list[dict[str, Any]]) -> None:
    """Names the first dimension of inputs in a manifest, none of which is fixed."""
    rows = {**dict.fromkeys(INPUTS, plugin_encoder.VOXELS), **plugin_camera.ROWS, plugin_camera.IMAGES: "num_imgs"}
    for entry in inputs:
        entry["shape"][0] = rows[entry["name"]]


def _about(main: onnx.ModelProto, ours: Arrays, cameras: Path | None) -> dict[str, Any]:
    """What of the manifest is of this kind of file alone: nodes of plugins, sites of the verified key frame, the second file."""
    nodes = Counter(made.op_type for made in main.graph.node if made.domain == plugins.DOMAIN)
    sites = {name: len(rows) for name, rows in ours.items() if name.startswith("lidar.") and name.endswith(".coords")}
    about: dict[str, Any] = {"plugins": dict(sorted(nodes.items())), "sites_of_example": sites}
    if cameras is not None:
        about["image_backbone"] = {
            **{"name": cameras.name, "bytes": cameras.stat().st_size, "sha256": manifest.checksum(cameras)},
            **{"inputs": [plugin_camera.IMAGES], "outputs": [plugin_camera.FEATURES]},
        }
    return about


# -------------------------------------------------------------------------------------------------------------- graph


def model(detector: Detector, batch: Batch, eager: Arrays, runtime: runtimes.Runtime) -> ir.Model:
    """The whole graph, or with cameras all but their features; eager: examples of the boundaries where the traced part begins."""
    network = detector.task.network
    half = detector.config.precision == "fp16"
    cut = {name: torch.from_numpy(eager[name]) for name in (*begins(detector), *_within(detector))}
    made = writer.translated(flow.make(detector, batch, table=_stock(), decode=_outputs(detector), begins=cut))
    common.ShapeInferencePass()(made)
    graph = made.graph
    to = plugin_encoder.Nodes(Tape(graph))
    traced = {str(value.name): value for value in graph.inputs}
    for name, value in traced.items():
        value.name = f"{name}.traced"
    columns = len(network.lidar.features)
    voxels = plugin_encoder.inputs(network.voxels.max_points, columns)
    found = {
        MAP: plugin_encoder.write(
            to,
            *voxels,
            detector.params["lidar"],
            detector.state["lidar"],
            config=network.lidar.encoder,
            fourier=network.lidar.fourier,
            grid=network.sparse_grid,
            runtime=runtime,
            half=half,
        )
    }
    inputs = {str(value.name): value for value in voxels}
    if network.camera is not None:
        inputs |= plugin_camera.inputs(columns, cut[FEATURES].shape[1:])
        (depth_net,) = graph.outputs[len(OUTPUTS) :]
        graph.outputs[len(OUTPUTS) :] = []
        depth_net.name = plugin_camera.DEPTH_NET
        found |= plugin_camera.write(to, inputs, depth_net, config=network.camera.view, features=FEATURES, half=half)
    for name, value in traced.items():
        ir.convenience.replace_all_uses_with(value, found[name])
    graph.inputs[:] = inputs.values()
    tensorrt.without_equal_bools(graph)
    made.opset_imports[plugins.DOMAIN] = plugins.VERSION
    return made


def backbone(detector: Detector, batch: Batch) -> ir.Model:
    """The cameras' features: images -> "image_feats"."""
    assert batch.images is not None
    seen = replace(batch, images=batch.images.float())

    def decode(made: dict) -> dict[str, Tensor]:
        return {f"{plugin_camera.FEATURES}.all": made["camera"]["neck"][0].float()}

    made = writer.translated(flow.make(detector, seen, table=_stock(), decode=decode))
    common.ShapeInferencePass()(made)
    graph = made.graph
    to = plugin_encoder.Nodes(Tape(graph))
    (traced,), (all_of_them,) = graph.inputs, graph.outputs
    _, _, cameras, *size, _ = batch.images.shape
    imgs = plugin_encoder.value(plugin_camera.IMAGES, plugin_camera.UINT8, ("num_imgs", 3, *size))
    graph.outputs[:] = []
    pictures, count = plugin_camera.images(to, imgs, cameras)
    ir.convenience.replace_all_uses_with(traced, pictures)
    graph.outputs[:] = [plugin_camera.as_many(to, all_of_them, count)]
    graph.inputs[:] = [imgs]
    tensorrt.without_equal_bools(graph)
    return made


def begins(detector: Detector) -> tuple[str, ...]:
    """Boundaries behind the last of the plugins' nodes, from which onnxruntime runs to the boxes."""
    return (MAP,) if detector.task.network.camera is None else (MAP, plugin_camera.POOLED)


def _within(detector: Detector) -> tuple[str, ...]:
    """Others that are written and not traced."""
    return () if detector.task.network.camera is None else (FEATURES, plugin_camera.DEPTH_MAP)


def written(made: ir.Model, file: Path, runtime: runtimes.Runtime) -> onnx.ModelProto:
    """Writes a graph; returns what was written. Raises ValueError, one sentence, for what its readers would not take."""
    writer.save(made, file)
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    plugins.check(model, runtime)
    tensorrt.check(model, frozenset({plugins.DOMAIN}))
    return model


def _stock() -> dict[Any, Any]:
    """`onnx.table`, without what is before the map: it is not in the graph."""
    return {operator: function for operator, function in writer.table().items() if operator.namespace != "bevfn"}


def _outputs(detector: Detector) -> Callable[[dict], dict[str, Tensor]]:
    if detector.task.network.camera is None:
        return outputs
    return lambda made: outputs(made) | {"depth_net": made["camera"]["view"]["depth_net"]}


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


def given(batch: Batch, network: bevfusion.Config) -> Arrays:
    """What the node makes of a batch, but for the cameras' features: inputs of both graphs by name."""
    made = voxels(batch, network)
    return made if network.camera is None else made | plugin_camera.as_given(batch, network)


def voxels(batch: Batch, network: bevfusion.Config) -> Arrays:
    """What the node's own voxelizer makes of a batch: "voxels" [n P F] (points in their order, then zeros), "coors" [n 3] (z, y, x),
    "num_points_per_voxel" [n]."""
    grid = network.voxels
    assert network.lidar is not None and batch.points is not None and batch.points_valid is not None
    found, _ = bevfusion.voxelise(batch.points, batch.points_valid, grid, train=False)
    there = found["count"][0] > 0
    coords, counts = found["coords"][0][there].numpy(), found["count"][0][there].numpy()
    points = plugin_camera.points_of(batch)
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


def run(main: onnx.ModelProto, inputs: Arrays, boundaries: Collection[str]) -> Arrays:
    """Outputs and those of the boundaries that the file has: the plugins' nodes in onnx.reference, the rest in onnxruntime."""
    found = _reference(main, INPUTS, [MAP], inputs, boundaries)
    begin = {MAP: found[MAP]}
    for pool in (made for made in main.graph.node if made.op_type == plugins.POOL):
        before = [name for name in pool.input if name not in inputs]
        camera = {name: inputs[name] for name in plugin_camera.ROWS}
        rows = behind(main, camera, before, boundaries)
        summed = _reference(main, pool.input, [plugin_camera.POOLED], {**inputs, **rows}, ())
        begin |= summed
        found |= {name: value for name, value in rows.items() if name not in before} | summed
    return found | behind(main, begin, OUTPUTS, boundaries)


def _reference(
    main: onnx.ModelProto, begins: Iterable[str], ends: list[str], inputs: Arrays, boundaries: Collection[str]
) -> Arrays:
    part, asked = _part(main, begins, ends, boundaries)
    evaluator = ReferenceEvaluator(part, new_ops=list(plugins.MEANINGS))
    return dict(zip(asked, evaluator.run(asked, {name: inputs[name] for name in begins})))


def behind(main: onnx.ModelProto, begin: Arrays, ends: Collection[str], boundaries: Collection[str] = ()) -> Arrays:
    """Values `ends`, and boundaries on the way to them, of the values `begin` on, in onnxruntime."""
    part, _ = _part(main, begin, [*ends], boundaries)
    with tempfile.TemporaryDirectory(prefix="bevfn-export-") as place:
        onnx.save(part, Path(place) / build.FILE)
        return verify.run(Path(place) / build.FILE, begin)


def _part(
    main: onnx.ModelProto, begins: Iterable[str], ends: list[str], boundaries: Collection[str]
) -> tuple[onnx.ModelProto, list[str]]:
    """The nodes between these values, and what they give: ends, and boundaries among them."""
    extractor, begins = onnx.utils.Extractor(main), [*begins]
    here = _computed(extractor.extract_model(begins, ends), boundaries)
    asked = [*(name for name in here if name not in ends), *ends]
    return extractor.extract_model(begins, asked), asked


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
