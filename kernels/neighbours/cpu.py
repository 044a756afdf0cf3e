"""Host lowering of the neighbour tables: `cpu.cpp`, equal to the reference entry for entry."""

import math

import torch
from torch import Tensor

from bevfn.kernels import indices, native
from bevfn.kernels.neighbours import reference
from bevfn.kernels.neighbours.reference import Axes


def submanifold(coords: Tensor, valid: Tensor, kernel: Axes, grid: Axes, batch: int | None = None) -> Tensor:
    """As `bevfn.kernels.neighbours.submanifold`, in the order of the operator's schema."""
    V = coords.shape[0]
    indices.check("neighbours", "rows", V)
    coords, valid = coords.contiguous(), valid.contiguous()
    table = torch.empty(kernel[0] * kernel[1] * kernel[2], V, dtype=torch.int32)
    wrong = native.call("neighbours", "submanifold", coords, valid, V, kernel, grid, table)
    if batch is not None and wrong < 0:
        beyond = valid & (coords[:, 0] >= batch)
        wrong = int(beyond.to(torch.int8).argmax()) if bool(beyond.any()) else wrong
    _check(wrong, coords, grid, batch)
    return table


def strided(
    coords: Tensor, valid: Tensor, kernel: Axes, stride: Axes, padding: Axes, grid: Axes, capacity: int, batch: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `bevfn.kernels.neighbours.strided`, in the order of the operator's schema."""
    V, K = coords.shape[0], kernel[0] * kernel[1] * kernel[2]
    reach = [-(-k // s) for k, s in zip(kernel, stride)]  # outputs that an input can feed along an axis
    indices.check("neighbours", "candidates for outputs", V * math.prod(reach))
    indices.check("neighbours", "output rows", capacity)
    coords, valid = coords.contiguous(), valid.contiguous()
    out_coords = torch.empty(capacity, 4, dtype=torch.int32)
    out_valid = torch.empty(capacity, dtype=torch.bool)
    table = torch.empty(K, capacity, dtype=torch.int32)
    inverse = torch.empty(K, V, dtype=torch.int32)
    found = torch.empty((), dtype=torch.int32)
    out_grid = reference.out_grid(grid, kernel, stride, padding)
    axes, outputs = (kernel, stride, padding, grid, out_grid), (out_coords, out_valid, table, inverse, found)
    wrong = native.call("neighbours", "strided", coords, valid, V, *axes, capacity, batch, *outputs)
    _check(wrong, coords, grid, batch)
    return outputs


def _check(wrong: int, coords: Tensor, grid: Axes, batch: int | None) -> None:
    if wrong >= 0:
        limit = "" if batch is None else f" or the batch of {batch}"
        raise RuntimeError(
            f"neighbours: valid row {wrong} has (b, x, y, z) = {tuple(coords[wrong].tolist())}, "
            f"outside grid {tuple(grid)}{limit}; mark padded rows invalid or check the voxel range."
        )
