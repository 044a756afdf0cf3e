"""Convolutions, transposed convolutions and 1x1 convolutions over sequences (which are linear layers).

The activation's dtype is the compute dtype: a layer casts its float32 master weights to it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def init(
    channels_in: int,
    channels_out: int,
    kernel: tuple[int, ...],
    *,
    bias: bool,
    generator: torch.Generator,
    transposed: bool = False,
    kaiming_normal: bool = False,
) -> dict:
    """{"weight": [C_out C_in *kernel] (transposed: [C_in C_out *kernel]), "bias": [C_out]}, float32.

    torch's default (Kaiming uniform, a = sqrt 5) or mmcv ConvModule's (Kaiming normal, fan out, gain sqrt 2, bias 0).
    """
    shape = (channels_in, channels_out, *kernel) if transposed else (channels_out, channels_in, *kernel)
    receptive = 1
    for size in kernel:
        receptive *= size
    fan_in, fan_out = shape[1] * receptive, shape[0] * receptive  # as torch counts them, also when transposed
    if kaiming_normal:
        params = {"weight": torch.empty(shape).normal_(0, (2.0 / fan_out) ** 0.5, generator=generator)}
        bound = 0.0
    else:
        bound = fan_in**-0.5
        params = {"weight": torch.empty(shape).uniform_(-bound, bound, generator=generator)}
    if bias:
        params["bias"] = torch.empty(channels_out).uniform_(-bound, bound, generator=generator)
    return params


def apply(params: dict, x: Tensor, *, stride: int = 1, padding: int | tuple[int, int] = 0, dilation: int = 1) -> Tensor:
    """x [B C_in H W] -> [B C_out H' W'], dtype and memory format of x."""
    weight, bias = params["weight"], params.get("bias")
    if _half_on_cpu(x):
        return F.conv2d(x.float(), _rounded(weight), _rounded(bias), stride, padding, dilation).half()
    return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, padding, dilation)


def apply_transposed(params: dict, x: Tensor, *, stride: int) -> Tensor:
    """x [B C_in H W] -> [B C_out H*stride W*stride] for a kernel of the size of the stride."""
    weight, bias = params["weight"], params.get("bias")
    if _half_on_cpu(x):
        return F.conv_transpose2d(x.float(), _rounded(weight), _rounded(bias), stride).half()
    return F.conv_transpose2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride)


def _half_on_cpu(x: Tensor) -> bool:
    # torch's CPU backward convolution in fp16 runs at 1.5 GFLOP/s where float32 reaches 290 (measured, torch 2.13,
    # 2 cores). Operands rounded to fp16 and multiplied in float32 are what matrix units with fp32 accumulators compute.
    return x.dtype == torch.float16 and x.device.type == "cpu"


def _rounded(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.half().float()
