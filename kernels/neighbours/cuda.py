"""Neighbour tables for CUDA in Triton: 64-bit cell keys, sorted by torch, and binary search, all offsets in one kernel.

A submanifold table needs one search for each line of offsets along z: the cells of a line have consecutive keys, so the
further ones lie in the next places or are missing.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bevfn.kernels import indices
from bevfn.kernels.neighbours import reference
from bevfn.kernels.neighbours.reference import NOWHERE, Axes

ROWS = 128  # of a program


def submanifold(coords: Tensor, valid: Tensor, kernel: Axes, grid: Axes, batch: int | None = None) -> Tensor:
    """As `bevfn.kernels.neighbours.submanifold`, in the order of the operator's schema."""
    V = coords.shape[0]
    indices.check("neighbours", "rows", V)
    table = coords.new_empty(math.prod(kernel), V)
    if V == 0:
        return table
    coords, valid = coords.contiguous(), valid.contiguous()
    keys = torch.empty(V, dtype=torch.int64, device=coords.device)
    _keys[(triton.cdiv(V, ROWS),)](coords, valid, keys, V, *grid, NOWHERE=NOWHERE, ROWS=ROWS)
    keys, rows = torch.sort(keys, stable=True)
    _submanifold[(triton.cdiv(V, ROWS), kernel[0] * kernel[1])](
        coords,
        valid,
        keys,
        rows,
        table,
        V,
        *grid,
        KX=kernel[0],
        KY=kernel[1],
        KZ=kernel[2],
        STEPS=V.bit_length(),
        ROWS=ROWS,
    )
    return table


def strided(
    coords: Tensor, valid: Tensor, kernel: Axes, stride: Axes, padding: Axes, grid: Axes, capacity: int, batch: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `bevfn.kernels.neighbours.strided`, in the order of the operator's schema."""
    V, device = coords.shape[0], coords.device
    out = reference.out_grid(grid, kernel, stride, padding)
    reach = [-(-k // s) for k, s in zip(kernel, stride)]  # outputs that an input can feed along an axis
    indices.check("neighbours", "candidates for outputs", V * math.prod(reach))
    indices.check("neighbours", "output rows", capacity)
    coords, valid = coords.contiguous(), valid.contiguous()
    rule = (*stride, *padding, *out)
    candidates = torch.empty(math.prod(reach), V, dtype=torch.int64, device=device)
    if V:
        _candidates[(triton.cdiv(V, ROWS), math.prod(reach))](
            coords, valid, candidates, V, *rule, *kernel, *reach[1:], NOWHERE=NOWHERE, ROWS=ROWS
        )
    sites, found = _distinct(candidates.reshape(-1), capacity)
    out_coords = torch.empty(capacity, 4, dtype=torch.int32, device=device)
    out_valid = torch.empty(capacity, dtype=torch.bool, device=device)
    _coords[(triton.cdiv(capacity, ROWS),)](sites, out_coords, out_valid, capacity, *out, NOWHERE=NOWHERE, ROWS=ROWS)
    table = torch.full((math.prod(kernel), capacity), -1, dtype=torch.int32, device=device)
    inverse = torch.empty(math.prod(kernel), V, dtype=torch.int32, device=device)
    if V:
        _strided[(triton.cdiv(V, ROWS), math.prod(kernel))](
            coords,
            valid,
            sites,
            table,
            inverse,
            V,
            capacity,
            *rule,
            *kernel[1:],
            STEPS=capacity.bit_length(),
            ROWS=ROWS,
        )
    return out_coords, out_valid, table, inverse, found


def _distinct(keys: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """(The least distinct keys [capacity], ascending, NOWHERE after the last; how many there are, [] int32)."""
    keys, _ = torch.sort(keys)
    fresh = keys < NOWHERE
    fresh[1:] &= keys[1:] != keys[:-1]
    number = torch.cumsum(fresh, 0) - 1
    slot = torch.where(fresh, number, capacity).clamp(max=capacity)  # the others land in one more, cut off
    sites = torch.full((capacity + 1,), NOWHERE, device=keys.device).scatter(0, slot, keys)
    return sites[:capacity].contiguous(), fresh.sum(dtype=torch.int32)


@triton.jit
def _first_at_least(keys, count, wanted, STEPS: tl.constexpr):
    """Place of the first of the ascending `keys` that is not below `wanted`; `count` if all are."""
    low = tl.zeros_like(wanted).to(tl.int32)
    high = low + count
    for _ in range(STEPS):
        middle = (low + high) // 2
        open = low < high
        below = open & (tl.load(keys + middle, mask=open, other=0) < wanted)
        low = tl.where(below, middle + 1, low)
        high = tl.where(open & (below == 0), middle, high)
    return low


@triton.jit
def _keys(coords, valid, keys, V, X, Y, Z, NOWHERE: tl.constexpr, ROWS: tl.constexpr):
    """Key of every row's cell."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < V
    site = coords + row.to(tl.int64) * 4
    key = tl.load(site, mask=live, other=0).to(tl.int64) * X + tl.load(site + 1, mask=live, other=0)
    key = (key * Y + tl.load(site + 2, mask=live, other=0)) * Z + tl.load(site + 3, mask=live, other=0)
    used = live & (tl.load(valid + row, mask=live, other=0) != 0)
    tl.store(keys + row, tl.where(used, key, NOWHERE), mask=live)


@triton.jit
def _submanifold(
    coords,
    valid,
    keys,
    rows,
    table,
    V,
    X,
    Y,
    Z,
    KX: tl.constexpr,
    KY: tl.constexpr,
    KZ: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some rows along one line of offsets."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = tl.program_id(1)
    live = row < V
    site = coords + row.to(tl.int64) * 4
    x = tl.load(site + 1, mask=live, other=0) + line // KY - KX // 2
    y = tl.load(site + 2, mask=live, other=0) + line % KY - KY // 2
    z = tl.load(site + 3, mask=live, other=0) - KZ // 2
    used = live & (tl.load(valid + row, mask=live, other=0) != 0) & (x >= 0) & (x < X) & (y >= 0) & (y < Y)
    start = ((tl.load(site, mask=live, other=0).to(tl.int64) * X + x) * Y + y) * Z  # key of the line's z = 0
    place = _first_at_least(keys, V, start + tl.maximum(z, 0), STEPS)
    for k in range(KZ):
        inside = used & (z + k >= 0) & (z + k < Z) & (place < V)
        found = inside & (tl.load(keys + place, mask=inside, other=-1) == start + (z + k))
        other = tl.load(rows + place, mask=found, other=-1)
        tl.store(table + (line * KZ + k).to(tl.int64) * V + row, other.to(tl.int32), mask=live)
        place += found.to(tl.int32)


@triton.jit
def _candidates(
    coords,
    valid,
    candidates,
    V,
    SX,
    SY,
    SZ,
    PX,
    PY,
    PZ,
    X,
    Y,
    Z,
    KX,
    KY,
    KZ,
    JY,
    JZ,
    NOWHERE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Keys of the j-th outputs that some rows may feed; the last along an axis is at (site + padding) // stride."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1)
    live = row < V
    site = coords + row.to(tl.int64) * 4
    used = live & (tl.load(valid + row, mask=live, other=0) != 0)
    x = tl.load(site + 1, mask=used, other=0) + PX
    y = tl.load(site + 2, mask=used, other=0) + PY
    z = tl.load(site + 3, mask=used, other=0) + PZ
    to_x, to_y, to_z = x // SX - j // (JY * JZ), y // SY - j // JZ % JY, z // SZ - j % JZ
    used = used & (to_x >= 0) & (to_x < X) & (to_y >= 0) & (to_y < Y) & (to_z >= 0) & (to_z < Z)
    used = used & (x - to_x * SX < KX) & (y - to_y * SY < KY) & (z - to_z * SZ < KZ)
    key = ((tl.load(site, mask=used, other=0).to(tl.int64) * X + to_x) * Y + to_y) * Z + to_z
    tl.store(candidates + j.to(tl.int64) * V + row, tl.where(used, key, NOWHERE), mask=live)


@triton.jit
def _coords(sites, coords, valid, W, X, Y, Z, NOWHERE: tl.constexpr, ROWS: tl.constexpr):
    """The cell of every key."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < W
    key = tl.load(sites + row, mask=live, other=NOWHERE)
    used = key < NOWHERE
    line = key // Z
    plane = line // Y
    place = coords + row.to(tl.int64) * 4
    tl.store(place, tl.where(used, plane // X, -1).to(tl.int32), mask=live)
    tl.store(place + 1, tl.where(used, plane % X, -1).to(tl.int32), mask=live)
    tl.store(place + 2, tl.where(used, line % Y, -1).to(tl.int32), mask=live)
    tl.store(place + 3, tl.where(used, key % Z, -1).to(tl.int32), mask=live)
    tl.store(valid + row, used, mask=live)


@triton.jit
def _strided(
    coords,
    valid,
    sites,
    table,
    inverse,
    V,
    W,
    SX,
    SY,
    SZ,
    PX,
    PY,
    PZ,
    X,
    Y,
    Z,
    KY,
    KZ,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The outputs that some rows feed under one offset; no other row feeds them under it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1)
    live = row < V
    site = coords + row.to(tl.int64) * 4
    used = live & (tl.load(valid + row, mask=live, other=0) != 0)
    x = tl.load(site + 1, mask=used, other=0) + PX - k // (KY * KZ)
    y = tl.load(site + 2, mask=used, other=0) + PY - k // KZ % KY
    z = tl.load(site + 3, mask=used, other=0) + PZ - k % KZ
    used = used & (x >= 0) & (y >= 0) & (z >= 0) & (x % SX == 0) & (y % SY == 0) & (z % SZ == 0)
    x, y, z = x // SX, y // SY, z // SZ
    used = used & (x < X) & (y < Y) & (z < Z)
    key = ((tl.load(site, mask=used, other=0).to(tl.int64) * X + x) * Y + y) * Z + z
    place = _first_at_least(sites, W, key, STEPS)
    found = used & (place < W)
    found = found & (tl.load(sites + place, mask=found, other=-1) == key)
    tl.store(inverse + k.to(tl.int64) * V + row, tl.where(found, place, -1), mask=live)
    tl.store(table + k.to(tl.int64) * W + place, row, mask=found)
