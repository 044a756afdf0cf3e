"""Convolutions and transposed convolutions; deformable ones are in `deform_conv`, sparse ones in `sparse_conv`.

The activation's dtype is the compute dtype: a layer casts its float32 master weights to it.
"""

from collections.abc import Callable
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = int | tuple[int, ...]
"""size along every axis, or one for both axes of a map"""
Kaiming = Literal["fan_in", "fan_out"]


def init(
    channels_in: int,
    channels_out: int,
    kernel: Kernel,
    *,
    bias: bool,
    generator: torch.Generator,
    groups: int = 1,
    transposed: bool = False,
    kaiming: Kaiming | None = None,
) -> dict:
    """{"weight": [C_out C_in/groups *kernel] (transposed: [C_in C_out/groups *kernel]), "bias": [C_out]}, float32.

    torch's default (Kaiming uniform, a = sqrt 5), or Kaiming normal with gain sqrt 2 and bias 0 over the given fan;
    mmcv's ConvModule has the fan out. Raises ValueError if the groups do not divide both numbers of channels.
    """
    if channels_in % groups or channels_out % groups:
        raise ValueError(f"{groups} groups must divide the channels, {channels_in} in and {channels_out} out")
    first, second = (channels_in, channels_out) if transposed else (channels_out, channels_in)
    shape = (first, second // groups, *((kernel, kernel) if isinstance(kernel, int) else kernel))
    # The fans as torch counts them, by the weight's axes: also when transposed.
    fans = {"fan_in": shape[1] * prod(shape[2:]), "fan_out": shape[0] * prod(shape[2:])}
    weight, bound = torch.empty(shape), 0.0
    if kaiming is None:
        bound = fans["fan_in"] ** -0.5
        weight.uniform_(-bound, bound, generator=generator)
    else:
        weight.normal_(0, (2.0 / fans[kaiming]) ** 0.5, generator=generator)
    if not bias:
        return {"weight": weight}
    return {"weight": weight, "bias": torch.empty(channels_out).uniform_(-bound, bound, generator=generator)}


def apply(params: dict, x: Tensor, *, stride: int = 1, padding: Kernel | None = None, dilation: int = 1) -> Tensor:
    """x [B C_in H W] -> [B C_out H' W'], dtype and memory format of x. The groups are those that `init` was told.

    padding: None keeps the map's size at stride 1. Raises ValueError if the kernel is even and it is None.
    """
    weight = params["weight"]
    around = _same(weight.shape[2:], dilation) if padding is None else padding
    groups = x.shape[1] // weight.shape[1]
    return _cast(lambda x, w, b: F.conv2d(x, w, b, stride, around, dilation, groups), params, x)


def apply_transposed(params: dict, x: Tensor, *, stride: int) -> Tensor:
    """x [B C_in H W] -> [B C_out H*stride W*stride] for a kernel of the size of the stride, in one group."""
    return _cast(lambda x, w, b: F.conv_transpose2d(x, w, b, stride), params, x)


def _same(kernel: tuple[int, ...], dilation: int) -> tuple[int, ...]:
    if any(size % 2 == 0 for size in kernel):
        raise ValueError(f"no padding keeps a map's size under a kernel of {tuple(kernel)}: give `padding`")
    return tuple(dilation * (size // 2) for size in kernel)


def _cast(convolve: Callable[..., Tensor], params: dict, x: Tensor) -> Tensor:
    """convolve(x, weight, bias) in the dtype of x."""
    weights = (params["weight"], params.get("bias"))
    # torch's CPU backward convolution in fp16 runs at 1.5 GFLOP/s where float32 reaches 290 (measured, torch 2.13,
    # 2 cores). Operands rounded to fp16 and multiplied in float32 are what matrix units with fp32 accumulators compute.
    if x.dtype == torch.float16 and x.device.type == "cpu":
        return convolve(x.float(), *(None if w is None else w.half().float() for w in weights)).half()
    return convolve(x, *(None if w is None else w.to(x.dtype) for w in weights))
