"""Deformable attention of queries to a few places in each of several images (Zhu et al. 2021, arXiv 2010.04159; over
cameras as in BEVFormer, Li et al. 2022, arXiv 2203.17270, section 3.3).

Every head reads one place around each of the query's reference points. Offsets and weights are made once per query and
shared by its images.
"""

import math

import torch
from torch import Tensor

from bevfn.kernels.deform_attn import deform_attn
from bevfn.layers import linear


def init(channels: int, *, heads: int, points: int, generator: torch.Generator) -> dict:
    """{"value", "offsets", "weights", "out"}, each {"weight", "bias"}.

    As BEVFormer: value and out Xavier uniform; weights all equal; head h looks along the angle 2 pi h / heads, one pixel
    (as the larger of x and y) with the first half of the points and two with the second.

    Raises ValueError if the heads do not divide the channels, or the points are odd in number.
    """
    if channels % heads:
        raise ValueError(f"{heads} heads must divide {channels} channels")
    if points % 2:
        raise ValueError(f"points {points} must be even: one half starts nearer than the other")

    def dense() -> dict:
        return {
            "weight": linear.xavier(channels, channels, generator=generator),
            "bias": torch.zeros(channels),
        }

    def constant(bias: Tensor) -> dict:
        return {"weight": torch.zeros(len(bias), channels), "bias": bias}

    angle = torch.arange(heads) * (2 * math.pi / heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)  # h 2
    direction = direction / direction.abs().amax(-1, keepdim=True)
    steps = torch.tensor([1.0, 2.0]).repeat_interleave(points // 2)  # P
    offsets = direction[:, None] * steps[:, None]  # h P 2
    return {
        "value": dense(),
        "offsets": constant(offsets.flatten()),
        "weights": constant(torch.zeros(heads * points)),
        "out": dense(),
    }


def apply(params: dict, query: Tensor, maps: Tensor, reference: Tensor, seen: Tensor, *, heads: int) -> Tensor:
    """The mean over the images that see a query of what it reads in them, projected: [B Q C], dtype of query.

    Args:
        query: [B Q C].
        maps: [B*N C H W], of N images.
        reference: [B*N Q P 2] float32 x, y, where 0 and 1 are the image's borders.
        seen: [B*N Q] bool; what no image sees reads 0.
    """
    B, Q, C = query.shape
    M, _, H, W = maps.shape
    P, each = reference.shape[2], (B, M // B)
    value = linear.apply(params["value"], maps.flatten(2).transpose(1, 2).to(query.dtype))  # M H*W C
    # Places and weights in float32: half precision resolves an eighth of a pixel at 128, and see `attention.apply`.
    offset = linear.apply(params["offsets"], query).float().view(B, 1, Q, heads, P, 2)
    weight = torch.softmax(linear.apply(params["weights"], query).float().view(B, 1, Q, heads, P), -1)
    location = reference.view(*each, Q, 1, P, 2) + offset / offset.new_tensor([W, H])
    read = deform_attn(
        value.view(M, H * W, heads, C // heads),
        location.reshape(M, Q, heads, 1, P, 2),
        weight.expand(*each, Q, heads, P).reshape(M, Q, heads, 1, P),
        seen,
        sizes=((H, W),),
    )  # M Q C
    images = seen.view(*each, Q).float().sum(1).clamp(min=1.0)  # B Q
    mean = read.view(*each, Q, C).float().sum(1) / images[..., None]
    return linear.apply(params["out"], mean.to(query.dtype))
