"""Non-maximum suppression with static shapes: greedy, by score, within each task.

Source: mmdetection3d circle_nms and box3d_multiclass_nms, BEVStereo's size-aware circle NMS, BEVDet's scaled NMS (Huang
et al. 2021, arXiv 2112.11790), behaviour only; golden cases bevdepth_r50_2key and bevnext_stage1.
"""

from typing import Literal

import torch
from torch import Tensor

from bevfn import boxes as box_ops

Kind = Literal["circle", "size_aware_circle", "rotated"]
"""what makes two boxes near: their centres; the axis-parallel rectangles around them, scaled; their IoU seen from above"""


def greedy(pairs: Tensor, valid: Tensor, most: int) -> Tensor:
    """The boxes that stay, bool [B tasks Q].

    In falling order of score a box suppresses all later ones that are near it, until `most` are kept. That many steps
    of static shape do it: each takes the first box that is still there.

    Args:
        pairs: which are near, [B tasks Q Q] bool, symmetric; valid: [B tasks Q] bool; Q in falling order of score.
    """
    pairs = pairs.to(torch.int32)  # Ascend's AI Core gathers no booleans
    Q = valid.shape[-1]
    rank = torch.arange(Q, 0, -1, device=valid.device).float()  # the first box has the highest
    alive, keep = valid, torch.zeros_like(valid)
    for _ in range(min(most, Q)):
        first = (alive * rank).max(-1, keepdim=True)[1]  # B tasks 1
        taken = alive & (torch.arange(Q, device=valid.device) == first)
        keep = keep | taken
        row = pairs.gather(2, first[..., None].expand(-1, -1, -1, Q))[:, :, 0] > 0  # B tasks Q
        alive = alive & ~(row | taken)
    return keep


def near(boxes: Tensor, kind: Kind, threshold: float) -> Tensor:
    """Whether two boxes are so near that one must go: boxes [B Q 7+] -> bool [B Q Q], symmetric.

    threshold: the largest SQUARED centre distance (m2) of "circle"; the scale of "size_aware_circle"; the IoU that
    "rotated" allows.
    """
    if kind == "rotated":
        return box_ops.iou_bev(boxes, boxes) > threshold
    gap_x, gap_y = (c[..., :, None] - c[..., None, :] for c in boxes[..., :2].unbind(-1))
    if kind == "circle":
        return gap_x.square() + gap_y.square() <= threshold
    length, width, cos, sin = boxes[..., 3], boxes[..., 4], boxes[..., 6].cos().abs(), boxes[..., 6].sin().abs()
    extent_x, extent_y = length * cos + width * sin, length * sin + width * cos
    touch = [
        gap.abs() <= (e[..., :, None] + e[..., None, :]) * (threshold / 2)
        for gap, e in ((gap_x, extent_x), (gap_y, extent_y))
    ]
    return touch[0] & touch[1]
