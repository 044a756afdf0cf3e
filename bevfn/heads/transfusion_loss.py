"""Targets and losses of the TransFusion head: exact bipartite matching and Gaussian centre heatmaps, in the graph.

Source: mmdetection3d projects/BEVFusion/bevfusion/{transfusion_head,utils}.py, mmdet3d/models/utils/gaussian.py
(behaviour); TransFusion (Bai et al. 2022) section 3.5; golden cases bevfusion_lidar `train/*` and `unit/*`.
"""

import torch
from torch import Tensor

from bevfn import boxes as box_ops
from bevfn import losses
from bevfn.distributed import Train
from bevfn.heads.transfusion import Config, decode_boxes
from bevfn.kernels.linear_assignment import linear_assignment


def loss(
    outputs: dict,
    boxes: Tensor,
    labels: Tensor,
    valid: Tensor,
    *,
    config: Config,
    train: Train = True,
    match: Tensor | None = None,
) -> tuple[Tensor, dict]:
    """Total loss and its terms.

    Args:
        outputs: of `transfusion.apply`.
        boxes: [B G 9] (x, y, z bottom centre, dx, dy, dz, yaw, vx, vy); labels [B G] int64; valid [B G] bool.
        train: `Replicas` normalises by the positives of all replicas, see `losses.positives`.
        match: [B G] query of each box (-1: none) in place of the cheapest matching, of which there may be several.

    Returns:
        total (0-d) and {"heatmap", "cls", "bbox" (of the last layer; earlier ones "layer_i/..."), "matched_iou",
        "num_pos", "bad_boxes" (see `boxes.only_usable`)}, plus "targets": what was assigned, for parity and notebooks.
    """
    boxes, valid, bad = box_ops.only_usable(boxes, valid)
    heat = heatmap_target(boxes, labels, valid, config)
    total = terms_heatmap = losses.gaussian_focal(outputs["dense_heatmap"], heat, train=train)
    terms = {"heatmap": terms_heatmap}
    targets: dict = {"heatmap": heat}
    for layer, pred in enumerate(outputs["pred"]):
        assigned = assign(pred, boxes, labels, valid, config, match)
        count = losses.positives(assigned["positive"], train)
        cls = losses.sigmoid_focal(pred["heatmap"], assigned["one_hot"], count)
        code = torch.cat([pred[name] for name in ("center", "height", "dim", "rot", "vel")], dim=-1)  # B Q 10
        weight = assigned["positive"][..., None] * code.new_tensor(config.code_weights)
        bbox = config.bbox_weight * losses.weighted_l1(code, assigned["code"], weight, count)
        total = total + cls + bbox
        prefix = "" if layer == len(outputs["pred"]) - 1 else f"layer_{layer}/"
        terms |= {f"{prefix}cls": cls, f"{prefix}bbox": bbox}
        targets |= assigned
    terms["matched_iou"] = targets["mean_iou"]
    terms["num_pos"] = targets["positive"].sum()
    return total, {**terms, "bad_boxes": bad, "targets": targets}


def matching_cost(pred: dict[str, Tensor], boxes: Tensor, labels: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """(cost [B Q G], 3-D IoU [B Q G]) of giving box g to query q; no gradient, float32.

    cost = w_cls (focal cost of the box's class) + w_center |centre difference|_1 / map size - w_iou IoU, with boxes
    decoded from the raw heads, unfiltered.
    """
    decoded = decode_boxes({k: v.detach().float() for k, v in pred.items()}, config)  # B Q 9
    p = torch.sigmoid(pred["heatmap"].detach().float())  # B Q K
    negative = -(1 - p + 1e-12).log() * 0.75 * p.pow(2)
    positive = -(p + 1e-12).log() * 0.25 * (1 - p).pow(2)
    of_label = labels.clamp(min=0)[:, None, :].expand(-1, p.shape[1], -1)  # B Q G
    classification = torch.gather(positive - negative, 2, of_label)
    extent = boxes.new_tensor([config.cells[a] * config.stride * config.voxel[a] for a in range(2)])
    lower = boxes.new_tensor(config.lower)
    ours, theirs = (decoded[..., :2] - lower) / extent, (boxes[..., :2] - lower) / extent
    distance = (ours[:, :, None] - theirs[:, None]).abs().sum(-1)  # B Q G
    iou = box_ops.iou_3d(decoded, boxes)
    weights = config.matching
    return weights.classification * classification + weights.center * distance - weights.iou * iou, iou


def assign(
    pred: dict[str, Tensor],
    boxes: Tensor,
    labels: Tensor,
    valid: Tensor,
    config: Config,
    match: Tensor | None = None,
) -> dict[str, Tensor]:
    """One-to-one targets of every query, by the cheapest matching or the one given.

    Returns:
        "match" [B G] query of each box or -1, "cost" [B Q G], "positive" [B Q] float, "labels" [B Q] (classes =
        background), "one_hot" [B Q K], "code" [B Q 10] regression targets, "ious" [B Q], "mean_iou" 0-d.
    """
    _B, Q = pred["center"].shape[:2]
    cost, iou = matching_cost(pred, boxes, labels, config)
    match = linear_assignment(cost, valid) if match is None else match  # B G
    matched = (match[:, None, :] == torch.arange(Q, device=match.device)[None, :, None]).float()  # B Q G, 0/1
    positive = matched.sum(-1)  # B Q
    classes = torch.arange(config.classes, device=labels.device)
    one_hot = torch.bmm(matched, (labels[..., None] == classes).float())  # B Q K
    label = torch.where(positive > 0, torch.bmm(matched, labels[..., None].float())[..., 0], float(config.classes))
    ious = (matched * torch.where(matched > 0, iou, torch.zeros_like(iou))).sum(-1).clamp(0.0, 1.0)  # B Q
    per_sample = ious.sum(-1) / positive.sum(-1).clamp(min=1.0)
    code = torch.bmm(matched, torch.where(valid[..., None], encode_boxes(boxes, config), 0.0))  # B Q 10
    return {
        "match": match,
        "cost": cost,
        "positive": positive,
        "labels": label.long(),
        "one_hot": one_hot,
        "code": code,
        "ious": ious,
        "mean_iou": per_sample.mean(),
    }


def encode_boxes(boxes: Tensor, config: Config) -> Tensor:
    """[... 9] boxes -> [... 10]: centre (cells), gravity-centre z (m), log dims, sin and cos of yaw, velocity."""
    center = [(boxes[..., a] - config.lower[a]) / (config.stride * config.voxel[a]) for a in range(2)]
    height = boxes[..., 2] + boxes[..., 5] * 0.5
    yaw = boxes[..., 6]
    head = torch.stack([*center, height], -1)
    return torch.cat([head, box_ops.log_size(boxes), torch.stack([yaw.sin(), yaw.cos()], -1), boxes[..., 7:9]], -1)


def heatmap_target(boxes: Tensor, labels: Tensor, valid: Tensor, config: Config) -> Tensor:
    """[B K X Y]: per class the maximum over its boxes of a Gaussian of radius r and sigma (2r+1)/6 around the cell of
    the box's centre, cut to the square |dx|, |dy| <= r; exactly 1 at the centre cell."""
    X, Y = config.cells
    cell = [(boxes[..., a] - config.lower[a]) / config.voxel[a] / config.stride for a in range(2)]  # B G, in cells
    size = [boxes[..., 3 + a] / config.voxel[a] / config.stride for a in range(2)]  # dx, dy in cells
    radius = gaussian_radius(size[1], size[0], config.gaussian_overlap)
    radius = radius.trunc().clamp(min=float(config.min_radius))  # B G
    sigma = (2 * radius + 1) / 6
    # The published code truncates toward zero; boxes are inside the map, where that is floor.
    offset_x = torch.arange(X, device=boxes.device).view(1, 1, X) - cell[0].trunc()[..., None]  # B G X
    offset_y = torch.arange(Y, device=boxes.device).view(1, 1, Y) - cell[1].trunc()[..., None]  # B G Y
    drawn = valid & (size[0] > 0) & (size[1] > 0)
    near_x = (offset_x.abs() <= radius[..., None]) & drawn[..., None]
    near_y = offset_y.abs() <= radius[..., None]
    squares = offset_x.square()[..., :, None] + offset_y.square()[..., None, :]  # B G X Y
    gaussian = torch.exp(-squares / (2 * sigma.square())[..., None, None])
    gaussian = torch.where(near_x[..., :, None] & near_y[..., None, :], gaussian, 0.0)
    maps = [torch.where((labels == k)[..., None, None], gaussian, 0.0).max(dim=1)[0] for k in range(config.classes)]
    return torch.stack(maps, dim=1)


def gaussian_radius(height: Tensor, width: Tensor, overlap: float) -> Tensor:
    """CornerNet's radius as the published code computes it, in the units of height and width.

    Each of the three quadratics' larger roots is taken as (b + sqrt(b^2 - 4ac)) / 2, without dividing by a: wrong, but
    every published heatmap was drawn with it.
    """
    b1 = height + width
    c1 = width * height * (1 - overlap) / (1 + overlap)
    b2 = 2 * (height + width)
    c2 = (1 - overlap) * width * height
    b3 = -2 * overlap * (height + width)
    c3 = (overlap - 1) * width * height
    roots = [
        (b + torch.sqrt((b * b - 4 * a * c).clamp(min=0.0))) / 2
        for a, b, c in ((1.0, b1, c1), (4.0, b2, c2), (4.0 * overlap, b3, c3))
    ]
    return torch.minimum(torch.minimum(roots[0], roots[1]), roots[2])
