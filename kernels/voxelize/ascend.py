"""`voxelize` for Ascend: one stable sort brings the points of a cell together; then slots are read, not written.

The AI Core sorts floats only. The bits of positive floats are integers in the same order, so cell numbers are sorted as
such bits (CANN's own index_add sorts its indices in this way). Points are gathered and then summed, so that sums do not
depend on the order of atomic additions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bevfn.kernels.voxelize import reference
from bevfn.kernels.voxelize.reference import Extent

NORMAL, INFINITY = 0x00800000, 0x7F800000  # bits of the smallest normal number (less might count as 0) and of infinity


def voxelize(
    points: Tensor, valid: Tensor, lower: Extent, size: Extent, grid: list[int], max_points: int, max_voxels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `bevfn.kernels.voxelize.voxelize`, in the order of the operator's schema."""
    B, P, C = points.shape
    cells = grid[0] * grid[1] * grid[2]
    if NORMAL + cells >= INFINITY or B * max(P, max_voxels * max_points) >= 1 << 31:
        return reference.voxelize(points, valid, lower, size, grid, max_points, max_voxels)  # sorts on the AI CPU
    if P == 0:
        points, valid, P = points.new_zeros(B, 1, C), valid.new_zeros(B, 1), 1
    device = points.device
    key = _numbers(points, valid, lower, size, grid)  # B P int32, `cells` for points to ignore
    bits, order = torch.sort((key + NORMAL).view(torch.float32), dim=1, stable=True)
    key, order = bits.view(torch.int32) - NORMAL, order.to(torch.int32)  # cell by cell, in point order
    before = torch.cat([torch.full_like(key[:, :1], -1), key[:, :-1]], 1)
    first = (key != before) & (key < cells)  # B P, the first point of its cell

    # Voxels are numbered in the order of their first points: mark those in point order, and count.
    sample = torch.arange(B, dtype=torch.int32, device=device)[:, None]  # B 1
    row = (order + sample * P).reshape(-1)  # row of points.reshape(B * P, C)
    opens = points.new_zeros(B * P, dtype=torch.int32).index_add(0, row, first.reshape(-1).to(torch.int32))
    number = torch.cumsum(opens.reshape(B, P), 1, dtype=torch.int32)  # B P, from 1, in point order
    found = number[:, -1]
    number = number.reshape(-1).index_select(0, row).reshape(B, P) - 1  # of first points, in sorted order

    # Where each voxel starts in the sorted list. Points that open none write to a place of their own: no two collide.
    place = torch.arange(P, dtype=torch.int32, device=device)[None]  # 1 P
    slot = torch.where(first & (number < max_voxels), number, place + max_voxels) + sample * (max_voxels + P)
    start = points.new_zeros(B * (max_voxels + P), dtype=torch.int32)
    start = start.index_add(0, slot.reshape(-1), place.expand(B, P).reshape(-1)).reshape(B, -1)[:, :max_voxels]  # B V

    # The voxel's points are the next ones in the list, as long as they are of its cell.
    place = start[..., None] + torch.arange(max_points, dtype=torch.int32, device=device)  # B V M
    at = (place.clamp(max=P - 1) + sample[..., None] * P).reshape(-1)
    keys = key.reshape(-1).index_select(0, at).reshape(place.shape)
    used = torch.arange(max_voxels, dtype=torch.int32, device=device) < found[:, None]  # B V
    kept = (keys == keys[..., :1]) & (place < P) & used[..., None]  # B V M
    count = kept.to(torch.int32).sum(2, dtype=torch.int32)
    rows = points.reshape(B * P, C).index_select(0, row).index_select(0, at).reshape(*place.shape, C)
    total = torch.where(kept[..., None], rows, torch.zeros_like(rows)).sum(2)  # B V C
    features = total / count.clamp(min=1)[..., None].to(points.dtype)
    cell = torch.where(used[..., None], _cell(rows[:, :, 0], lower, size), -torch.ones_like(rows[:, :, 0, :3]))
    return features, cell.to(torch.int32), count, found


def _cell(points: Tensor, lower: Extent, size: Extent) -> Tensor:
    """Cell (x, y, z) of points [... C], float32 [... 3]; NaN for NaN."""
    return torch.floor((points[..., :3] - points.new_tensor(lower)) / points.new_tensor(size))


def _numbers(points: Tensor, valid: Tensor, lower: Extent, size: Extent, grid: list[int]) -> Tensor:
    """Number of each point's cell [B P] int32; the number of cells for points to ignore."""
    X, Y, Z = grid
    cell = _cell(points, lower, size)
    inside = (cell >= 0) & (cell < points.new_tensor([float(n) for n in grid]))  # false for NaN
    finite = (points * 0).sum(-1) == 0  # false for NaN and infinity in any column
    inside = inside[..., 0] & inside[..., 1] & inside[..., 2] & finite & valid
    x, y, z = torch.where(inside[..., None], cell, torch.zeros_like(cell)).to(torch.int32).unbind(-1)
    number = (x * Y + y) * Z + z
    return torch.where(inside, number, torch.full_like(number, X * Y * Z))


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {torch.ops.bevfn.voxelize.default: voxelize}
