"""SECOND's BEV backbone: plain stages of 3x3 convolutions (Yan et al. 2018, section 3.2).

Source: mmdetection3d mmdet3d/models/backbones/second.py, read for its behaviour.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bevfn import tree
from bevfn.distributed import Train
from bevfn.layers import conv_norm, remat


@dataclass(frozen=True)
class Config:
    channels_in: int = 256
    channels: tuple[int, ...] = (128, 256)
    """output channels of each stage"""
    layers: int = 5
    """3x3 convolutions of a stage after its first"""
    strides: tuple[int, ...] = (1, 2)
    norm_eps: float = 1e-3
    norm_momentum: float = 0.01
    recompute: bool = False
    """every stage once more for the gradient, see `layers.remat`"""


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state): {"blocks": [stage][layer]{"conv", "norm"}}."""
    blocks, channels_in = [], config.channels_in
    for channels in config.channels:
        widths = [channels_in] + [channels] * config.layers
        blocks.append([conv_norm.init(width, channels, 3, generator=generator) for width in widths])
        channels_in = channels
    return tree.unzip({"blocks": blocks})


def apply(params: dict, state: dict, x: Tensor, *, config: Config, train: Train) -> tuple[list[Tensor], dict]:
    """x [B C X Y] -> (one map per stage [B C_s X/stride Y/stride], new state)."""
    maps, states = [], []
    norm: dict = {"momentum": config.norm_momentum, "eps": config.norm_eps}
    for block, old, stride in zip(params["blocks"], state["blocks"], config.strides):
        strides = (stride, *(1,) * config.layers)
        through = partial(conv_norm.chain, train=train, strides=strides, **norm)
        x, seen = remat.apply(through, block, old, x, recompute=config.recompute)
        maps.append(x)
        states.append(seen)
    return maps, {"blocks": states}
