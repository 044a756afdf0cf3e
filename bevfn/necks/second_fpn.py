"""SECOND's neck: every stage brought to one resolution and concatenated (Yan et al. 2018).

BEVDepth uses it on images too, where the fine stages are brought down to stride 16.

Source: mmdetection3d mmdet3d/models/necks/second_fpn.py, read for its behaviour. Without `use_conv_for_no_stride` its
stride 1 is a transposed convolution of size 1: the same map, its weight stored transposed (see `upstream`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bevfn import tree
from bevfn.distributed import Train
from bevfn.layers import conv_norm


@dataclass(frozen=True)
class Config:
    channels_in: tuple[int, ...] = (128, 256)
    channels: tuple[int, ...] = (256, 256)
    strides: tuple[float, ...] = (1, 2)
    """upsampling of each stage: 1 is a 1x1 convolution, s a transposed convolution and 1/s a convolution of size and
    stride s"""
    norm_eps: float = 1e-3
    norm_momentum: float = 0.01
    kaiming_normal: bool = False
    """start all but the strided convolutions from mmcv's Kaiming normal instead of torch's default"""

    def __post_init__(self) -> None:
        if not len(self.channels_in) == len(self.channels) == len(self.strides):
            raise ValueError(
                f"channels_in {self.channels_in}, channels {self.channels} and strides {self.strides} must name the "
                "same stages"
            )
        if any(_size(stride) != (stride if stride >= 1 else 1 / stride) for stride in self.strides):
            raise ValueError(f"strides {self.strides} must be whole numbers or 1 / whole numbers")


def _size(stride: float) -> int:
    """Kernel size and stride of the convolution that changes the resolution by `stride`."""
    return round(stride if stride >= 1 else 1 / stride)


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state): {"blocks": [stage]{"conv", "norm"}}."""
    made = []
    for c_in, c_out, stride in zip(config.channels_in, config.channels, config.strides):
        kaiming = config.kaiming_normal and stride >= 1
        params, state = conv_norm.init(
            c_in,
            c_out,
            _size(stride),
            generator=generator,
            transposed=stride > 1 or kaiming,
            kaiming="fan_out" if kaiming else None,
        )
        if kaiming and stride == 1:  # drawn as upstream's transposed convolution, whose fan out counts its inputs
            params["conv"]["weight"] = params["conv"]["weight"].transpose(0, 1).contiguous()
        made.append((params, state))
    return tree.unzip({"blocks": made})


def apply(params: dict, state: dict, maps: list[Tensor], *, config: Config, train: Train) -> tuple[Tensor, dict]:
    """maps [B C_s X_s Y_s] per stage -> ([B sum(channels) X Y], new state)."""
    raised, states = [], []
    norm: dict = {"momentum": config.norm_momentum, "eps": config.norm_eps}
    for block, old, x, stride in zip(params["blocks"], state["blocks"], maps, config.strides):
        if stride > 1:
            y, seen = conv_norm.apply_transposed(block, old, x, train=train, stride=_size(stride), **norm)
        else:
            y, seen = conv_norm.apply(block, old, x, train=train, stride=_size(stride), padding=0, **norm)
        raised.append(y)
        states.append(seen)
    return torch.cat(raised, dim=1), {"blocks": states}
