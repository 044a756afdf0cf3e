"""Convolution, batch norm, ReLU: the block that image necks, BEV backbones and heads are made of."""

import torch
from torch import Tensor

from bevfn.distributed import Train
from bevfn.layers import batch_norm, conv


def init(
    channels_in: int,
    channels_out: int,
    kernel: int,
    *,
    generator: torch.Generator,
    bias: bool = False,
    transposed: bool = False,
    kaiming_normal: bool = False,
) -> tuple[dict, dict]:
    """({"conv", "norm"}, {"norm": statistics}); see `layers.conv.init`."""
    weights = conv.init(
        channels_in,
        channels_out,
        (kernel, kernel),
        bias=bias,
        generator=generator,
        transposed=transposed,
        kaiming_normal=kaiming_normal,
    )
    norm, statistics = batch_norm.init(channels_out)
    return {"conv": weights, "norm": norm}, {"norm": statistics}


def apply(
    params: dict,
    state: dict,
    x: Tensor,
    *,
    train: Train,
    stride: int = 1,
    padding: int = 0,
    transposed: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, dict]:
    """x [B C_in H W] -> (relu(norm(conv(x))) [B C_out H' W'], new state)."""
    if transposed:
        x = conv.apply_transposed(params["conv"], x, stride=stride)
    else:
        x = conv.apply(params["conv"], x, stride=stride, padding=padding)
    x, norm = batch_norm.apply(params["norm"], state["norm"], x, train=train, momentum=momentum, eps=eps)
    return torch.relu(x), {"norm": norm}
