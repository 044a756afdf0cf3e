"""Meaning of `voxelize` in plain torch, with static shapes: one sort by cell, then ranks within equal keys.

Spelled with operators that stock torchair converts (torch_npu 2.13.0): no stable sort, all(dim) or index_copy.
"""

import torch
from torch import Tensor

Extent = list[float]  # along x, y and z, m


def voxelize(
    points: Tensor, valid: Tensor, lower: Extent, size: Extent, grid: list[int], max_points: int, max_voxels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `bevfn.kernels.voxelize.voxelize`, in the order of the operator's schema, on any device."""
    B, P, C = points.shape
    X, Y, Z = grid
    device = points.device
    if P == 0:
        points, valid = points.new_zeros(B, 1, C), valid.new_zeros(B, 1)
        P = 1
    # Tensors, not Python numbers: CUDA divides by a number by multiplying with its reciprocal.
    index = torch.floor((points[..., :3] - points.new_tensor(lower)) / points.new_tensor(size))  # B P 3
    inside = (index >= 0) & (index < points.new_tensor([float(n) for n in grid]))  # false for NaN
    finite = (points * 0).sum(-1) == 0  # false for NaN and infinity in any column
    inside = inside[..., 0] & inside[..., 1] & inside[..., 2] & finite & valid  # B P
    cell = torch.where(inside[..., None], index, torch.zeros_like(index)).to(torch.int64)  # B P 3
    key = (cell[..., 0] * Y + cell[..., 1]) * Z + cell[..., 2]
    key = torch.where(inside, key, torch.full_like(key, X * Y * Z))  # points to ignore sort last

    position = torch.arange(P, device=device).expand(B, P).contiguous()
    _, order = torch.sort(key * P + position, dim=1)  # B P; lists the points cell by cell, in point order
    key = torch.gather(key, 1, order)
    start = torch.searchsorted(key, key)  # B P, where the run of the same cell starts
    rank = position - start  # how many points of the same cell come earlier
    kept = key < X * Y * Z
    is_first = torch.zeros_like(key).scatter(1, order, ((rank == 0) & kept).to(torch.int64))  # in point order
    number = torch.cumsum(is_first, dim=1) - 1  # B P, number of the voxel that this point opens
    first = torch.gather(order, 1, start)  # B P, the voxel's first point
    voxel = torch.gather(number, 1, first)  # B P
    fits = kept & (voxel < max_voxels)

    # Everything else lands in one extra slot per sample, cut off at the end.
    base = torch.arange(B, device=device)[:, None] * (max_voxels + 1)
    slot = (torch.where(fits & (rank < max_points), voxel, torch.full_like(voxel, max_voxels)) + base).reshape(-1)
    opens = (torch.where(fits & (rank == 0), voxel, torch.full_like(voxel, max_voxels)) + base).reshape(-1)
    row = (order + torch.arange(B, device=device)[:, None] * P).reshape(-1)  # row of points.reshape(B * P, C)
    slots = B * (max_voxels + 1)

    count = torch.zeros(slots, dtype=torch.int32, device=device)
    count = count.index_add(0, slot, torch.ones_like(slot, dtype=torch.int32)).reshape(B, -1)[:, :max_voxels]
    values = torch.where(inside[..., None], points, torch.zeros_like(points)).reshape(B * P, C).index_select(0, row)
    total = points.new_zeros(slots, C).index_add(0, slot, values).reshape(B, -1, C)[:, :max_voxels]
    features = total / count.clamp(min=1)[..., None].to(points.dtype)  # B V C
    coords = torch.full((slots, 3), -1, dtype=torch.int32, device=device)
    cell = cell.to(torch.int32).reshape(B * P, 3).index_select(0, row)
    coords = coords.scatter(0, opens[:, None].expand(-1, 3), cell).reshape(B, -1, 3)[:, :max_voxels]
    return features, coords.contiguous(), count.contiguous(), is_first.sum(1).to(torch.int32)
