"""Convolution, batch norm and, if not switched off, ReLU: what backbones, necks, depth nets and heads are made of.

    weights = conv_norm.init(64, 128, 3, generator=generator)        params {"conv", "norm"}, state {"norm"}

Any other kind of convolution becomes one of these with `with_norm` around its parameters and `finish` behind it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bevfn.distributed import Train
from bevfn.layers import batch_norm, conv


def init(
    channels_in: int,
    channels_out: int,
    kernel: conv.Kernel,
    *,
    generator: torch.Generator,
    bias: bool = False,
    **start: Any,
) -> tuple[dict, dict]:
    """({"conv", "norm"}, {"norm": statistics}); `start`: groups, transposed, kaiming of `conv.init`."""
    weights = conv.init(channels_in, channels_out, kernel, bias=bias, generator=generator, **start)
    return with_norm(weights, channels_out)


def with_norm(weights: dict, channels: int) -> tuple[dict, dict]:
    """({"conv": weights, "norm"}, {"norm": statistics}) for a convolution of any kind with so many outputs."""
    norm, statistics = batch_norm.init(channels)
    return {"conv": weights, "norm": norm}, {"norm": statistics}


def apply(
    params: dict,
    state: dict,
    x: Tensor,
    *,
    train: Train,
    stride: int = 1,
    padding: conv.Kernel | None = None,
    dilation: int = 1,
    **norm: Any,
) -> tuple[Tensor, dict]:
    """x [B C_in H W] -> (relu(norm(conv(x))) [B C_out H' W'], new state).

    padding: None keeps the map's size at stride 1; `norm`: relu, momentum and eps of `finish`.
    """
    y = conv.apply(params["conv"], x, stride=stride, padding=padding, dilation=dilation)
    return finish(params, state, y, train=train, **norm)


def apply_transposed(
    params: dict, state: dict, x: Tensor, *, train: Train, stride: int, **norm: Any
) -> tuple[Tensor, dict]:
    """x [B C_in H W] -> (relu(norm(transposed conv(x))) [B C_out H*stride W*stride], new state); `norm` as in `apply`."""
    return finish(params, state, conv.apply_transposed(params["conv"], x, stride=stride), train=train, **norm)


def finish(
    params: dict,
    state: dict,
    y: Tensor,
    *,
    train: Train,
    relu: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    valid: Tensor | None = None,
) -> tuple[Tensor, dict]:
    """Norm and ReLU behind a convolution: its output y, [B C H W] or rows [R C] -> (like y, new state).

    `valid` [R] (bool) marks the rows that count; the others become zero.
    """
    y, norm = batch_norm.apply(
        params["norm"], state["norm"], y, train=train, momentum=momentum, eps=eps, valid=valid, relu=relu
    )
    return y, {"norm": norm}


def chain(
    params: list[dict], state: list[dict], x: Tensor, *, train: Train, strides: Sequence[int] | None = None, **norm: Any
) -> tuple[Tensor, list[dict]]:
    """x through layers in a row, padded to keep the size at stride 1; strides: of every layer, None is 1."""
    new = []
    for layer, old, stride in zip(params, state, strides or (1,) * len(params), strict=True):
        x, seen = apply(layer, old, x, train=train, stride=stride, **norm)
        new.append(seen)
    return x, new
