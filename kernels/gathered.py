"""What the lowerings for CUDA share in Triton: rows that are gathered, and their weighted sums by sorted intervals.

Imported by the lowerings only: it needs Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 16  # that a program adds at a time: the median cell of BEVFusion's grid has 15 points
CHANNELS = 128  # of a program


def sums(
    order: Tensor, starts: Tensor, weights: Tensor, values: Tensor, *, image: int, pixels: int, dtype: torch.dtype
) -> Tensor:
    """out[i] = sum over the entries e of interval i of weights[e] * values[row of e], added in float32.

    Args:
        order, starts: as `cuda.intervals` makes them: [N] int32 and [count + 1] int32.
        weights: [N], of each entry.
        values: [R C]; entry e has row e // image * pixels + e % pixels.
        dtype: of the result.

    Returns:
        [count C].
    """
    count, C = len(starts) - 1, values.shape[1]
    out = torch.empty(count, C, dtype=dtype, device=values.device)
    if out.numel():
        wide = min(CHANNELS, triton.next_power_of_2(C))
        _sums[(count, triton.cdiv(C, wide))](
            order, starts, weights, values, out, image, pixels, C=C, WIDE=wide, ENTRIES=ENTRIES
        )
    return out


@triton.jit
def rows(values, row, step, there, channel, count):
    """[rows channels] of the matrix at `values`, whose rows are `step` apart: 0 in rows not there and from channel `count` on."""
    at = row.to(tl.int64)[:, None] * step + channel[None, :]
    return tl.load(values + at, mask=there[:, None] & (channel < count)[None, :], other=0.0)


@triton.jit
def _sums(
    order, starts, weights, values, out, IMAGE, PIXELS, C: tl.constexpr, WIDE: tl.constexpr, ENTRIES: tl.constexpr
):
    """One interval of the sorted entries, ENTRIES at a time."""
    interval = tl.program_id(0)
    end = tl.load(starts + interval + 1)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros((ENTRIES, WIDE), tl.float32)
    for first in range(tl.load(starts + interval), end, ENTRIES):
        at = first + tl.arange(0, ENTRIES)
        entry = tl.load(order + at, mask=at < end, other=0)
        weight = tl.load(weights + entry, mask=at < end, other=0.0).to(tl.float32)
        row = (entry // IMAGE).to(tl.int64) * PIXELS + entry % PIXELS
        total += weight[:, None] * rows(values, row, C, at < end, channel, C).to(tl.float32)
    to = out + interval.to(tl.int64) * C + channel
    tl.store(to, tl.sum(total, 0).to(out.dtype.element_ty), mask=channel < C)
