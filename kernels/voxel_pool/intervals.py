"""Which points each BEV cell sums, as tables of one size: for a lowering that gathers rows much faster than it adds them.

The points of a cell are cut into intervals of `LENGTH`, as BEVPoolv2 (arXiv 2211.17111) sorts them into intervals of any length:
their sums are additions of rows side by side, and one row an interval is left to be added to its cell.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bevfn.kernels import indices, native

LENGTH = 16
"""More are fewer rows to add and more places without a point; 8 and 32 cost BEVFusion's step 3 to 4 ms more on an Ascend, on paper."""


class Intervals(NamedTuple):
    """Of the points [B N D H W] of B samples, G of them each."""

    points: Tensor
    """[B G LENGTH] int32, rows of a sample's points [N D+1 H W], whose last bin is nobody's: it fills the places without a point"""
    cells: Tensor
    """[B G] int32, of the sample; -1: an interval without points"""


def made(cell: Tensor, num_cells: int) -> Intervals:
    """The intervals of points on the CPU.

    Args:
        cell: [B N D H W] int32 as `voxel_pool` takes it: cells of sample b are b num_cells .. (b + 1) num_cells - 1, the points of
            any other are in no interval.
        num_cells: of one sample.

    Raises:
        ValueError: cell is not int32, or there are more points or intervals than it can number.
    """
    if cell.dtype != torch.int32:
        raise ValueError(f"voxel_pool: cell must be int32, got {cell.dtype}; convert it with .to(torch.int32).")
    B, N, D, H, W = cell.shape
    count = room(N * D * H * W, num_cells)
    indices.check("voxel_pool", "places of intervals", max(count * LENGTH, N * (D + 1) * H * W), smaller="grid")
    points = torch.empty(B, count, LENGTH, dtype=torch.int32, device="cpu")
    cells = torch.empty(B, count, dtype=torch.int32, device="cpu")
    native.call(
        "voxel_pool", "voxel_pool_intervals", cell.contiguous(), points, cells, B, N, D, H * W, num_cells, count, LENGTH
    )
    return Intervals(points, cells)


def room(points: int, num_cells: int) -> int:
    """Intervals that always suffice: full ones, and one that is not for every cell."""
    return points // LENGTH + min(points, num_cells)
