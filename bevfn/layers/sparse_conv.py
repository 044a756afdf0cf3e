"""Sparse 3-D convolution, batch norm over the active sites, ReLU, over `kernels.sparse_conv`."""

import torch
from torch import Tensor

from bevfn.distributed import Train
from bevfn.kernels.sparse_conv import sparse_conv
from bevfn.layers import batch_norm


def init_weight(channels_in: int, channels_out: int, kernel: tuple[int, int, int], generator: torch.Generator) -> dict:
    """{"weight": [kx ky kz C_in C_out]}, spconv's default (Kaiming uniform, a = sqrt 5)."""
    bound = (channels_in * kernel[0] * kernel[1] * kernel[2]) ** -0.5
    return {"weight": torch.empty(*kernel, channels_in, channels_out).uniform_(-bound, bound, generator=generator)}


def init(
    channels_in: int, channels_out: int, kernel: tuple[int, int, int], generator: torch.Generator
) -> tuple[dict, dict]:
    """({"conv", "norm"}, {"norm": statistics})."""
    norm, statistics = batch_norm.init(channels_out)
    return {"conv": init_weight(channels_in, channels_out, kernel, generator), "norm": norm}, {"norm": statistics}


def convolve(params: dict, x: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    """x [V C_in], neighbour table [K W] and its inverse [K V] -> [W C_out]."""
    weight = params["weight"]
    return sparse_conv(x, weight.reshape(-1, *weight.shape[3:]).to(x.dtype), table, inverse)


def apply(
    params: dict,
    state: dict,
    x: Tensor,
    table: Tensor,
    inverse: Tensor,
    valid: Tensor,
    *,
    train: Train,
    momentum: float,
    eps: float,
) -> tuple[Tensor, dict]:
    """relu(norm(conv(x))) [W C_out] with rows that are not `valid` [W] at zero, and the new state."""
    y = convolve(params["conv"], x, table, inverse)
    y, norm = batch_norm.apply(params["norm"], state["norm"], y, train=train, momentum=momentum, eps=eps, valid=valid)
    return torch.relu(y), {"norm": norm}
