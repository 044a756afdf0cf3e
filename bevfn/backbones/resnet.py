"""Residual networks (He et al. 2015, arXiv 1512.03385): ResNet-50 on images, a wider ResNet-18 without its pooling on
BEV maps.

A block is `layers` of convolution and norm, beside a `shortcut` where the shape changes. Bottlenecks stride in the 3x3
("pytorch style"). Sources: mmdetection mmdet/models/backbones/resnet.py; BEVNeXt mmdet3d/models/backbones/resnet.py
(CustomResNet, whose shortcuts are convolutions without norm); golden cases bevdepth_r50_2key, bevnext_stage1.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bevfn import tree
from bevfn.distributed import Train
from bevfn.layers import conv, conv_norm

EXPANSION = 4  # output channels of a bottleneck per channel of its 3x3


@dataclass(frozen=True)
class Config:
    """The defaults are ResNet-50."""

    channels_in: int = 3
    channels: int = 64
    """of the stem and the first stage; every further stage has twice as many"""
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """of each stage"""
    strides: tuple[int, ...] = (1, 2, 2, 2)
    bottleneck: bool = True
    pool: bool = True
    """3x3 maximum with stride 2 behind the stem"""
    stem: bool = True
    """7x7 convolution with stride 2 before the stages"""
    shortcut: Literal["projection", "convolution"] = "projection"
    """1x1 and norm where the shape changes, or 3x3 with a bias and no norm in every stage's first block"""
    torch_init: bool = False
    """torch's default initialisation instead of mmdetection's"""
    frozen_stages: int = -1
    """-1 none, 0 the stem, n the first n stages too: no gradient, and running statistics also in training.
    Freeze their leaves in the optimizer as well (`frozen`), or it decays them."""

    def __post_init__(self) -> None:
        if len(self.blocks) != len(self.strides):
            raise ValueError(f"blocks {self.blocks} and strides {self.strides} must name the same stages")
        if not -1 <= self.frozen_stages <= len(self.blocks):
            raise ValueError(f"frozen_stages {self.frozen_stages} must be -1 to {len(self.blocks)}")

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Output channels of every stage."""
        return tuple(self.channels * 2**s * (EXPANSION if self.bottleneck else 1) for s in range(len(self.blocks)))

    @property
    def frozen(self) -> tuple[str, ...]:
        """Path patterns of the frozen leaves, for `optim.Group` behind the backbone's own prefix."""
        stages = tuple(f"stages.{s}.*" for s in range(self.frozen_stages))
        return ("stem.*", *stages) if self.frozen_stages >= 0 else ()


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state): {"stem": {"conv", "norm"}, "stages": [stage][block]{"layers": [{"conv", "norm"}], "shortcut"}}.

    As mmdetection: Kaiming normal (fan out), and every block starts as its shortcut (its last norm has weight 0).
    """
    kaiming: conv.Kaiming | None = None if config.torch_init else "fan_out"
    made: dict = {}
    c_in = config.channels_in
    if config.stem:
        made["stem"] = conv_norm.init(c_in, config.channels, 7, generator=generator, kaiming=kaiming)
        c_in = config.channels
    made["stages"] = []
    for s, (count, stride, c_out) in enumerate(zip(config.blocks, config.strides, config.stage_channels)):
        made["stages"].append([])
        for i in range(count):
            widths = (config.channels * 2**s,) * 2 + (c_out,) if config.bottleneck else (c_out, c_out)
            block, statistics = _init_block(c_in, widths, stride if i == 0 else 1, generator, kaiming=kaiming)
            if not config.torch_init:
                torch.nn.init.zeros_(block["layers"][-1]["norm"]["weight"])
            if config.shortcut == "convolution" and i == 0:
                block["shortcut"] = conv.init(c_in, c_out, 3, bias=True, generator=generator)
                statistics.pop("shortcut", None)
            made["stages"][-1].append((block, statistics))
            c_in = c_out
    return tree.unzip(made)


def apply(params: dict, state: dict, x: Tensor, *, config: Config, train: Train) -> tuple[list[Tensor], dict]:
    """x [M C H W] -> (maps of the stem (pooled) and of every stage, finest first, new state); dtype of x.

    Without a stem the first map is x.
    """
    frozen, new_state = config.frozen_stages, {}
    if config.stem:
        stem = _detached(params["stem"]) if frozen >= 0 else params["stem"]
        x, new_state["stem"] = conv_norm.apply(stem, state["stem"], x, train=train if frozen < 0 else False, stride=2)
    maps, states = [F.max_pool2d(x, 3, 2, 1) if config.pool else x], []
    for s, (blocks, old) in enumerate(zip(params["stages"], state["stages"])):
        y, new = maps[-1], []
        for i, (block, statistics) in enumerate(zip(blocks, old)):
            block = _detached(block) if s < frozen else block
            stride = config.strides[s] if i == 0 else 1
            y, seen = apply_block(block, statistics, y, train=train if s >= frozen else False, stride=stride)
            new.append(seen)
        maps.append(y)
        states.append(new)
    return maps, {**new_state, "stages": states}


def init_basic(
    channels_in: int, channels_out: int, *, generator: torch.Generator, stride: int = 1
) -> tuple[dict, dict]:
    """One basic block, two 3x3 convolutions, by itself: (params, state), torch's default initialisation."""
    return _init_block(channels_in, (channels_out,) * 2, stride, generator)


def _init_block(
    channels_in: int,
    widths: tuple[int, ...],
    stride: int,
    generator: torch.Generator,
    kaiming: conv.Kaiming | None = None,
) -> tuple[dict, dict]:
    """Two layers 3x3, 3x3 or three 1x1, 3x3, 1x1 of `widths` output channels."""
    kernels = (1, 3, 1) if len(widths) == 3 else (3, 3)
    made: dict = {
        "layers": [
            conv_norm.init(c_in, c_out, kernel, generator=generator, kaiming=kaiming)
            for c_in, c_out, kernel in zip((channels_in, *widths), widths, kernels)
        ]
    }
    if stride != 1 or channels_in != widths[-1]:
        made["shortcut"] = conv_norm.init(channels_in, widths[-1], 1, generator=generator, kaiming=kaiming)
    return tree.unzip(made)


def apply_block(params: dict, state: dict, x: Tensor, *, train: Train, stride: int = 1) -> tuple[Tensor, dict]:
    """x [M C_in H W] -> (relu(layers(x) + shortcut(x)) [M C_out H/stride W/stride], new state)."""
    *inner, last = params["layers"]
    *inner_state, last_state = state["layers"]
    strides = (1, stride) if len(inner) == 2 else (stride,)  # the first 3x3 strides
    y, layers = conv_norm.chain(inner, inner_state, x, train=train, strides=strides)
    y, seen = conv_norm.apply(last, last_state, y, train=train, relu=False)  # its ReLU comes behind the sum
    layers.append(seen)
    if "shortcut" not in params:
        return torch.relu(y + x), {"layers": layers}
    if "norm" not in params["shortcut"]:
        return torch.relu(y + conv.apply(params["shortcut"], x, stride=stride)), {"layers": layers}
    x, seen = conv_norm.apply(params["shortcut"], state["shortcut"], x, train=train, stride=stride, relu=False)
    return torch.relu(y + x), {"layers": layers, "shortcut": seen}


def _detached(params: dict) -> dict:
    return tree.map(lambda leaf: leaf.detach(), params)
