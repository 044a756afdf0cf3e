"""SECOND's neck: every stage brought to the first one's resolution and concatenated (Yan et al. 2018).

Source: mmdetection3d mmdet3d/models/necks/second_fpn.py with `use_conv_for_no_stride`, read for its behaviour.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bevfn.distributed import Train
from bevfn.layers import conv_norm


@dataclass(frozen=True)
class Config:
    channels_in: tuple[int, ...] = (128, 256)
    channels: tuple[int, ...] = (256, 256)
    strides: tuple[int, ...] = (1, 2)
    """upsampling of each stage; 1 is a 1x1 convolution, s a transposed convolution of size and stride s"""
    norm_eps: float = 1e-3
    norm_momentum: float = 0.01


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state): {"blocks": [stage]{"conv", "norm"}}."""
    made = [
        conv_norm.init(c_in, c_out, stride, generator=generator, transposed=stride > 1)
        for c_in, c_out, stride in zip(config.channels_in, config.channels, config.strides)
    ]
    return {"blocks": [params for params, _ in made]}, {"blocks": [state for _, state in made]}


def apply(params: dict, state: dict, maps: list[Tensor], *, config: Config, train: Train) -> tuple[Tensor, dict]:
    """maps [B C_s X_s Y_s] per stage -> ([B sum(channels) X Y], new state)."""
    raised, states = [], []
    for block, old, x, stride in zip(params["blocks"], state["blocks"], maps, config.strides):
        y, seen = conv_norm.apply(
            block,
            old,
            x,
            train=train,
            stride=stride,
            transposed=stride > 1,
            momentum=config.norm_momentum,
            eps=config.norm_eps,
        )
        raised.append(y)
        states.append(seen)
    return torch.cat(raised, dim=1), {"blocks": states}
