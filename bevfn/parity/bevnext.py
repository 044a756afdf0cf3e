"""Parity map of BEVNeXt with its repository: what `goldens/bevnext_*` store, boundary by boundary.

The cases keep counts of the frustum points per cell, not the cells: points that rounding puts into another cell are
counted, and what lies behind the pooling is compared as it comes.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bevfn import tree
from bevfn.data.batch import Base, Batch, annotated_boxes, make
from bevfn.heads import centerpoint, two_stage
from bevfn.models import bevnext, cameras
from bevfn.parity import compare
from bevfn.parity.compare import EVAL_TOLERANCE, TRAIN_TOLERANCE, Table
from bevfn.parity.golden import Case
from bevfn.views import camera_grid, depth_net

MOVED_POINTS = 20  # frustum points of a frame that may fall into another cell (READMEs: about 1e-5 of 1.45 million)
SHIFT = 4  # pixels by which the image of the frame k back is rolled to the right, times k
CAMERAS = 6
VISIBLE = 10.0  # image widths and heights within which an anchor's place is compared (README: of order 1)
# README of stage 1: biases right before a batch norm, and a bias whose L1 loss has as many signs of either kind.
ZERO_GRADIENT: tuple[str, ...] = (
    "img_view_transformer.depth_net.reduce_conv.0.bias",
    "depth_emb.0.bias",
    "pts_bbox_head.task_heads.0.vel.1.bias",
)
ABSOLUTE: dict[str, float] = {}

PATHS = {  # stored name: path in outputs
    **{f"img_backbone/layer{s}": f"frames.0.image.backbone.{s}" for s in range(1, 5)},
    "img_neck": "frames.0.image.neck",
    **{
        f"depth_net/{theirs}": f"frames.0.view.depth_net.{ours}"
        for theirs, ours in {
            "mlp_input": "camera_raw",
            "mlp_input_bn": "camera",
            "reduce_conv": "reduce",
            "depth_mlp": "depth_mlp",
            "context_mlp": "context_mlp",
            "depth_se": "depth_gated",
            "context_se": "context_gated",
            "depth_conv_2": "blocks.2",
            "depth_conv_3_aspp": "aspp",
            "dcn_offset": "offset",
            "dcn_out": "deform",
        }.items()
    },
    "crf/patch_color": "colours",
    "crf/kernel": "likeness",
    "crf/q0_softmax": "frames.0.view.crf.start",
    "crf/q1": "frames.0.view.crf.first",
    "bev_cat": "bev.map",
    "bev_fusion": "bev.backbone.0",
    **{f"bev_encoder_backbone/{s}": f"bev.backbone.{s + 1}" for s in range(3)},
    "bev_encoder_neck": "bev.neck",
    "proposal_head/shared_conv": "head.proposal.shared",
    **{f"proposal_head/task{t}/heatmap_logits": f"head.proposal.tasks.{t}.heatmap" for t in range(6)},
    "depth_emb": "head.depth_embedding",
    "perspective/feats_2d": "head.refine.features",
    "perspective/shared_conv": "head.refine.shared",
    "perspective/bev_query": "head.refine.query",
    "perspective/cross_attn": "head.refine.attention",
    **{f"perspective/{name}": f"head.refine.{name}" for name in ("norm0", "ffn", "out")},
    "bbox_head/shared_conv": "head.bbox.shared",
    **{f"bbox_head/task{t}/{name}": f"head.bbox.tasks.{t}.{name}" for t in range(6) for name in centerpoint.OUTPUTS},
}
FRAME = {  # the same of every frame
    "depth_net/depth_logits": "depth_net.logits",
    "depth_net/context": "depth_net.context",
    "crf/depth_prob": "depth",
    "bev_pool": "bev",
    "pre_process": "map",
}


def config_for(case: Case, published: bevnext.Config) -> bevnext.Config:
    return published


def frames(case: Case) -> int:
    """Key frames that the case's calibration has."""
    return len(case.inputs["sample0/rots"]) // CAMERAS


def batch_of(case: Case, device: str, *, train: bool) -> Batch:
    """The stored samples: the first in evaluation, and in training both, or the second where it is alone."""
    count = len(case.outputs["train/target/depth_bin"]) // CAMERAS if train else 1
    chosen = range(2 - count, 2) if train else range(1)
    made = batch(case.inputs, chosen, frames=frames(case))
    made.validate()
    return made.to(device)


def batch(inputs: Mapping[str, Tensor], chosen: Iterable[int], *, frames: int) -> Batch:
    """Stored samples with so many of their key frames."""
    samples = [_sample(inputs, f"sample{i}", frames) for i in chosen]
    room = max(len(sample["labels"]) for sample in samples)
    for sample in samples:
        rows = len(sample["labels"])
        sample["boxes_valid"] = torch.arange(room) < rows
        sample["boxes"] = F.pad(sample["boxes"], (0, 0, 0, room - rows))
        sample["labels"] = F.pad(sample["labels"], (0, room - rows))
    fields = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return make(base=Base.EGO_AT_FRONT, **fields)


def _sample(inputs: Mapping[str, Tensor], name: str, T: int) -> dict[str, Tensor]:
    """Fields of a batch without their first axis. Earlier frames' images are the key frame's, rolled as the README says."""
    stored = {key.removeprefix(f"{name}/"): x for key, x in inputs.items() if key.startswith(f"{name}/")}
    canvas = stored["canvas"]

    def homogeneous(matrix: Tensor, offset: Tensor | None = None) -> Tensor:
        """[... 3 3] and [... 3] -> [... 4 4]."""
        wide = F.pad(matrix, (0, 1, 0, 1))
        wide[..., 3, 3] = 1.0
        if offset is not None:
            wide[..., :3, 3] = offset
        return wide

    def of_frames(name: str, offset: str | None = None) -> Tensor:
        """[T N 4 4]."""
        matrices = homogeneous(stored[name], None if offset is None else stored[offset])
        return matrices.view(-1, CAMERAS, 4, 4)[:T]

    K, pose = of_frames("intrins"), of_frames("rots", "trans")
    depth = torch.zeros(canvas.shape[:3])
    depth.view(-1)[stored["gt_depth_index"].long()] = stored["gt_depth_value"]
    return {
        "base_aug": homogeneous(stored["bda"]),
        "boxes": stored["gt_boxes"],
        "labels": stored["gt_labels"],
        "images": torch.stack([torch.roll(canvas, SHIFT * t, dims=2) for t in range(T)]),
        "intrinsics": K,
        "image_aug": of_frames("post_rots", "post_trans"),
        "base_from_camera": pose,
        "image_from_base": K @ torch.linalg.inv(pose),
        "depth": depth,
    }


def paths(case: Case, *, train: bool) -> dict[str, str]:
    per_frame = {
        f"{name}/frame{t}": f"frames.{t}.view.{path}" for t in range(frames(case)) for name, path in FRAME.items()
    }
    return PATHS | per_frame


def loss(case: Case, outputs: dict, batch: Batch, config: bevnext.Config) -> tuple[Tensor, dict[str, Tensor], dict]:
    detection, terms = two_stage.loss(outputs["head"], *annotated_boxes(batch), config=config.head)
    depth = cameras.key_frame_depth_loss(outputs, batch, config)
    assert depth is not None
    targets = terms.pop("targets")
    named = {name.replace("/", ".loss_"): term for name, term in terms.items() if name.startswith("task")}
    return detection + depth, {**named, "loss_depth": depth}, targets


# -------------------------------------------------------------------------------------------------------- geometry


def places(case: Case, table: Table, batch: Batch, config: bevnext.Config) -> dict[str, Any]:
    """Compares where frustum points lie and how many are in the grid; nothing is handed back."""
    found = _points(case, table, "eval", batch, config)
    name = "eval/view_transform"
    stored = case.outputs[f"{name}/points_per_cell"]
    ours = torch.bincount(found[found >= 0], minlength=stored.numel()).view(stored.shape)
    moved = float((ours - stored).abs().sum()) / 2
    note = f"{moved:g} of {int(stored.sum()):,} points are in another cell"
    table.add(f"{name}/points_per_cell", moved, MOVED_POINTS, note)
    point, cell, pixel = (case.outputs[f"{name}/ranks_{k}_sorted"].long() for k in ("depth", "bev_of", "feat_of"))
    compare.differing(table, f"{name}/ranks_bev_of_sorted", found[point], cell, "points' cells", limit=MOVED_POINTS)
    pixels = config.grid.feature_size
    per_image = pixels[0] * pixels[1]
    own = point // (per_image * config.grid.depth_bins) * per_image + point % per_image
    compare.differing(table, f"{name}/ranks_feat_of_sorted", own, pixel, "points' pixels")
    return {}


def _points(case: Case, table: Table, phase: str, batch: Batch, config: bevnext.Config) -> Tensor:
    """The key frame's cells, flat, int64 on the CPU; compares points of the frames that are stored and counts of all."""
    cells = []
    for t in range(frames(case)):
        name = f"{phase}/view_transform"
        points = camera_grid.frustum_points(batch, t, config.grid)
        if f"{name}/frustum_points/frame{t}" in case.outputs:
            stacked = torch.stack(torch.broadcast_tensors(*points), -1)
            compare.boundary(case, table, f"{name}/frustum_points/frame{t}", stacked, EVAL_TOLERANCE)
        cells.append(camera_grid.locate(points, config.grid).flatten().cpu().long())
        stored = case.stats["tensors"][f"{name}/ranks/frame{t}"]
        kept = int((cells[-1] >= 0).sum())
        note = f"{kept} points in the grid"
        table.add(f"{name}/ranks/frame{t}", abs(kept - stored["points"]), MOVED_POINTS, note)
    return cells[0]


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluated(case: Case, table: Table, outputs: dict, batch: Batch, config: bevnext.Config) -> None:
    """Anchors, candidates of every task before the suppression, detections behind it."""
    _anchors(case, table, "eval", outputs["head"]["refine"])
    first = ("bboxes", "scores", "labels")
    for t, maps in enumerate(outputs["head"]["tasks"]):
        found = centerpoint.candidates(maps, config.head.head)
        _detections(case, table, f"eval/decoded/task{t}", found, first)
    found = bevnext.decode(outputs, config)
    _detections(case, table, "eval/result", found, ("boxes_3d", "scores_3d", "labels_3d"))


def _detections(case: Case, table: Table, name: str, found: dict[str, Tensor], called: tuple[str, str, str]) -> None:
    made = {k: found[k][0][found["valid"][0]].cpu() for k in ("boxes", "scores", "labels")}
    noise = tuple(case.noise("eval", f"{name.removeprefix('eval/')}/{k}") for k in called[:2])
    stored = len(case.outputs[f"{name}/{called[0]}"])
    table.add(f"{name}/count", abs(len(made["boxes"]) - stored), 0.0, f"{stored} boxes")
    compare.detections(case, table, name, made, (noise[0], noise[1]), called)


def _anchors(case: Case, table: Table, phase: str, refine: dict[str, Tensor]) -> None:
    """Where they are visible, or nearly; which of them count; and the queries' places, the same for all samples."""
    name = f"{phase}/perspective"
    stored = case.outputs[f"{name}/reference_points_cam"]
    ours = refine["reference"].detach().transpose(0, 1).cpu()  # N B Q P 2
    ours = compare.sliced(ours, case.slicing(f"{name}/reference_points_cam"))
    seen = (stored.abs() < VISIBLE).all(-1)
    error = compare.relative_l2(ours[seen], stored[seen])
    table.add(f"{name}/reference_points_cam", error, EVAL_TOLERANCE, f"{int(seen.sum())} of {seen.numel()} anchors")
    stored = case.outputs[f"{name}/mask"].bool()
    ours = compare.sliced(refine["mask"].transpose(0, 1).cpu(), case.slicing(f"{name}/mask"))
    compare.differing(table, f"{name}/mask", ours, stored, "anchors")
    shape = case.shape(f"{name}/bev_pos")
    assert shape is not None
    compare.boundary(case, table, f"{name}/bev_pos", refine["position"].expand(shape), EVAL_TOLERANCE)


# -------------------------------------------------------------------------------------------------------- training


def trained(case: Case, table: Table, outputs: dict, targets: dict, batch: Batch, config: bevnext.Config) -> None:
    _points(case, table, "train", batch, config)
    _anchors(case, table, "train", outputs["head"]["refine"])
    assert batch.depth is not None and batch.labels is not None and batch.boxes_valid is not None
    ours = depth_net.depth_labels(batch.depth.flatten(0, 1), config.grid.depth_m, config.grid.stride) + 1
    stored = case.outputs["train/target/depth_bin"]
    compare.differing(table, "train/target/depth_bin", ours, stored.long(), "cells")
    made = {k: targets[k] for k in ("cell", "inside", "code", "heatmaps")}
    made |= {"labels": torch.where(batch.boxes_valid, batch.labels, -1)}
    made = tree.map(lambda x: x.detach().cpu(), made)
    for t in range(len(config.head.head.tasks)):
        _targets(case, table, t, made, config.head.head)


def _targets(case: Case, table: Table, t: int, ours: dict, head: centerpoint.Config) -> None:
    """Heatmaps by their nonzero cells; boxes by their slots, which count a sample's boxes of the task class by class."""
    name = f"train/target/task{t}"
    compare.nonzero(case, table, f"{name}/heatmap", ours["heatmaps"][t], TRAIN_TOLERANCE)
    first, count = head.first_class[t], head.tasks[t]
    sample, slot = case.outputs[f"{name}/slot"].long().T
    ordered = [
        torch.cat([torch.nonzero(labels == k)[:, 0] for k in range(first, first + count)]) for labels in ours["labels"]
    ]
    rows = torch.stack([ordered[b][k] for b, k in zip(sample.tolist(), slot.tolist())])
    mine = (ours["labels"] >= first) & (ours["labels"] < first + count) & ours["inside"].bool()
    wrong = abs(int(mine.sum()) - len(rows)) + int((~mine[sample, rows]).sum())
    wrong += int((ours["cell"][sample, rows] != case.outputs[f"{name}/ind"]).sum())
    table.add(f"{name}/ind", wrong, 0.0, f"{wrong} of {len(rows)} boxes differ in cell or validity")
    error = compare.relative_l2(ours["code"][sample, rows], case.outputs[f"{name}/anno_box"])
    table.add(f"{name}/anno_box", error, TRAIN_TOLERANCE)
