"""`voxelize` for CUDA in Triton: points sorted by cell, every voxel adds up its first points in their order.

Equal to the CPU's bit for bit: divisions are true ones, and a voxel's sum takes one point after the other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bevfn.kernels import gathered, indices
from bevfn.kernels.voxelize.reference import Extent

POINTS = 256  # whose cells a program finds
VOXELS = 32  # that a program adds up


def voxelize(
    points: Tensor, valid: Tensor, lower: Extent, size: Extent, grid: list[int], max_points: int, max_voxels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `bevfn.kernels.voxelize.voxelize`, in the order of the operator's schema."""
    (B, P, C), V, device = points.shape, max_voxels, points.device
    indices.check("voxelize", "points", B * P)
    points = points.contiguous()
    features = torch.empty(B, V, C, dtype=torch.float32, device=device)
    coords = torch.empty(B, V, 3, dtype=torch.int32, device=device)
    count = torch.empty(B, V, dtype=torch.int32, device=device)
    cells = grid[0] * grid[1] * grid[2]
    key = torch.empty(B, P, dtype=torch.int64, device=device)
    if B * P:
        _cells[(triton.cdiv(B * P, POINTS),)](
            points,
            valid.contiguous(),
            key,
            B * P,
            *lower,
            *size,
            *grid,
            cells,
            C=C,
            WIDE=triton.next_power_of_2(C),
            POINTS=POINTS,
        )
    key, order = torch.sort(key, dim=1, stable=True)  # cell by cell, in point order
    starts, found = _starts(key, order, cells, V)
    if B:
        _means[(B, triton.cdiv(V, VOXELS))](
            points,
            key,
            order,
            starts,
            features,
            coords,
            count,
            P,
            V,
            grid[1],
            grid[2],
            max_points,
            C=C,
            WIDE=triton.next_power_of_2(C),
            VOXELS=VOXELS,
        )
    return features, coords, count, found


def _starts(key: Tensor, order: Tensor, cells: int, voxels: int) -> tuple[Tensor, Tensor]:
    """Of sorted keys [B P] and the points they belong to: where each voxel's points start in them, [B voxels] int32,
    -1 in empty slots, voxels in the order of their first points; and the occupied cells [B] int32.
    """
    B, P = key.shape
    opens = key < cells
    opens[:, 1:] &= key[:, 1:] != key[:, :-1]
    opening = torch.zeros(B, P, dtype=torch.int32, device=key.device).scatter(1, order, opens.to(torch.int32))
    number = torch.cumsum(opening, 1) - 1  # by point
    voxel = torch.where(opens, torch.gather(number, 1, order), voxels).clamp(max=voxels)  # by place; beyond: one more
    place = torch.arange(P, dtype=torch.int32, device=key.device).expand(B, P)
    starts = torch.full((B, voxels + 1), -1, dtype=torch.int32, device=key.device).scatter(1, voxel, place)
    return starts[:, :voxels].contiguous(), opening.sum(1, dtype=torch.int32)


@triton.jit
def _cells(
    points,
    valid,
    key,
    ALL,
    LOW_X,
    LOW_Y,
    LOW_Z,
    SIZE_X,
    SIZE_Y,
    SIZE_Z,
    X,
    Y,
    Z,
    CELLS,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    POINTS: tl.constexpr,
):
    """The cell of every point as a number, CELLS for those that are ignored. Extents are float32, as the points are."""
    point = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    live = point < ALL
    row = points + point.to(tl.int64) * C
    column = tl.arange(0, WIDE)
    values = gathered.rows(points, point, C, live, column, C)
    kept = live & (tl.load(valid + point, mask=live, other=0) != 0)
    kept = kept & (tl.max((tl.abs(values) < float("inf")).to(tl.int32) ^ 1, 1) == 0)  # false for NaN
    x = tl.floor(tl.div_rn(tl.load(row, mask=kept, other=0.0) - LOW_X, SIZE_X))
    y = tl.floor(tl.div_rn(tl.load(row + 1, mask=kept, other=0.0) - LOW_Y, SIZE_Y))
    z = tl.floor(tl.div_rn(tl.load(row + 2, mask=kept, other=0.0) - LOW_Z, SIZE_Z))
    kept = kept & (x >= 0) & (x < X) & (y >= 0) & (y < Y) & (z >= 0) & (z < Z)
    x, y, z = tl.where(kept, x, 0.0), tl.where(kept, y, 0.0), tl.where(kept, z, 0.0)
    cell = (x.to(tl.int64) * Y + y.to(tl.int64)) * Z + z.to(tl.int64)
    tl.store(key + point, tl.where(kept, cell, CELLS), mask=live)


@triton.jit
def _means(
    points,
    key,
    order,
    starts,
    features,
    coords,
    count,
    P,
    V,
    Y,
    Z,
    MAX_POINTS,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    VOXELS: tl.constexpr,
):
    """Some voxels of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    points += sample * P * C
    key += sample * P
    order += sample * P
    voxel = tl.program_id(1) * VOXELS + tl.arange(0, VOXELS)
    slot = sample * V + voxel
    start = tl.load(starts + slot, mask=voxel < V, other=-1)
    used = start >= 0
    cell = tl.load(key + start, mask=used, other=-1)
    column = tl.arange(0, WIDE)
    total = tl.zeros((VOXELS, WIDE), tl.float32)
    number = tl.zeros((VOXELS,), tl.int32)
    for i in range(MAX_POINTS):
        at = start + i
        belongs = used & (at < P)
        belongs = belongs & (tl.load(key + at, mask=belongs, other=-1) == cell)
        point = tl.load(order + at, mask=belongs, other=0)
        total += gathered.rows(points, point, C, belongs, column, C)
        number += belongs.to(tl.int32)
    divisor = tl.maximum(number, 1).to(tl.float32)[:, None] + tl.zeros((VOXELS, WIDE), tl.float32)
    mean = tl.div_rn(total, divisor)
    live = voxel < V
    tl.store(features + slot[:, None] * C + column[None, :], mean, mask=live[:, None] & (column < C)[None, :])
    line = cell // Z
    tl.store(coords + slot * 3, tl.where(used, line // Y, -1).to(tl.int32), mask=live)
    tl.store(coords + slot * 3 + 1, tl.where(used, line % Y, -1).to(tl.int32), mask=live)
    tl.store(coords + slot * 3 + 2, tl.where(used, cell % Z, -1).to(tl.int32), mask=live)
    tl.store(count + slot, number, mask=live)
