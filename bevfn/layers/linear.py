"""Linear layers over the last axis. Weights [out in], or [out in 1] where a published checkpoint has a Conv1d."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor


def init(
    channels_in: int, channels_out: int, *, bias: bool, generator: torch.Generator, std: float | None = None
) -> dict:
    """{"weight": [C_out C_in], "bias": [C_out]}, float32: torch's default, or normal of `std` with bias 0."""
    bound = channels_in**-0.5
    weight = torch.empty(channels_out, channels_in)
    if std is None:
        params = {"weight": weight.uniform_(-bound, bound, generator=generator)}
        if bias:
            params["bias"] = torch.empty(channels_out).uniform_(-bound, bound, generator=generator)
        return params
    params = {"weight": weight.normal_(0, std, generator=generator)}
    return {**params, "bias": torch.zeros(channels_out)} if bias else params


def xavier(*shape: int, generator: torch.Generator) -> Tensor:
    """Xavier uniform (Glorot & Bengio 2010) weight [C_out C_in *kernel], the fans as torch counts them."""
    bound = (6.0 / ((shape[0] + shape[1]) * prod(shape[2:]))) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def apply(params: dict, x: Tensor) -> Tensor:
    """x [... C_in] -> [... C_out], dtype of x. A product of two matrices whatever the rank of x:
    the gradient of a 3-D times 2-D product is wrong in stock torchair (torch_npu 2.13.0)."""
    bias = params.get("bias")
    rows = x.reshape(-1, x.shape[-1])  # R C_in
    y = F.linear(rows, params["weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], y.shape[-1])
