"""`linear_assignment` for CUDA in Triton: a program for each sample, shortest augmenting paths with prices in float64.

The algorithm is cpu.cpp's (Jonker & Volgenant 1987), with boxes as rows. A sample with more boxes than queries gets one
column of zeros more for each box left over. Everything but the costs stays in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bevfn.kernels.linear_assignment import reference

COLUMNS = 4096  # queries or boxes that registers hold; larger problems are solved on the host


def linear_assignment(cost: Tensor, valid: Tensor) -> Tensor:
    """cost [B Q G] float, valid [B G] bool -> [B G] int64, query of each box or -1."""
    B, Q, G = cost.shape
    if max(Q, G) > COLUMNS:
        return reference.linear_assignment(cost, valid)
    match = torch.full((B, G), -1, dtype=torch.int64, device=cost.device)
    if cost.numel() == 0:
        return match
    costs = _finite(cost.double(), valid).transpose(1, 2).contiguous()
    wide, tall = max(16, triton.next_power_of_2(max(Q, G))), max(16, triton.next_power_of_2(G))
    warps = min(16, max(4, wide // 128))  # four columns to a thread or fewer, which registers hold
    _assign[(B,)](costs, valid.contiguous(), match, Q, G, WIDE=wide, TALL=tall, num_warps=warps)
    return match


def _finite(cost: Tensor, valid: Tensor) -> Tensor:
    """cost [B Q G] with NaN and infinities as in `reference.finite`, of the valid boxes."""
    known = (cost.abs() <= reference.LIMIT) & valid[:, None]  # false for NaN
    low = torch.where(known, cost, torch.inf).amin((1, 2), keepdim=True)
    high = torch.where(known, cost, -torch.inf).amax((1, 2), keepdim=True)
    low, high = (torch.where(low <= high, bound, 0) for bound in (low, high))  # 0 where none is known
    rows = valid.sum(1).clamp(max=cost.shape[1])[:, None, None]
    return torch.where(known, cost, high + (rows + 1) * (high - low + 1))


@triton.jit
def _assign(cost, valid, match, Q, G, WIDE: tl.constexpr, TALL: tl.constexpr):
    """One sample. Rows are boxes, columns queries and then zeros, as many as there are boxes too many.

    Prices satisfy cost - row price - column price >= 0, with equality for assigned pairs. Each box is brought in along
    the path of least reduced cost to a free column, and prices follow the distances.
    """
    sample = tl.program_id(0).to(tl.int64)
    cost += sample * Q * G
    c, r = tl.arange(0, WIDE), tl.arange(0, TALL)
    boxes = tl.load(valid + sample * G + r, mask=r < G, other=0).to(tl.int32)
    columns = tl.maximum(Q, tl.sum((boxes != 0).to(tl.int32), 0))
    row_price, column_price = tl.zeros((TALL,), tl.float64), tl.zeros((WIDE,), tl.float64)
    column_of, row_of = tl.full((TALL,), -1, tl.int32), tl.full((WIDE,), -1, tl.int32)
    for free in range(G):
        if tl.sum(tl.where(r == free, boxes, 0), 0) != 0:
            distance = tl.full((WIDE,), float("inf"), tl.float64)
            previous = tl.full((WIDE,), -1, tl.int32)
            closed, visited = tl.zeros((WIDE,), tl.int32), tl.zeros((TALL,), tl.int32)
            entered = tl.zeros((TALL,), tl.float64)  # distance at which a row was reached
            reached = tl.sum(tl.zeros((WIDE,), tl.float64), 0)
            row = free * 1
            sink = free * 0 - 1
            while sink < 0:  # close the nearest open column
                visited = tl.where(r == row, 1, visited)
                entered = tl.where(r == row, reached, entered)
                base = reached - tl.sum(tl.where(r == row, row_price, 0.0), 0)
                through = base + tl.load(cost + row.to(tl.int64) * Q + c, mask=c < Q, other=0.0) - column_price  # type: ignore[attr-defined]
                nearer = (through < distance) & (closed == 0) & (c < columns)
                distance = tl.where(nearer, through, distance)
                previous = tl.where(nearer, row, previous)
                open = tl.where(closed == 0, distance, float("inf"))
                reached = tl.min(open, 0)
                # Among equals a free column ends the search.
                rank = tl.where(row_of < 0, c, c + WIDE)
                column = tl.min(tl.where((open == reached) & (closed == 0), rank, 2 * WIDE), 0) % WIDE
                closed = tl.where(c == column, 1, closed)
                row = tl.sum(tl.where(c == column, row_of, 0), 0)
                sink = tl.where(row < 0, column, -1)
            row_price += tl.where(visited != 0, reached - entered, 0.0)
            column_price -= tl.where(closed != 0, reached - tl.where(closed != 0, distance, 0.0), 0.0)
            while sink >= 0:  # flip the path
                row = tl.sum(tl.where(c == sink, previous, 0), 0)
                row_of = tl.where(c == sink, row, row_of)
                before = tl.sum(tl.where(r == row, column_of, 0), 0)
                column_of = tl.where(r == row, sink, column_of)
                sink = tl.where(row == free, -1, before)
    found = tl.where(column_of < Q, column_of, -1)  # a column of zeros is nobody's query
    tl.store(match + sample * G + r, found.to(tl.int64), mask=r < G)
