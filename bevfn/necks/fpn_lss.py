"""BEV neck of the BEVDet family (FPN_LSS): the coarsest stage brought to the finest one, then to the map's resolution.

    x = ReLU BN 3x3, twice, of [finest, coarsest x 4];  map = 1x1(ReLU BN 3x3(x upsampled x 2))

Upsampling is bilinear with the corners' centres on each other. Source: BEVNeXt mmdet3d/models/necks/lss_fpn.py (behaviour);
golden cases bevnext_stage1 and bevnext_stage2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bevfn import tree
from bevfn.distributed import Train
from bevfn.layers import conv, conv_norm, resize


@dataclass(frozen=True)
class Config:
    """The defaults are those of BEVNeXt's stage 1."""

    channels_in: tuple[int, int] = (160, 640)
    """of the finest and the coarsest stage"""
    channels: int = 512
    channels_out: int = 256
    upsample: int = 2
    """resolution of the map over the finest stage's"""


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state) of {"merge": two layers, "up", "out"}, torch's default initialisation."""
    C = config.channels
    merge = [conv_norm.init(c, C, 3, generator=generator) for c in (sum(config.channels_in), C)]
    up = conv_norm.init(C, config.channels_out, 3, generator=generator)
    out = conv.init(config.channels_out, config.channels_out, 1, bias=True, generator=generator)
    return tree.unzip({"merge": merge, "up": up, "out": out})


def apply(
    params: dict, state: dict, fine: Tensor, coarse: Tensor, *, config: Config, train: Train
) -> tuple[Tensor, dict]:
    """fine [B C_f Y X], coarse [B C_c Y' X'] -> ([B channels_out Y*upsample X*upsample], new state)."""
    Y, X = fine.shape[-2:]
    x = torch.cat([fine, resize.bilinear(coarse, (Y, X), align_corners=True)], 1)
    x, merged = conv_norm.chain(params["merge"], state["merge"], x, train=train)
    x = resize.bilinear(x, (Y * config.upsample, X * config.upsample), align_corners=True)
    x, raised = conv_norm.apply(params["up"], state["up"], x, train=train)
    return conv.apply(params["out"], x), {"merge": merged, "up": raised}
