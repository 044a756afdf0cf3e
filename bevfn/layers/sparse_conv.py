"""Sparse 3-D convolution, batch norm over the active sites, ReLU, over `kernels.sparse_conv`."""

from typing import Any

import torch
from torch import Tensor

from bevfn.kernels.sparse_conv import Tiles, sparse_conv
from bevfn.layers import conv_norm


def init_weight(channels_in: int, channels_out: int, kernel: tuple[int, int, int], generator: torch.Generator) -> dict:
    """{"weight": [kx ky kz C_in C_out]}, spconv's default (Kaiming uniform, a = sqrt 5)."""
    bound = (channels_in * kernel[0] * kernel[1] * kernel[2]) ** -0.5
    return {"weight": torch.empty(*kernel, channels_in, channels_out).uniform_(-bound, bound, generator=generator)}


def init(
    channels_in: int, channels_out: int, kernel: tuple[int, int, int], generator: torch.Generator
) -> tuple[dict, dict]:
    """({"conv", "norm"}, {"norm": statistics})."""
    return conv_norm.with_norm(init_weight(channels_in, channels_out, kernel, generator), channels_out)


def convolve(params: dict, x: Tensor, table: Tensor, inverse: Tensor, tiles: Tiles = ()) -> Tensor:
    """x [V C_in], neighbour table [K W], its inverse [K V] and the `tiles` of both -> [W C_out]."""
    weight = params["weight"]
    return sparse_conv(x, weight.reshape(-1, *weight.shape[3:]).to(x.dtype), table, inverse, tiles)


def apply(
    params: dict, state: dict, x: Tensor, table: Tensor, inverse: Tensor, valid: Tensor, tiles: Tiles = (), **norm: Any
) -> tuple[Tensor, dict]:
    """relu(norm(conv(x))) [W C_out] with rows that are not `valid` [W] at zero, and the new state.

    `norm`: train, momentum and eps, as in `conv_norm.finish`.
    """
    return conv_norm.finish(params, state, convolve(params["conv"], x, table, inverse, tiles), valid=valid, **norm)
