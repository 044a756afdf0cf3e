"""Parity map of BEVFusion with mmdetection3d: what `goldens/bevfusion_*` store, boundary by boundary.

Stored inputs are used as they are (our own preprocessing is compared with them in tests/test_data.py). Unordered
results are compared as sets, as the cases' READMEs say.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bevfn import tree
from bevfn.data.batch import Base, Batch, annotated_boxes, make
from bevfn.heads import transfusion, transfusion_loss
from bevfn.kernels.linear_assignment import linear_assignment
from bevfn.models import bevfusion
from bevfn.parity import compare, golden
from bevfn.parity.compare import EVAL_TOLERANCE, TRAIN_TOLERANCE, Table
from bevfn.parity.golden import Case
from bevfn.views import camera_grid, lift_splat

PATHS = {  # stored name: path in outputs
    "sparse/bev": "lidar.bev",
    "fuser": "fuser",
    **{f"second/{i}": f"bev.backbone.{i}" for i in range(2)},
    "secfpn": "bev.neck",
    "head/shared_conv": "head.shared",
    "head/dense_heatmap": "head.dense_heatmap",
    "vt/geometry": "camera.view.geometry",
    "vt/dtransform": "camera.view.depth_transform",
    "vt/depthnet": "camera.view.depth_net",
    "vt/bev_pool": "camera.view.bev_pool",
    "vt/bev": "camera.view.bev",
    **{f"swin/{i}": f"camera.backbone.{i}" for i in range(3)},
    **{f"lssfpn/{i}": f"camera.neck.{i}" for i in range(2)},
}
SITES = {  # active sites of a stage, in no order
    "voxel": "voxels",
    "sparse/conv_input": "lidar.conv_input",
    **{f"sparse/encoder_layer{i + 1}": f"lidar.stages.{i}" for i in range(4)},
    "sparse/conv_out": "lidar.conv_out",
}
BOX = ("center", "height", "dim", "rot", "vel")
PER_QUERY = {  # of the head; queries have no order
    **{k: k for k in ("query_score", "query_pos", "query_feat_in", "self_attn", "cross_attn", "decoder_out")},
    **{f"pred/{k}": f"pred.0.{k}" for k in (*BOX, "heatmap", "query_heatmap_score")},
}
# Logged only; boxes barely touch, so an absolute error of 1e-5 is what it means.
ABSOLUTE = {"matched_ious": 1e-5}
# Shifts that a following batch norm removes: their gradients are zero in exact arithmetic and rounding in practice
# (goldens bevfusion_lidar_cam, "Measured values"). `dtransform.0.weight` is a pure scale of a one-channel input.
ZERO_GRADIENT = (
    "bbox_head.decoder.0.norms.2.bias",
    "bbox_head.decoder.0.self_posembed.position_embedding_head.0.bias",
    "bbox_head.decoder.0.cross_posembed.position_embedding_head.0.bias",
    *(f"view_transform.dtransform.{i}.bias" for i in (0, 3, 6)),
    "view_transform.dtransform.0.weight",
    *(f"view_transform.depthnet.{i}.bias" for i in (0, 3)),
    *(f"img_backbone.norm{i}.bias" for i in (1, 2, 3)),
)


def config_for(case: Case, published: bevfusion.Config) -> bevfusion.Config:
    """Capacities that this case's points cannot overflow by much: overflow is compared too."""
    assert published.lidar is not None
    room = min(len(case.inputs["points"]), published.voxels.max_voxels[1])
    encoder = replace(published.lidar.encoder, capacities=(3 * room, 2 * room, room, room))
    return replace(published, lidar=replace(published.lidar, encoder=encoder))


def batch_of(case: Case, device: str, *, train: bool, prefix: str = "") -> Batch:
    """The stored inputs as a batch of one. Training has a part of the annotations, whose matching is not degenerate."""
    inputs = case.inputs
    points = inputs[f"{prefix}points"][None]
    everything = torch.arange(len(inputs["gt_boxes"]))
    chosen = inputs.get("gt_train_index", everything) if train else everything
    fields = {
        "points": points,
        "points_valid": torch.ones(points.shape[:2], dtype=torch.bool),
        "boxes": inputs["gt_boxes"][chosen][None],
        "labels": inputs["gt_labels"][chosen][None],
        "boxes_valid": torch.ones(1, len(chosen), dtype=torch.bool),
    }
    if "imgs" in inputs:
        fields |= cameras_of(inputs, f"{prefix}img_aug_matrix")
    base_aug = inputs.get(f"{prefix}lidar_aug_matrix", torch.eye(4))[None]
    return make(base=Base.LIDAR, base_aug=base_aug, **fields).to(device)


def cameras_of(inputs: dict[str, Tensor], image_aug: str) -> dict[str, Tensor]:
    """A batch's fields of the stored cameras [N ...], with B and T = 1."""
    names = {
        "images": "imgs",
        "intrinsics": "cam2img",
        "image_aug": image_aug,
        "base_from_camera": "cam2lidar",
        "image_from_base": "lidar2img",
    }
    return {ours: inputs[theirs][None, None] for ours, theirs in names.items()}


def paths(case: Case, *, train: bool) -> dict[str, str]:
    return PATHS


def loss(case: Case, outputs: dict, batch: Batch, config: bevfusion.Config) -> tuple[Tensor, dict[str, Tensor], dict]:
    total, terms = transfusion_loss.loss(outputs["head"], *annotated_boxes(batch), config=config.head)
    return total, named(terms), terms["targets"]


def named(terms: dict) -> dict[str, Tensor]:
    """The loss terms by their stored names."""
    names = {"heatmap": "loss_heatmap", "cls": "layer_-1_loss_cls", "bbox": "layer_-1_loss_bbox"}
    return {theirs: terms[ours] for ours, theirs in (names | {"matched_iou": "matched_ious"}).items()}


def places(case: Case, table: Table, batch: Batch, config: bevfusion.Config) -> dict[str, Any]:
    return {}


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluated(case: Case, table: Table, outputs: dict, batch: Batch, config: bevfusion.Config) -> None:
    outputs = tree.map(lambda x: x.cpu(), outputs)
    for name, path in SITES.items():
        if f"eval/{name}/coords" in case.outputs:
            _sites(case, table, f"eval/{name}", at(outputs, path))
    if config.camera is not None:
        _depth_map(case, table, "eval/vt", outputs["camera"]["view"]["depth_map"])
        _augmented_geometry(case, table, config, str(batch.base_aug.device))
    _queries(case, table, "eval/head", outputs["head"], EVAL_TOLERANCE)
    found = transfusion.decode(outputs["head"], config.head)
    made = {key: found[key][0][found["valid"][0]] for key in ("boxes", "scores", "labels")}
    noise = case.noise("eval", "det/boxes"), case.noise("eval", "det/scores")
    compare.detections(case, table, "eval/det", made, noise)


def at(outputs: dict, path: str) -> dict[str, Tensor]:
    """The outputs below a path, by what follows it."""
    return {k.removeprefix(f"{path}."): x for k, x in tree.flatten(outputs).items() if k.startswith(f"{path}.")}


def _sites(case: Case, table: Table, name: str, ours: dict[str, Tensor]) -> None:
    """Active sites as a set, then their values in the stored (sorted) order. Voxels are [1 V ...], later sites [W ...]."""
    if "count" in ours:
        filled = ours["count"][0] > 0
        found = {k: ours[k][0][filled] for k in ("coords", "features")} | {
            "num_points": ours["count"][0][filled].float()
        }
    else:
        found = {"coords": ours["coords"][ours["valid"]][:, 1:], "features": ours["features"][ours["valid"]]}
    compare.same_set(case, table, f"{name}/coords", found["coords"])
    order = compare.order_like(found["coords"], case.outputs[f"{name}/coords"])
    for key, floor in (("num_points", 0.0), ("features", EVAL_TOLERANCE)):
        if key in found and f"{name}/{key}" in case.outputs:
            compare.boundary(case, table, f"{name}/{key}", found[key][order], floor)


def _depth_map(case: Case, table: Table, name: str, depth: Tensor) -> None:
    """Hit pixels as a set (camera, row, column), then their depths."""
    if f"{name}/depth_index" in case.outputs:
        image = depth.cpu().flatten(0, -3)  # N H W
        compare.nonzero(case, table, f"{name}/depth", image, EVAL_TOLERANCE)


def _augmented_geometry(case: Case, table: Table, config: bevfusion.Config, device: str) -> None:
    """The second set of matrices, drawn from the training augmentation: geometry alone."""
    if "aug/points" not in case.inputs:
        return
    assert config.camera is not None
    view, moved = config.camera.view, batch_of(case, device, train=False, prefix="aug/")
    _depth_map(case, table, "aug/vt", lift_splat.lidar_depth_map(moved, view.grid.image_size))
    points = torch.stack(camera_grid.frustum_points(moved, 0, view.grid), -1)
    compare.boundary(case, table, "aug/vt/geometry", points, EVAL_TOLERANCE)


def _order(case: Case, name: str, head: dict) -> Tensor:
    """For each stored query, keyed by (class, cell), the index of ours."""
    return compare.order_like(keys(head), _stored_keys(case, name))


def keys(head: dict) -> Tensor:
    """[Q 2] class and cell of every query."""
    return torch.stack([head["query_labels"][0], head["query_index"][0]], 1).cpu()


def _stored_keys(case: Case, name: str) -> Tensor:
    return torch.stack([case.outputs[f"{name}/query_{k}"] for k in ("labels", "index")], 1).long()


def _queries(case: Case, table: Table, name: str, head: dict, floor: float) -> None:
    """Queries as a set; then everything that belongs to a query in the stored order."""
    error, note = compare.set_difference(keys(head), _stored_keys(case, name))
    table.add(f"{name}/queries", error, 0.0, note)
    order, flat = _order(case, name, head), tree.flatten(head)
    for key, path in PER_QUERY.items():
        if f"{name}/{key}" in case.outputs:
            shape = case.outputs[f"{name}/{key}"].shape
            x = flat[path].cpu()[:, order]  # 1 Q n
            x = x if x.shape == shape else x.transpose(1, 2) if x.dim() == 3 else x[0]
            compare.boundary(case, table, f"{name}/{key}", x, floor)


# -------------------------------------------------------------------------------------------------------- training


def trained(case: Case, table: Table, outputs: dict, targets: dict, batch: Batch, config: bevfusion.Config) -> None:
    """Queries, targets, and the losses of the same forward with every box; then target assignment by itself."""
    head = tree.map(lambda x: x.detach(), outputs["head"])
    _queries(case, table, "train/head", head, TRAIN_TOLERANCE)
    _targets(case, table, "train", _order(case, "train/head", head), targets)
    if "train_all/loss/loss_heatmap" in case.outputs:
        _all_boxes(case, table, head, config)
    if any(name.startswith("unit/") for name in case.outputs):
        _unit(case, table, config, str(batch.base_aug.device))


def _targets(case: Case, table: Table, name: str, order: Tensor, targets: dict) -> None:
    """Assigned targets per query, in the stored `order` of queries; heatmap target as a set of nonzero cells."""
    ours = {k: targets[k][0].cpu() for k in ("heatmap", "labels", "code", "ious", "match")}
    compare.nonzero(case, table, f"{name}/target/heatmap", ours["heatmap"], TRAIN_TOLERANCE)
    labels = case.outputs[f"{name}/target/labels"]
    compare.differing(table, f"{name}/target/labels", ours["labels"][order], labels, "labels")
    compare.boundary(case, table, f"{name}/target/bbox_targets", ours["code"][order], TRAIN_TOLERANCE)
    error = (ours["ious"][order] - case.outputs[f"{name}/target/ious"]).abs().max()
    table.add(f"{name}/target/ious", float(error), 1e-4, "absolute")
    match = ours["match"]
    position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    pairs = torch.stack([position[match[match >= 0]], torch.nonzero(match >= 0)[:, 0]], 1)
    compare.same_set(case, table, f"{name}/match", pairs)


def _all_boxes(case: Case, table: Table, head: dict, config: bevfusion.Config) -> None:
    """The same forward with every box. Its matching is degenerate (README): the match is compared by total cost, and
    the box loss with the stored match injected."""
    batch = batch_of(case, str(head["pred"][-1]["center"].device), train=False)
    _, terms, targets = loss(case, {"head": head}, batch, config)
    for key in ("loss_heatmap", "layer_-1_loss_cls"):
        error = compare.relative(float(terms[key]), float(case.outputs[f"train_all/loss/{key}"]))
        table.add(f"train_all/loss/{key}", error, TRAIN_TOLERANCE)
    compare.nonzero(case, table, "train_all/target/heatmap", targets["heatmap"][0].cpu(), TRAIN_TOLERANCE)
    cost, match = targets["cost"][0].cpu().double(), targets["match"][0].cpu()
    paired = float(cost[match[match >= 0], torch.nonzero(match >= 0)[:, 0]].sum())
    # A sum of terms of both signs: relative to the terms, not to what is left of them.
    error = abs(paired - case.stats["train_all/match_cost"]) / float(cost.abs().mean() * len(match))
    table.add("train_all/match_cost", error, TRAIN_TOLERANCE)
    query, box = case.outputs["train_all/match"].long().T
    chosen = _order(case, "train/head", head)[query]
    pred = torch.cat([head["pred"][-1][k] for k in BOX], -1)[0].cpu()[chosen]
    code = transfusion_loss.encode_boxes(annotated_boxes(batch)[0], config.head)[0].cpu()[box]
    weights = torch.tensor(config.head.code_weights)
    injected = config.head.bbox_weight * float(((pred - code).abs() * weights).sum()) / len(box)
    error = compare.relative(injected, float(case.outputs["train_all/loss/layer_-1_loss_bbox"]))
    table.add("train_all/loss/layer_-1_loss_bbox", error, TRAIN_TOLERANCE, "stored match injected")


# -------------------------------------------------------------------------------------- target assignment by itself


def _unit(case: Case, table: Table, config: bevfusion.Config, device: str) -> None:
    """Targets and losses alone, on stored predictions near the annotations."""
    spec = case.stats["unit/dense_heatmap_spec"]
    dense = torch.from_numpy(golden.draw("unit/dense_heatmap", spec, case.manifest.get("seed", 0)))
    inputs = {k: case.inputs[f"unit/{k}"].transpose(1, 2).contiguous().to(device) for k in (*BOX, "heatmap")}
    inputs["dense_heatmap"] = dense.to(device)
    batch = batch_of(case, device, train=False)

    def total_loss(values: dict) -> tuple[Tensor, tuple]:
        head = {"dense_heatmap": values["dense_heatmap"], "pred": [{k: values[k] for k in (*BOX, "heatmap")}]}
        total, *rest = loss(case, {"head": head}, batch, config)
        return total, tuple(rest)

    gradients, (total, (terms, targets)) = torch.func.grad_and_value(total_loss, has_aux=True)(inputs)
    compare.boundary(case, table, "unit/cost", targets["cost"][0], TRAIN_TOLERANCE)
    compare.losses(case, table, "unit", {"total": total, **terms}, ABSOLUTE)
    _targets(case, table, "unit", torch.arange(targets["cost"].shape[1]), targets)
    match = linear_assignment(case.outputs["unit/cost"][None], annotated_boxes(batch)[2].cpu())[0]
    paired = float(case.outputs["unit/cost"].double()[match, torch.arange(len(match))].sum())
    table.add("unit/match_cost", compare.relative(paired, case.stats["unit/match_cost"]), 1e-6, "of the stored costs")
    for key, gradient in gradients.items():
        x = gradient if key == "dense_heatmap" else gradient.transpose(1, 2)
        compare.boundary(case, table, f"unit/grad/{key}", x, TRAIN_TOLERANCE)
