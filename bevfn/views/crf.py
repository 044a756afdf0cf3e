"""Depth of pixels that look alike pulled together: a conditional random field over the image (BEVNeXt, Li et al. 2024,
arXiv 2312.01696), solved by mean field (Krähenbühl & Koltun 2011) in a fixed number of steps.

With q the distribution over depth bins, u the logits, k the likeness of two neighbouring pixels' colours:

    q_i <- softmax(u_i - strength M sum_j k_ij q_j),   M_ab = |a - b| bins,   j in the 3x3 around i

The likeness is the same for all bins, so that a step is two products of matrices and a softmax: three rows of pixels
times a banded matrix of their likenesses, then the bins times M. 20 steps are 255 nodes, with their gradient 710.

Source: BEVNeXt mmdet3d/models/necks/view_transformer_bevnext.py (behaviour); golden cases bevnext_stage1 and _stage2, `crf/*`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """The defaults are BEVNeXt's."""

    iterations: int = 20
    colour_deviation: float = 1e-3
    """of the mean colours (0..255) of two patches that count as alike; as published only equal colours do"""
    strength: float = 0.015
    """initial value of the learnt weight"""


def init(config: Config) -> dict:
    """{"strength": [1]}."""
    return {"strength": torch.full((1,), config.strength)}


def colours(images: Tensor, stride: int) -> Tensor:
    """Mean colour of stride x stride patches: uint8 [B N H W 3] -> float32 [B*N 3 H/stride W/stride], 0..255."""
    blocks = rearrange(images, "b n (h i) (w j) c -> (b n) c h w (i j)", i=stride, j=stride)
    return blocks.float().mean(-1)


def likeness(colour: Tensor, config: Config) -> Tensor:
    """k of every pixel with its 3x3 neighbours, row by row, itself in the middle: [M 3 H W] -> [M 9 H W].

    Beyond the map is black, as published; no distribution is there to be weighed.
    """
    H, W = colour.shape[-2:]
    around = F.pad(colour, (1, 1, 1, 1))
    near = [around[..., i : i + H, j : j + W] for i in range(3) for j in range(3)]
    squares = torch.stack([(other - colour).square().sum(1) for other in near], 1)
    return torch.exp(squares / (-2 * config.colour_deviation**2))


def apply(params: dict, logits: Tensor, likeness: Tensor, *, config: Config) -> dict[str, Tensor]:
    """Distributions over depth, all of them [M D H W] float32; gradients flow through every step.

    Args:
        logits: [M D H W], in any dtype.
        likeness: [m 9 H W] float32 without gradient, of the first m of the M images and again of every m further ones.

    Returns:
        {"start": softmax of the logits, "first": after one step, "depth": after all steps}.
    """
    D, H = logits.shape[1:3]
    unary = logits.float().permute(0, 2, 3, 1)  # M H W D
    shape, unary = unary.shape, unary.reshape(-1, D)
    band = _band(likeness)  # m H W 3W
    band = band.repeat(shape[0] // len(band), 1, 1, 1).flatten(0, 1)
    bins = torch.arange(D, dtype=torch.float32, device=logits.device)
    penalty = -params["strength"] * (bins[:, None] - bins).abs()  # D D
    beyond = unary.new_zeros(shape[0], 1, *shape[2:])  # the rows above and below the map
    q = torch.softmax(unary, -1)
    steps = [q]
    for _ in range(config.iterations):
        rows = torch.cat([beyond, q.view(shape), beyond], 1)  # not a pad, whose gradient pads by -1: GE cannot
        rows = torch.cat([rows.narrow(1, i, H) for i in range(3)], 2).flatten(0, 1)  # M*H 3W D
        message = torch.bmm(band, rows).view(-1, D)
        q = torch.softmax(torch.addmm(unary, message, penalty), -1)
        steps.append(q)
    found = {"start": steps[0], "first": steps[min(1, config.iterations)], "depth": q}
    return {name: step.view(shape).permute(0, 3, 1, 2) for name, step in found.items()}


def _band(likeness: Tensor) -> Tensor:
    """[m 9 H W] -> [m H W 3W]: what a row's pixel w takes of the pixels of the row above, of its own and of that below."""
    m, _, H, W = likeness.shape
    place = torch.arange(W, device=likeness.device)
    near = torch.stack([(place + step)[:, None] == place for step in (-1, 0, 1)]).float()  # 3 W W'
    weights = likeness.view(m, 3, 3, H, W).permute(0, 3, 4, 1, 2)  # m H W rows steps
    return (weights[..., None] * near.transpose(0, 1)[:, None]).sum(-2).view(m, H, W, 3 * W)
