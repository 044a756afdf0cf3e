"""Neighbour tables for Ascend: the grid as a dense table of rows, written by addition and read by gathering.

The AI Core neither sorts integers nor searches. It adds int32 rows by index and gathers them, so each cell of the grid
holds the number of its row: 4 bytes per cell, cleared at the memory's speed (DrivingSDK's kernels keep such a map too).
Additions never overlap but where equal values are counted, so the result does not depend on their order.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bevfn.kernels.neighbours import reference
from bevfn.kernels.neighbours.reference import Axes

INDEX = 1 << 31  # what an int32 index reaches: the largest table


def submanifold(coords: Tensor, valid: Tensor, kernel: Axes, grid: Axes, batch: int | None = None) -> Tensor:
    """As `bevfn.kernels.neighbours.submanifold`, in the order of the operator's schema."""
    V, (_, Y, Z) = coords.shape[0], grid
    cells = (batch or 0) * math.prod(grid)
    if V == 0 or batch is None or cells + V >= INDEX or math.prod(kernel) * V >= INDEX:
        return reference.submanifold(coords, valid, kernel, grid)  # sorts and searches on the AI CPU
    b, *site = coords.unbind(1)
    cell = _number(b, site, grid)  # V
    row = torch.arange(V, dtype=torch.int32, device=coords.device)
    # Cell -> row + 1, 0 where there is none. Empty rows add 0, each to a place of its own behind the cells.
    rows = coords.new_zeros(cells + V).index_add(
        0, torch.where(valid, cell, cells + row), torch.where(valid, row + 1, torch.zeros_like(row))
    )
    shifts = [[k - size // 2 for k in range(size)] for size in kernel]
    inside = [_inside(p + _column(s, p), n) for p, s, n in zip(site, shifts, grid)]  # per axis [k V]
    step = _column([(x * Y + y) * Z + z for x, y, z in itertools.product(*shifts)], cell)  # K 1
    wanted = torch.where(_all_offsets(inside) & valid, cell + step, torch.full_like(step, cells))  # K V
    return rows.index_select(0, wanted.reshape(-1)).reshape(wanted.shape) - 1


def strided(
    coords: Tensor, valid: Tensor, kernel: Axes, stride: Axes, padding: Axes, grid: Axes, capacity: int, batch: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `bevfn.kernels.neighbours.strided`, in the order of the operator's schema."""
    if coords.shape[0] == 0:
        coords, valid = coords.new_zeros(1, 4), valid.new_zeros(1)
        sites, used, table, inverse, found = strided(coords, valid, kernel, stride, padding, grid, capacity, batch)
        return sites, used, table, inverse[:, :0].contiguous(), found
    V, K = coords.shape[0], math.prod(kernel)
    out = reference.out_grid(grid, kernel, stride, padding)
    cells = batch * math.prod(out)
    if max(cells, K * capacity, K * V, K * batch * max(out)) + V >= INDEX:
        return reference.strided(coords, valid, kernel, stride, padding, grid, capacity, batch)
    b, *site = coords.unbind(1)
    row = torch.arange(V, dtype=torch.int32, device=coords.device)

    # Along an axis input p feeds the outputs last - j, j < ceil(kernel / stride), with kernel offset rest + j * stride.
    site = [p + pad for p, pad in zip(site, padding)]
    last = [torch.div(p, s, rounding_mode="floor") for p, s in zip(site, stride)]
    rest = [p - q * s for p, q, s in zip(site, last, stride)]
    reach = [range(-(-k // s)) for k, s in zip(kernel, stride)]
    steps = list(itertools.product(*reach))  # J of them: 8 for kernel 3, stride 2
    axes = zip(last, rest, reach, out, kernel, stride)
    fed = [_inside(q - _column(j, q), n) & (r + _column([i * s for i in j], q) < k) for q, r, j, n, k, s in axes]
    feeds = _all_offsets(fed) & valid  # J V

    # Mark the cells that are fed; what feeds nothing adds 0 to a place of its own behind them. The running count of
    # marked cells numbers the outputs in ascending order.
    cell = _number(b, last, out) - _column([(x * out[1] + y) * out[2] + z for x, y, z in steps], b)  # J V
    marks = coords.new_zeros(cells + V).index_add(
        0, torch.where(feeds, cell, cells + row).reshape(-1), feeds.reshape(-1).to(torch.int32)
    )
    number = _running_count(marks[:cells].reshape(batch * out[0], -1) > 0).reshape(-1)
    found = number[-1]
    slot = number.index_select(0, torch.where(feeds, cell, torch.zeros_like(cell)).reshape(-1)).reshape(cell.shape) - 1
    kept = feeds & (slot < capacity)  # J V

    x, y, z = (q - _column([step[axis] for step in steps], q) for axis, q in enumerate(last))  # J V
    out_coords = _averages([b * out[0] + x, y, z], torch.where(kept, slot, capacity + row), capacity + V)[:capacity]
    plane, y, z = out_coords.unbind(1)  # W
    sample = torch.div(plane, out[0], rounding_mode="floor")
    out_valid = torch.arange(capacity, dtype=torch.int32, device=coords.device) < found
    out_coords = torch.stack([sample, plane - sample * out[0], y, z], 1)
    out_coords = torch.where(out_valid[:, None], out_coords, torch.full_like(out_coords, -1))

    # The same pairs by kernel offset, from both ends.
    offset = _number(None, rest, kernel) + _column(
        [(x * stride[0] * kernel[1] + y * stride[1]) * kernel[2] + z * stride[2] for x, y, z in steps], b
    )  # J V
    table = coords.new_zeros(K * capacity + V).index_add(
        0,
        torch.where(kept, offset * capacity + slot, K * capacity + row).reshape(-1),
        torch.where(kept, row + 1, torch.zeros_like(slot)).reshape(-1),
    )
    table = table[: K * capacity].reshape(K, capacity) - 1
    by_offset = [tuple(o // s for o, s in zip(ks, stride)) for ks in itertools.product(*map(range, kernel))]
    step_of = torch.tensor([steps.index(step) for step in by_offset], device=coords.device)  # K
    same = _all_offsets([r == _column([i % s for i in range(k)], r) for r, k, s in zip(rest, kernel, stride)])  # K V
    inverse = torch.where(kept, slot, torch.full_like(slot, -1)).index_select(0, step_of)  # K V
    return out_coords, out_valid, table, torch.where(same, inverse, torch.full_like(inverse, -1)), found


def _averages(values: list[Tensor], slot: Tensor, size: int) -> Tensor:
    """[size 3] int32 from three [J V]: what all values of a slot agree on, as their sum over their number."""
    parts = torch.stack([*values, torch.ones_like(values[0])], -1).reshape(-1, 4)
    sums = parts.new_zeros(size, 4).index_add(0, slot.reshape(-1), parts)
    return torch.div(sums[:, :3], sums[:, 3:].clamp(min=1), rounding_mode="floor")


def _number(batch: Tensor | None, site: list[Tensor], grid: Axes) -> Tensor:
    """Row-major number of a cell of the grid, of all samples' cells if `batch` is given."""
    x = site[0] if batch is None else batch * grid[0] + site[0]
    return (x * grid[1] + site[1]) * grid[2] + site[2]


def _column(numbers: Iterable[int], like: Tensor) -> Tensor:
    """[n 1] in the dtype of `like`."""
    return torch.tensor(list(numbers), dtype=like.dtype, device=like.device)[:, None]


def _inside(position: Tensor, extent: int) -> Tensor:
    return (position >= 0) & (position < extent)


def _all_offsets(axes: list[Tensor]) -> Tensor:
    """Per axis [k V] bool -> [kx ky kz, V], true where all three are."""
    x, y, z = axes
    return (x[:, None, None] & y[:, None] & z).reshape(-1, x.shape[1])


def _running_count(flags: Tensor) -> Tensor:
    """[R C] bool -> [R C] int32, how many are true up to each, row by row: rows are counted side by side."""
    within = torch.cumsum(flags.to(torch.int32), 1, dtype=torch.int32)
    total = within[:, -1]
    return within + (torch.cumsum(total, 0, dtype=torch.int32) - total)[:, None]


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.bevfn.submanifold_neighbours.default: submanifold,
    torch.ops.bevfn.strided_neighbours.default: strided,
}
