"""Meaning of the neighbour tables in plain torch with static shapes: sorted 64-bit cell keys and binary search."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

Axes = Sequence[int]  # of x, y and z
NOWHERE = 1 << 62  # key of an empty row; larger than any cell's


def submanifold(coords: Tensor, valid: Tensor, kernel: Axes, grid: Axes, batch: int | None = None) -> Tensor:
    """As `bevfn.kernels.neighbours.submanifold`, in the order of the operator's schema, on any device."""
    V = coords.shape[0]
    if V == 0:
        return coords.new_empty(kernel[0] * kernel[1] * kernel[2], 0)
    sample, site = coords[:, 0].long(), coords[:, 1:].long()  # V, V 3
    keys, rows = torch.sort(torch.where(valid, _key(sample, site, grid), torch.full_like(sample, NOWHERE)))
    shift = _offsets(kernel, coords) - torch.tensor([k // 2 for k in kernel], device=coords.device)  # K 3
    wanted = site[None] + shift[:, None]  # K V 3
    inside = _inside(wanted, grid) & valid[None]
    found, position = _find(keys, _key(sample[None], wanted, grid), inside)
    row = rows.index_select(0, position.reshape(-1)).reshape(position.shape)
    return torch.where(found, row, torch.full_like(row, -1)).to(torch.int32)


def strided(
    coords: Tensor, valid: Tensor, kernel: Axes, stride: Axes, padding: Axes, grid: Axes, capacity: int, batch: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `bevfn.kernels.neighbours.strided`, in the order of the operator's schema, on any device."""
    if coords.shape[0] == 0:
        coords, valid = coords.new_zeros(1, 4), valid.new_zeros(1)
        sites, used, table, inverse, found = strided(coords, valid, kernel, stride, padding, grid, capacity, batch)
        return sites, used, table, inverse[:, :0].contiguous(), found
    V, device = coords.shape[0], coords.device
    out = out_grid(grid, kernel, stride, padding)
    sample, site = coords[:, 0].long(), coords[:, 1:].long()
    step, pad = torch.tensor(stride, device=device), torch.tensor(padding, device=device)

    # Along an axis input i feeds the outputs floor((i + pad) / stride) - j with j < ceil(kernel / stride), no others:
    # fewer candidates to sort than one per offset (8 instead of 27 for kernel 3, stride 2).
    reach = torch.tensor(list(itertools.product(*(range(-(-k // s)) for k, s in zip(kernel, stride)))), device=device)
    last = torch.div(site + pad, step, rounding_mode="floor")  # V 3
    candidate = last[None] - reach[:, None]  # J V 3
    offset = (site + pad)[None] - candidate * step  # J V 3, the kernel offset it would use
    feeds = _inside(candidate, out) & _inside(offset, kernel) & valid[None]
    keys = _key(sample[None], candidate, out)
    keys, _ = torch.sort(torch.where(feeds, keys, torch.full_like(keys, NOWHERE)).reshape(-1))
    fresh = torch.cat([keys[:1] == keys[:1], keys[1:] != keys[:-1]]) & (keys < NOWHERE)  # first of equal keys
    number = torch.cumsum(fresh.to(torch.int64), 0) - 1
    found = fresh.to(torch.int32).sum().to(torch.int32)
    slot = torch.where(fresh & (number < capacity), number, torch.full_like(number, capacity))
    sites = torch.full((capacity + 1,), NOWHERE, device=device).scatter(0, slot, keys)[:capacity]  # W, ascending
    out_valid = torch.arange(capacity, device=device) < found

    X, Y, Z = out
    plane = torch.div(sites, Z, rounding_mode="floor")
    line = torch.div(plane, Y, rounding_mode="floor")
    top = torch.div(line, X, rounding_mode="floor")
    out_coords = torch.stack([top, line - top * X, plane - line * Y, sites - plane * Z], 1)  # W 4
    out_coords = torch.where(out_valid[:, None], out_coords, torch.full_like(out_coords, -1)).to(torch.int32)

    reads = site[None] + pad - _offsets(kernel, coords)[:, None]  # K V 3, output position times stride
    target = torch.div(reads, step, rounding_mode="floor")
    feeds = _every(target * step == reads) & _inside(target, out) & valid[None]
    hit, position = _find(sites.contiguous(), _key(sample[None], target, out), feeds)
    inverse = torch.where(hit, position, torch.full_like(position, -1))  # K V
    column = torch.where(hit, position, torch.full_like(position, capacity))
    row = torch.arange(V, device=device).expand(column.shape)
    table = torch.full((column.shape[0], capacity + 1), -1, device=device).scatter(1, column, row)[:, :capacity]
    return out_coords, out_valid, table.to(torch.int32).contiguous(), inverse.to(torch.int32), found


def out_grid(grid: Axes, kernel: Axes, stride: Axes, padding: Axes) -> tuple[int, int, int]:
    """Extent of a strided convolution's output, per axis."""
    X, Y, Z = ((g + 2 * p - k) // s + 1 for g, k, s, p in zip(grid, kernel, stride, padding))
    return X, Y, Z


def _offsets(kernel: Axes, like: Tensor) -> Tensor:
    """[K 3] int64 kernel offsets, row-major."""
    return torch.tensor(list(itertools.product(*map(range, kernel))), device=like.device)


def _key(sample: Tensor, site: Tensor, grid: Axes) -> Tensor:
    X, Y, Z = grid
    return ((sample * X + site[..., 0]) * Y + site[..., 1]) * Z + site[..., 2]


def _inside(site: Tensor, grid: Axes) -> Tensor:
    return _every((site >= 0) & (site < torch.tensor(grid, device=site.device)))


def _every(axes: Tensor) -> Tensor:
    """[... 3] bool -> [...]; stock torchair has no converter of all(dim)."""
    return axes[..., 0] & axes[..., 1] & axes[..., 2]


def _find(keys: Tensor, wanted: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """(found, position) of `wanted` in the ascending `keys`; position is in range where nothing is found too."""
    position = torch.searchsorted(keys, wanted).clamp(max=keys.shape[0] - 1)
    there = keys.index_select(0, position.reshape(-1)).reshape(position.shape)
    return (there == wanted) & allowed, position
