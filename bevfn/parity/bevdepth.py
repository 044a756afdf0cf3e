"""Parity map of BEVDepth and MatrixVT with their repository: what `goldens/bevdepth_*` and `goldens/matrixvt_*` store.

Frustum points that rounding puts into another cell are counted; behind the pooling the stored cells are used, as the
cases' READMEs advise, so that one point does not hide the rest.
"""

from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from bevfn import tree
from bevfn.data.batch import Base, Batch, annotated_boxes, make
from bevfn.data.reading import CLASS_NAMES
from bevfn.evaluation import results
from bevfn.files import read_json
from bevfn.heads import centerpoint, centerpoint_loss
from bevfn.models import bevdepth, cameras
from bevfn.parity import compare, golden
from bevfn.parity.compare import EVAL_TOLERANCE, TRAIN_TOLERANCE, Table
from bevfn.parity.golden import Case
from bevfn.views import depth_net, matrixvt

MOVED_POINTS = 50  # frustum points that may fall into another cell (READMEs: "a few tens")
ZERO_GRADIENT: tuple[str, ...] = ()  # the cases say which
ABSOLUTE: dict[str, float] = {}

FRAME = {  # stored name: path in a frame's outputs
    "img_stem": "image.backbone.0",
    **{f"img_stage{s}": f"image.backbone.{s}" for s in range(1, 5)},
    "img_neck": "image.neck",
    "mlp_input_raw": "view.depth_net.camera_raw",
    "mlp_input_bn": "view.depth_net.camera",
    "depth_mlp": "view.depth_net.depth_mlp",
    "context_mlp": "view.depth_net.context_mlp",
    "depthnet_reduce": "view.depth_net.reduce",
    "context_se": "view.depth_net.context_gated",
    "depth_se": "view.depth_net.depth_gated",
    "depth_conv_aspp": "view.depth_net.aspp",
    **{f"depth_conv_block{b}": f"view.depth_net.blocks.{b}" for b in range(3)},
    "dcn_offset": "view.depth_net.offset",
    "depth_conv_dcn": "view.depth_net.deform",
    "depth_conv_logits": "view.depth_net.logits",
    "depth_prob": "view.depth",
    "context": "view.depth_net.context",
    "bev": "view.bev",
    # MatrixVT
    "vert_logits": "view.row_logits",
    "depth_reduced": "view.depth_reduced",
    "hori_merger": "view.merged",
    "hori_reduce": "view.reduced",
    "horiconv_out": "view.feature",
}
PATHS = {
    "trunk_stem": "bev.backbone.0",
    **{f"bev_stage{s}": f"bev.backbone.{s}" for s in range(1, 4)},
    "bev_neck": "bev.neck",
    "head_shared": "head.shared",
    **{f"task{t}/{name}": f"head.tasks.{t}.{name}" for t in range(6) for name in (*centerpoint.OUTPUTS, "heatmap")},
}


def config_for(case: Case, published: bevdepth.Config) -> bevdepth.Config:
    return published


def batch_of(case: Case, device: str, *, train: bool) -> Batch:
    """The stored inputs as a batch of one; earlier frames' images are made from the key frame's as the README says."""
    inputs = case.inputs
    frames = [inputs["imgs_u8_rgb"]]
    if len(inputs["ida_mats"]) > 1:
        motion = read_json((case.folder / "augmentation.json").read_bytes())["sweep_motion"]
        moved = torch.roll(frames[0], motion["shift"], dims=2).int()
        frames.append(((7 * moved + 64) // 8).to(torch.uint8))
    depth = torch.zeros(frames[0].shape[:3])
    depth[tuple(inputs["depth_gt_cam_y_x"].long().T)] = inputs["depth_gt_value"]
    boxes = inputs["gt_boxes"].clone()
    boxes[:, 2] -= boxes[:, 5] * 0.5
    made = make(
        base=Base.EGO_AT_CAMERAS,
        base_aug=inputs["bda_mat"][None],
        boxes=boxes[None],
        labels=inputs["gt_labels"][None],
        boxes_valid=torch.ones(1, len(boxes), dtype=torch.bool),
        images=torch.stack(frames)[None],
        intrinsics=inputs["intrin_mats"][None],
        image_aug=inputs["ida_mats"][None],
        base_from_camera=inputs["sensor2ego_mats"][None],
        image_from_base=(inputs["intrin_mats"] @ torch.linalg.inv(inputs["sensor2ego_mats"]))[None],
        depth=depth[None],
    )
    made.validate()
    return made.to(device)


def suffixes(case: Case) -> tuple[str, ...]:
    """What the case puts behind the names of the first and of later frames."""
    return ("_key", "_sweep") if len(case.inputs["ida_mats"]) > 1 else ("",)


def paths(case: Case, *, train: bool) -> dict[str, str]:
    frames = {
        f"{name}{suffix}": f"frames.{t}.{path}"
        for t, suffix in enumerate(suffixes(case))
        for name, path in FRAME.items()
        if not (train and name == "mlp_input_bn")  # see `_camera_norm`
    }
    return frames | PATHS


def loss(case: Case, outputs: dict, batch: Batch, config: bevdepth.Config) -> tuple[Tensor, dict[str, Tensor], dict]:
    detection, terms = centerpoint_loss.loss(outputs["head"]["tasks"], *annotated_boxes(batch), config=config.head)
    depth = cameras.key_frame_depth_loss(outputs, batch, config)
    assert depth is not None
    targets = terms.pop("targets")
    return detection + depth, {**terms, "detection": detection, "depth": depth}, targets


# -------------------------------------------------------------------------------------------------------- geometry


def places(case: Case, table: Table, batch: Batch, config: bevdepth.Config) -> dict[str, Any]:
    """Compares depth labels and where the features go, then hands back the stored places."""
    assert batch.depth is not None
    ours = depth_net.depth_labels(batch.depth[0], config.grid.depth_m, config.grid.stride)
    stored = case.inputs["depth_label_bin"]
    compare.differing(table, "inputs/depth_label_bin", ours, stored, "cells")
    if config.matrix is not None:
        return {"places": [_matrices(case, table, batch, config)]}
    found: list[bevdepth.Place] = []
    for t, suffix in enumerate(suffixes(case)):
        cells = bevdepth.place(batch, t, config)
        assert isinstance(cells, Tensor)
        found.append(_cells(case, table, f"voxel_index{suffix}", cells).int())
    return {"places": found}


def _cells(case: Case, table: Table, name: str, ours: Tensor) -> Tensor:
    """The stored cells [1 ...] of frustum points, few of which ours may have elsewhere."""
    stored = case.outputs[f"eval/{name}"][None]
    compare.differing(table, f"eval/{name}", ours, stored, "points' cells", limit=MOVED_POINTS)
    return stored.long().to(ours.device)


def _matrices(case: Case, table: Table, batch: Batch, config: bevdepth.Config) -> bevdepth.Place:
    points = torch.stack(matrixvt.ray_points(batch, 0, config.grid), -1)[0]
    compare.boundary(case, table, "eval/ray_points_voxel", points, EVAL_TOLERANCE)
    cells = _cells(case, table, "ray_points_index", matrixvt.ray_cells(batch, 0, config.grid))
    ring, ray = matrixvt.matrices(cells, config.grid)
    for name, matrix in (("ring", ring), ("ray", ray)):
        for axis, sums in (("row", matrix.sum(2)), ("col", matrix.sum(1))):
            compare.boundary(case, table, f"eval/{name}_{axis}sum", sums, 0.0)
    return ring, ray


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluated(case: Case, table: Table, outputs: dict, batch: Batch, config: bevdepth.Config) -> None:
    """Detections, the results file, and the decoder alone on synthetic maps with both kinds of suppression."""
    _detections(case, table, "eval", bevdepth.decode(outputs, config), case.noise("eval", "task4/rot"))
    _results(case, table)
    tasks: list[dict[str, Tensor]] = [{} for _ in config.head.tasks]
    for key, spec in case.manifest.get("extra_tensors", {}).items():
        _, task, name = key.split("/")
        tasks[int(task.removeprefix("task"))][name] = torch.from_numpy(golden.draw(key, spec, case.manifest["seed"]))
    for name, head in (("decode_synth", config.head), ("decode_synth_size_aware", centerpoint.size_aware(config.head))):
        if f"{name}/boxes" in case.outputs:
            _detections(case, table, name, centerpoint.decode(tasks, head), 0.0)


def _detections(case: Case, table: Table, name: str, found: dict[str, Tensor], noise: float) -> None:
    """Stored with gravity centres; ours stand on the ground."""
    made = {k: found[k][0][found["valid"][0]].cpu() for k in ("boxes", "scores", "labels")}
    height = made["boxes"][:, 5:6] * made["boxes"].new_tensor([0, 0, 0.5, 0, 0, 0, 0, 0, 0])
    made["boxes"] = made["boxes"] + height
    stored = len(case.outputs[f"{name}/boxes"])
    table.add(f"{name}/boxes/count", abs(len(made["boxes"]) - stored), 0.0, f"{stored} boxes")
    compare.detections(case, table, name, made, (noise, noise))


def _results(case: Case, table: Table) -> None:
    """The results file's entries of every fourth stored box, in the frame of the mean camera pose."""
    path = case.folder / "results_nusc_every4th.json"
    if not path.is_file():
        return
    ((token, stored),) = read_json(path.read_bytes())["results"].items()
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_quat(case.inputs["ego2global_rotation"].numpy()[[1, 2, 3, 0]]).as_matrix()
    pose[:3, 3] = case.inputs["ego2global_translation"].numpy()
    boxes, scores, labels = (case.outputs[f"eval/{k}"][::4].numpy() for k in ("boxes", "scores", "labels"))
    boxes = boxes.astype(np.float64)
    boxes[:, 2] -= boxes[:, 5] * 0.5
    detections = results.Detections(boxes, scores, labels)
    found = results.entries(
        token, detections, class_names=CLASS_NAMES, ego_from_boxes=np.eye(4), global_from_ego=pose, ranges=None
    )
    stored = sorted(stored, key=lambda entry: -entry["detection_score"])
    wrong = abs(len(found) - len(stored)) + sum(
        ours[k] != theirs[k] for ours, theirs in zip(found, stored) for k in ("detection_name", "attribute_name")
    )
    table.add("results/names and attributes", wrong, 0.0, f"of {len(stored)} boxes")
    for key in ("translation", "size", "rotation", "velocity", "detection_score"):
        ours, theirs = (
            torch.tensor([entry[key] for entry in entries], dtype=torch.float64) for entries in (found, stored)
        )
        if key == "rotation":  # q and -q are one rotation
            ours, theirs = (q * torch.where(q[:, 3:] < 0, -1.0, 1.0) for q in (ours, theirs))
        table.add(f"results/{key}", compare.relative_l2(ours, theirs), 1e-6)


# -------------------------------------------------------------------------------------------------------- training


def trained(case: Case, table: Table, outputs: dict, targets: dict, batch: Batch, config: bevdepth.Config) -> None:
    for t, suffix in enumerate(suffixes(case)):
        if f"train/mlp_input_bn{suffix}" in case.outputs:
            _camera_norm(case, table, f"mlp_input_bn{suffix}", outputs["frames"][t]["view"]["depth_net"]["camera"])
    assert batch.labels is not None
    _targets(case, table, batch.labels[0].cpu(), targets, config.head)


def _camera_norm(case: Case, table: Table, name: str, ours: Tensor) -> None:
    """Camera numbers that are the same for all cameras are normalised to rounding / sqrt(eps): compared absolutely."""
    stored = case.outputs[f"train/{name}"]
    raw = case.outputs[f"eval/mlp_input_raw{suffixes(case)[0]}"]
    constant = (raw == raw[:1]).all(0)
    ours = ours.detach().cpu()
    error = float((ours - stored)[:, constant].abs().max()) if bool(constant.any()) else 0.0
    table.add(f"train/{name} (equal columns)", error, 5e-3, f"absolute, {int(constant.sum())} columns")
    error = compare.relative_l2(ours[:, ~constant], stored[:, ~constant])
    table.add(f"train/{name}", error, TRAIN_TOLERANCE)


def _targets(case: Case, table: Table, labels: Tensor, targets: dict, head: centerpoint.Config) -> None:
    """Stored rows of a task: its boxes by class, then in input order."""
    ours = tree.map(lambda x: x.detach().cpu(), {k: targets[k] for k in ("cell", "inside", "code", "heatmaps")})
    for t, (first, count) in enumerate(zip(head.first_class, head.tasks)):
        name = f"train/target/task{t}"
        compare.boundary(case, table, f"{name}/heatmap", ours["heatmaps"][t][0], TRAIN_TOLERANCE)
        rows = torch.cat([torch.nonzero(labels == k)[:, 0] for k in range(first, first + count)])
        mask, index = case.outputs[f"{name}/mask"].bool(), case.outputs[f"{name}/ind"]
        rows = rows[: len(mask)]
        wrong = int((ours["inside"][0, rows].bool() != mask).sum() + (ours["cell"][0, rows] != index)[mask].sum())
        table.add(f"{name}/ind", wrong, 0.0, f"{wrong} of {len(mask)} boxes differ in cell or validity")
        code, stored = ours["code"][0, rows][mask], case.outputs[f"{name}/anno_box"][mask]
        table.add(f"{name}/anno_box", compare.relative_l2(code, stored), TRAIN_TOLERANCE)
