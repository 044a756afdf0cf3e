"""Feature pyramid (Lin et al. 2017, arXiv 1612.03144) that hands on its finest level only: BEVNeXt's image neck.

    level l: 1x1(input l) + nearest upsampling of level l + 1; the finest goes through a 3x3

Convolutions have biases, and neither norm nor ReLU. Source: BEVNeXt mmdet3d/models/necks/fpn.py (CustomFPN, behaviour);
golden cases bevnext_stage1 and bevnext_stage2.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from bevfn.layers import conv, resize


@dataclass(frozen=True)
class Config:
    """The defaults fit ResNet-50's last three stages."""

    channels_in: tuple[int, ...] = (512, 1024, 2048)
    """fine to coarse, each of half the resolution of the one before"""
    channels: int = 512


def init(config: Config, generator: torch.Generator) -> dict:
    """{"laterals": one per level, "out"}, Xavier uniform with bias 0."""
    C = config.channels
    laterals = [_xavier(conv.init(c, C, 1, bias=True, generator=generator), generator) for c in config.channels_in]
    return {"laterals": laterals, "out": _xavier(conv.init(C, C, 3, bias=True, generator=generator), generator)}


def _xavier(params: dict, generator: torch.Generator) -> dict:
    out, into, *kernel = params["weight"].shape
    bound = (6.0 / ((out + into) * prod(kernel))) ** 0.5
    params["weight"].uniform_(-bound, bound, generator=generator)
    params["bias"].zero_()
    return params


def apply(params: dict, features: list[Tensor]) -> Tensor:
    """features [M C_l H_l W_l], fine to coarse -> [M C H_0 W_0], dtype of the features."""
    x = conv.apply(params["laterals"][-1], features[-1])
    for lateral, feature in zip(reversed(params["laterals"][:-1]), reversed(features[:-1])):
        x = conv.apply(lateral, feature) + resize.nearest(x, feature.shape[-1] // x.shape[-1])
    return conv.apply(params["out"], x)
