"""Parity map of TIER IV's BEVFusion: what `goldens/awml_*` store, boundary by boundary.

The network is BEVFusion's; the stored names and parts are others, and in training all boxes of the frame are matched.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from bevfn import tree
from bevfn.data.batch import Base, Batch, annotated_boxes, make
from bevfn.heads import transfusion, transfusion_loss
from bevfn.kernels.linear_assignment import linear_assignment
from bevfn.models import bevfusion as model
from bevfn.parity import bevfusion, compare
from bevfn.parity.compare import EVAL_TOLERANCE, TRAIN_TOLERANCE, Table
from bevfn.parity.golden import Case
from bevfn.views import camera_grid

PATHS = {  # stored name: path in outputs
    "pts_bev": "lidar.bev",
    "fused": "fuser",
    **{f"pts_backbone/{i}": f"bev.backbone.{i}" for i in range(2)},
    "pts_neck": "bev.neck",
    "head/shared": "head.shared",
    "head/dense_heatmap_logits": "head.dense_heatmap",
    **{f"img_backbone/{i}": f"camera.backbone.{i}" for i in range(3)},
    "img_neck": "camera.neck.0",
    "view/dtransform": "camera.view.depth_transform",
    "view/depthnet": "camera.view.depth_net",
    "view/geometry": "camera.view.geometry",
    "view/pooled": "camera.view.bev_pool",
    "view/bev": "camera.view.bev",
}
IN_TRAINING = {  # stored name: that of the evaluation
    "dense_heatmap_logits": "head/dense_heatmap_logits",
    "cam_bev": "view/bev",
}
SITES = {  # active sites of a stage
    "conv_input": "lidar.conv_input",
    **{f"encoder_layer{i + 1}": f"lidar.stages.{i}" for i in range(4)},
    "conv_out": "lidar.conv_out",
}
PER_QUERY = {"head/query_feat": "decoder_out"} | {
    f"pred/{k}": f"pred.0.{k}" for k in (*bevfusion.BOX, "heatmap", "query_heatmap_score")
}
ABSOLUTE = bevfusion.ABSOLUTE
ZERO_GRADIENT = (
    *bevfusion.ZERO_GRADIENT,
    "view_transform.dtransform.net.0.weight",  # the scale of a one-channel input in front of a batch norm
)


def config_for(case: Case, published: model.Config) -> model.Config:
    """Capacities of voxels and sites that this case's points cannot overflow by much: overflow is compared too."""
    train, test = (
        min(len(case.inputs[f"{prefix}points"]), most)
        for prefix, most in zip(("train_", ""), published.voxels.max_voxels)
    )
    room = max(train, test)
    return model.with_capacities(published, (train, test), (3 * room, 2 * room, room, room))


def batch_of(case: Case, device: str, *, train: bool) -> Batch:
    """The stored inputs as a batch of one; in training augmented, with made-up boxes beside the frame's."""
    prefix, inputs = ("train_" if train else ""), case.inputs
    points, boxes = inputs[f"{prefix}points"][None], inputs[f"{prefix}gt_boxes"][None]
    fields = {
        "points": points,
        "points_valid": torch.ones(points.shape[:2], dtype=torch.bool),
        "boxes": boxes,
        "labels": inputs[f"{prefix}gt_labels"][None],
        "boxes_valid": torch.ones(boxes.shape[:2], dtype=torch.bool),
    }
    if "imgs" in inputs:
        rows_first = inputs | {"imgs": inputs["imgs"].permute(0, 2, 3, 1)}  # N 3 H W stored
        fields |= bevfusion.cameras_of(rows_first, "img_aug_matrix")
    base_aug = inputs["train_lidar_aug_matrix"] if train else torch.eye(4)
    return make(base=Base.LIDAR, base_aug=base_aug[None], **fields).to(device)


def paths(case: Case, *, train: bool) -> dict[str, str]:
    return PATHS | {name: PATHS[other] for name, other in IN_TRAINING.items()}


places = bevfusion.places


def loss(case: Case, outputs: dict, batch: Batch, config: model.Config) -> tuple[Tensor, dict[str, Tensor], dict]:
    """With the stored match: queries to one side of two boxes of a class match either, at the same cost (see `_matched`)."""
    boxes, labels, valid = annotated_boxes(batch)
    match = _stored_match(case, outputs["head"], boxes, config).to(boxes.device)
    total, terms = transfusion_loss.loss(outputs["head"], boxes, labels, valid, config=config.head, match=match)
    return total, bevfusion.named(terms), terms["targets"]


def _stored_match(case: Case, head: dict, boxes: Tensor, config: model.Config) -> Tensor:
    """[1 G]: of every box, the query that has its code among the stored targets."""
    query = torch.nonzero(case.outputs["train/target/bbox_weights"][0].sum(-1))[:, 0]
    wanted = case.outputs["train/target/bbox_targets"][0][query].double()
    code = transfusion_loss.encode_boxes(boxes, config.head)[0].cpu().double()
    which, box = (torch.from_numpy(i) for i in linear_sum_assignment(torch.cdist(wanted, code).numpy()))
    match = torch.full((len(code),), -1)
    match[box] = _order(case, "train", head)[query[which]]
    return match[None]


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluated(case: Case, table: Table, outputs: dict, batch: Batch, config: model.Config) -> None:
    outputs = tree.map(lambda x: x.cpu(), outputs)
    if config.lidar is not None:
        _voxels(case, table, outputs["voxels"])
        for name, path in SITES.items():
            _sites(case, table, f"eval/sparse/{name}", bevfusion.at(outputs, path))
    if config.camera is not None:
        _depth_image(case, table, "eval", outputs)
        _kept(case, table, outputs["camera"]["view"]["geometry"], config.camera.view.grid)
    _queries(case, table, "eval", outputs["head"], EVAL_TOLERANCE)
    found = transfusion.decode(outputs["head"], config.head)
    made = {key: found[key][0][found["valid"][0]] for key in ("boxes", "scores", "labels")}
    compare.detections(case, table, "eval", made, (case.noise("eval", "boxes"), case.noise("eval", "scores")))


def _voxels(case: Case, table: Table, ours: dict[str, Tensor]) -> None:
    """All coordinates and counts, the features of some, in the stored order."""
    filled = ours["count"][0] > 0
    coords = ours["coords"][0][filled]
    compare.same_set(case, table, "eval/voxel/coords", coords)
    order = compare.order_like(coords, case.outputs["eval/voxel/coords"])
    count, stored = ours["count"][0][filled][order], case.outputs["eval/voxel/num_points"]
    compare.differing(table, "eval/voxel/num_points", count, stored, "voxels' counts")
    compare.boundary(case, table, "eval/voxel/mean_feats", ours["features"][0][filled][order], EVAL_TOLERANCE)


def _sites(case: Case, table: Table, name: str, ours: dict[str, Tensor]) -> None:
    """Some of the active sites are stored, of all of them the number and the sum of their coordinates."""
    coords, about = ours["coords"][ours["valid"]][:, 1:], case.stats[name]
    sums = [len(coords), *coords.long().sum(0).tolist()]
    wrong = sum(a != b for a, b in zip(sums, [about["active"], *about["coord_sum"]]))
    table.add(
        f"{name}/coords", wrong, 0.0, f"{wrong} of {len(sums)} differ: number of sites, and sums of their coordinates"
    )
    stored = case.outputs[f"{name}/coords"]
    order = compare.order_like(coords, stored)
    compare.differing(table, f"{name}/coords (stored)", coords[order], stored, "coordinates")
    error = compare.relative_l2(ours["features"][ours["valid"]][order], case.outputs[f"{name}/feats"])
    floor = 10 * case.noise("eval", name.removeprefix("eval/"))
    table.add(f"{name}/feats", error, max(EVAL_TOLERANCE, floor))


def _depth_image(case: Case, table: Table, phase: str, outputs: dict) -> None:
    image = outputs["camera"]["view"]["depth_map"]
    compare.nonzero(case, table, f"{phase}/view/depth", image.detach().cpu().flatten(), EVAL_TOLERANCE)


def _kept(case: Case, table: Table, geometry: Tensor, grid: camera_grid.Config) -> None:
    """How many points of the frustums fall into the grid, and into how many cells."""
    cell = camera_grid.locate(geometry.unbind(-1), grid)
    cell = cell[cell >= 0]
    stored = case.stats["eval/view/kept"]
    for key, count in (("kept", len(cell)), ("cells", len(cell.unique()))):
        # A point whose cell is undecided in float32 may change either.
        table.add(f"eval/view/kept/{key}", compare.relative(count, stored[key]), 1e-4, f"{count} of {stored[key]}")


def _order(case: Case, phase: str, head: dict) -> Tensor:
    """For each stored query, keyed by (class, cell), the index of ours."""
    return compare.order_like(bevfusion.keys(head), _stored_keys(case, phase))


def _stored_keys(case: Case, phase: str) -> Tensor:
    return torch.stack([case.outputs[f"{phase}/head/query_{k}"] for k in ("class", "cell")], 1).long()


def _queries(case: Case, table: Table, phase: str, head: dict, floor: float) -> None:
    """Queries as a set; then everything that belongs to a query in the stored order."""
    error, note = compare.set_difference(bevfusion.keys(head), _stored_keys(case, phase))
    table.add(f"{phase}/head/queries", error, 0.0, note)
    order, flat = _order(case, phase, head), tree.flatten(head)
    for key, path in PER_QUERY.items():
        if f"{phase}/{key}" in case.outputs:
            compare.boundary(case, table, f"{phase}/{key}", flat[path].cpu()[:, order].transpose(1, 2), floor)


# -------------------------------------------------------------------------------------------------------- training


def trained(case: Case, table: Table, outputs: dict, targets: dict, batch: Batch, config: model.Config) -> None:
    """Depth image, queries and targets."""
    if config.camera is not None:
        _depth_image(case, table, "train", outputs)
    head = tree.map(lambda x: x.detach(), outputs["head"])
    _queries(case, table, "train", head, TRAIN_TOLERANCE)
    order = _order(case, "train", head)
    _matched(table, targets, annotated_boxes(batch)[2])
    ours = {k: targets[k][0].cpu() for k in ("heatmap", "labels", "code", "ious", "positive")}
    compare.nonzero(case, table, "train/target/heatmap", ours["heatmap"].flatten(), TRAIN_TOLERANCE)
    stored = {k: case.outputs[f"train/target/{k}"][0] for k in ("labels", "bbox_weights", "bbox_targets", "ious")}
    compare.differing(table, "train/target/labels", ours["labels"][order], stored["labels"], "labels")
    positive = (stored["bbox_weights"].sum(-1) > 0).float()
    compare.differing(table, "train/target/positive", ours["positive"][order], positive, "queries")
    error = compare.relative_l2(ours["code"][order], stored["bbox_targets"])
    table.add("train/target/bbox_targets", error, TRAIN_TOLERANCE)
    error = float((ours["ious"][order] - stored["ious"]).abs().max())
    table.add("train/target/ious", error, 1e-4, "absolute")


def _matched(table: Table, targets: dict[str, Tensor], valid: Tensor) -> None:
    """The stored match costs what the cheapest does: of two queries beyond two boxes of a class, seen along both axes, either
    matches either, as the cost of distance is |x| + |y|."""
    cost, stored = (targets[k].detach().cpu() for k in ("cost", "match"))
    cheapest = linear_assignment(cost, valid.cpu())
    totals = [float(cost[0].double().T[torch.arange(cost.shape[2]), match[0]].sum()) for match in (stored, cheapest)]
    # A sum of terms of both signs: relative to the terms, not to what is left of them.
    error = abs(totals[0] - totals[1]) / float(cost.abs().mean() * cost.shape[2])
    other = int((stored != cheapest).sum())
    table.add("train/match_cost", error, TRAIN_TOLERANCE, f"of the stored match; {other} boxes matched otherwise here")
