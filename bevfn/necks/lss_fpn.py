"""Top-down image neck of BEVFusion (GeneralizedLSSFPN): every level absorbs the finished coarser one.

    level l: concat[input l, upsample(level l + 1)] -> 1x1 conv, BN, ReLU -> 3x3 conv, BN, ReLU

Source: mmdetection3d projects/BEVFusion/bevfusion/bevfusion_necks.py; golden case bevfusion_lidar_cam.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bevfn import tree
from bevfn.distributed import Train
from bevfn.layers import conv_norm, resize


@dataclass(frozen=True)
class Config:
    """The defaults fit the three outputs of Swin-T."""

    channels_in: tuple[int, ...] = (192, 384, 768)  # fine to coarse
    channels_out: int = 256

    def __post_init__(self) -> None:
        if len(self.channels_in) < 2:
            raise ValueError(f"channels_in {self.channels_in} must name at least two levels, fine to coarse")


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state) of {"laterals", "outputs"}: one entry per level but the coarsest, mmcv's initialisation."""
    C = config.channels_out
    made: dict = {"laterals": [], "outputs": []}
    coarsest = len(config.channels_in) - 1
    for level, channels in enumerate(config.channels_in[:-1]):
        above = config.channels_in[-1] if level + 1 == coarsest else C
        made["laterals"].append(conv_norm.init(channels + above, C, 1, generator=generator, kaiming="fan_out"))
        made["outputs"].append(conv_norm.init(C, C, 3, generator=generator, kaiming="fan_out"))
    return tree.unzip(made)


def apply(params: dict, state: dict, features: list[Tensor], *, train: Train) -> tuple[list[Tensor], dict]:
    """features [M C_l H_l W_l], fine to coarse -> ([M C_out H_l W_l] of every level but the coarsest, new state)."""
    new = {name: list(entries) for name, entries in state.items()}
    coarser = features[-1]
    outputs: list[Tensor] = []
    for level in reversed(range(len(features) - 1)):
        x = torch.cat([features[level], resize.bilinear(coarser, features[level].shape[-2:])], 1)
        for name in ("laterals", "outputs"):
            x, new[name][level] = conv_norm.apply(params[name][level], state[name][level], x, train=train)
        coarser = x
        outputs.insert(0, x)
    return outputs, new
