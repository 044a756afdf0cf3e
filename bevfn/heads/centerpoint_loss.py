"""Targets and losses of the CenterPoint head: Gaussian heatmaps per task and L1 on the code at each box's cell.

Source: BEVDepth bevdepth/layers/heads/bev_depth_head.py (behaviour); golden cases bevdepth_r50_2key and matrixvt_r50,
`train/target/*` and `train/loss/*`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bevfn import boxes as box_ops
from bevfn import losses
from bevfn.distributed import Replicas
from bevfn.heads.centerpoint import OUTPUTS, Config
from bevfn.heads.transfusion_loss import gaussian_radius


def whole_code(ours: Tensor, theirs: Tensor, weight: Tensor, count: Tensor) -> dict[str, Tensor]:
    """One L1 of all ten numbers, 0-d: codes, predicted and wanted, and their weight [B G 10]; count: boxes, 0-d."""
    return {"bbox": losses.weighted_l1(ours, theirs, weight, count)}


def loss(
    tasks: list[dict[str, Tensor]],
    boxes: Tensor,
    labels: Tensor,
    valid: Tensor,
    *,
    config: Config,
    replicas: Replicas | None = None,
    code: Callable[[Tensor, Tensor, Tensor, Tensor], dict[str, Tensor]] = whole_code,
) -> tuple[Tensor, dict]:
    """Total loss and its terms.

    Args:
        tasks: maps of `centerpoint.apply`.
        boxes: [B G 9] (x, y, z bottom centre, dx, dy, dz, yaw, vx, vy; augmented ego); labels [B G]; valid [B G] bool.
        replicas: normalisers are averaged over them, as published.
        code: the terms of a task's codes by name, see `whole_code`.

    Returns:
        total (0-d) and {"task0/heatmap", "task0/bbox", ... (or `code`'s names), "heatmap", ... (their sums over the tasks),
        "bbox" (the sum of all but the heatmaps'), "num_pos", "bad_boxes" (see `boxes.only_usable`)}, plus "targets": what
        was assigned, for parity and notebooks.
    """
    boxes, valid, bad = box_ops.only_usable(boxes, valid)
    found = targets(boxes, labels, valid, config)
    terms: dict = {}
    for t, maps in enumerate(tasks):
        terms[f"task{t}/heatmap"] = heatmap(maps, found, t, replicas)
        weight, count = wanted(found, t, config, replicas)
        for name, l1 in code(gather_code(maps, found["cell"]), found["code"], weight, count).items():
            terms[f"task{t}/{name}"] = config.bbox_weight * l1
    names = [name.removeprefix("task0/") for name in terms if name.startswith("task0/")]
    for name in names:
        terms[name] = torch.stack([terms[f"task{t}/{name}"] for t in range(len(tasks))]).sum()
    if "bbox" not in names:
        terms["bbox"] = torch.stack([terms[name] for name in names if name != "heatmap"]).sum()
    total = terms["heatmap"] + terms["bbox"]
    return total, {**terms, "num_pos": found["inside"].sum(), "bad_boxes": bad, "targets": found}


def heatmap(maps: dict[str, Tensor], found: dict, task: int, replicas: Replicas | None) -> Tensor:
    """A task's heatmap loss, 0-d; found: `targets`."""
    target = found["heatmaps"][task]
    centres = _mean_count((target == 1).float().sum(), replicas).clamp(min=1.0)
    return losses.gaussian_focal(maps["heatmap"], target, normaliser=centres)


def wanted(found: dict, task: int, config: Config, replicas: Replicas | None) -> tuple[Tensor, Tensor]:
    """A task's weight of every number of `found["code"]` [B G 10], and its number of boxes (0-d), at least 1e-4."""
    member = found["members"][task]
    weight = member[..., None] * member.new_tensor(config.code_weights)
    return weight, _mean_count(member.sum(), replicas).clamp(min=1e-4)


def _mean_count(count: Tensor, replicas: Replicas | None) -> Tensor:
    return count if replicas is None else replicas.mean(count)


def targets(boxes: Tensor, labels: Tensor, valid: Tensor, config: Config) -> dict:
    """What every box asks for.

    Returns:
        "cell" [B G] int64 (y X + x, 0 where outside), "inside" [B G] float 0/1, "code" [B G 10] (0 where outside),
        "members": per task [B G] float 0/1, "heatmaps": per task [B K Y X].

    A box counts if its centre's cell, by truncation toward zero, is in the map: centres up to one cell below the lower
    edge belong to cell 0, with a negative offset.
    """
    Y, X = config.cells
    place = [(boxes[..., a] - config.lower[a]) / config.cell[a] for a in range(2)]  # B G, in cells
    whole = [p.trunc() for p in place]
    inside = valid & (whole[0] >= 0) & (whole[0] < X) & (whole[1] >= 0) & (whole[1] < Y)
    inside = inside & (boxes[..., 3] > 0) & (boxes[..., 4] > 0)  # as published; `loss` gives none with other sizes
    cell = torch.where(inside, whole[1] * X + whole[0], 0.0).to(torch.int64)
    code = torch.where(inside[..., None], encode(boxes, place, whole), 0.0)
    members = [
        (inside & (labels >= first) & (labels < first + count)).float()
        for first, count in zip(config.first_class, config.tasks)
    ]
    heatmaps = _heatmaps(boxes, labels, whole, inside, config).split(list(config.tasks), 1)
    return {"cell": cell, "inside": inside.float(), "code": code, "members": members, "heatmaps": heatmaps}


def encode(boxes: Tensor, place: list[Tensor], whole: list[Tensor]) -> Tensor:
    """[B G 10]: offset in the cell, gravity-centre z (m), log dims, sin and cos of yaw, velocity."""
    offset = torch.stack([p - w for p, w in zip(place, whole)], -1)
    height = boxes[..., 2] + boxes[..., 5] * 0.5
    yaw = boxes[..., 6]
    turn = torch.stack([yaw.sin(), yaw.cos()], -1)
    return torch.cat([offset, height[..., None], box_ops.log_size(boxes), turn, boxes[..., 7:9]], -1)


def gather_code(maps: dict[str, Tensor], cell: Tensor) -> Tensor:
    """The predicted code [B G 10] at cells [B G]."""
    code = torch.cat([maps[name] for name in OUTPUTS], 1).permute(0, 2, 3, 1)  # B Y X 10
    B, Y, X, C = code.shape
    row = torch.arange(B, device=cell.device)[:, None] * (Y * X) + cell
    return code.reshape(-1, C).index_select(0, row.flatten()).view(B, -1, C)


def _heatmaps(boxes: Tensor, labels: Tensor, whole: list[Tensor], inside: Tensor, config: Config) -> Tensor:
    """[B classes Y X]: per class the maximum over its boxes of a Gaussian with radius r and sigma (2r+1)/6 around the
    box's cell, cut to the square |dx|, |dy| <= r; exactly 1 at the cell."""
    size = [boxes[..., 3 + a] / config.cell[a] for a in range(2)]
    radius = gaussian_radius(size[1], size[0], config.gaussian_overlap).trunc().clamp(min=float(config.min_radius))
    return gaussians(whole, radius, labels, inside, cells=config.cells, classes=config.classes)


def gaussians(
    whole: list[Tensor], radius: Tensor, labels: Tensor, inside: Tensor, *, cells: tuple[int, int], classes: int
) -> Tensor:
    """[B classes Y X] of Gaussians as in `targets`, of boxes whose centres lie in column whole[0] and row whole[1] [B G].

    radius [B G], in cells; labels [B G]; inside [B G] bool: which boxes are drawn; cells: (Y, X).
    """
    Y, X = cells
    sigma = (2 * radius + 1) / 6  # B G
    along_x = torch.arange(X, device=radius.device) - whole[0][..., None]  # B G X
    along_y = torch.arange(Y, device=radius.device) - whole[1][..., None]  # B G Y
    near_x = (along_x.abs() <= radius[..., None]) & inside[..., None]
    near_y = along_y.abs() <= radius[..., None]
    squares = along_y.square()[..., :, None] + along_x.square()[..., None, :]  # B G Y X
    gaussian = torch.exp(-squares / (2 * sigma.square())[..., None, None])
    gaussian = torch.where(near_y[..., :, None] & near_x[..., None, :], gaussian, 0.0)
    maps = [torch.where((labels == k)[..., None, None], gaussian, 0.0).max(dim=1)[0] for k in range(classes)]
    return torch.stack(maps, dim=1)
