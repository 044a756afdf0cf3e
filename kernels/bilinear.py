"""What deformable convolution and attention share on CUDA: bilinear samples, and sums of gradients by the pixel they reach.

Many samples reach one pixel. Instead of atomic additions, whose order would be another in every run, the corners of all
samples are sorted by pixel and a program for each pixel adds up its own. Imported by the lowerings only: it needs Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bevfn.kernels import cuda

ENTRIES = 16  # that a program adds at a time


def sums_by_pixel(pixels: Tensor, shares: Tensor, values: Tensor, count: int) -> Tensor:
    """out[p] = sum over the entries e with pixels[e] = p of shares[e] * values[e // (N / len(values))], in float32.

    Args:
        pixels: [N] int32; outside 0 .. count - 1 an entry reaches none.
        shares: [N] float32.
        values: [R C], R divides N: entries of one value follow each other.
        count: number of pixels.

    Returns:
        [count C] float32.
    """
    C = values.shape[1]
    out = torch.zeros(count, C, dtype=torch.float32, device=values.device)
    if pixels.numel() and out.numel():
        order, starts = cuda.intervals(pixels, count)
        wide = min(128, triton.next_power_of_2(C))
        _sums[(count, triton.cdiv(C, wide))](
            order, starts, shares, values, out, pixels.numel() // len(values), C=C, WIDE=wide, ENTRIES=ENTRIES
        )
    return out


@triton.jit
def place(counts, y, x, HEIGHT, WIDTH):
    """(counts, and the position is in -1 .. size; the pixel above and to the left; how far the sample is from it)."""
    inside = counts & (y > -1) & (y < HEIGHT) & (x > -1) & (x < WIDTH)  # false for NaN
    y, x = tl.where(inside, y, 0.0), tl.where(inside, x, 0.0)
    top, left = tl.floor(y), tl.floor(x)
    return inside, top.to(tl.int32), left.to(tl.int32), y - top, x - left


@triton.jit
def corner(inside, top, left, y, x, HEIGHT, WIDTH, DOWN: tl.constexpr, RIGHT: tl.constexpr):
    """One of the four pixels around a sample: (number in the image, whether in it, share, its derivatives by y and x)."""
    row, column = top + DOWN, left + RIGHT
    there = inside & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    share_y = (1 - DOWN) + (2 * DOWN - 1) * y
    share_x = (1 - RIGHT) + (2 * RIGHT - 1) * x
    return row * WIDTH + column, there, share_y * share_x, (2 * DOWN - 1) * share_x, (2 * RIGHT - 1) * share_y


@triton.jit
def _sums(order, starts, shares, values, out, EACH, C: tl.constexpr, WIDE: tl.constexpr, ENTRIES: tl.constexpr):
    """One pixel's interval of the sorted entries, ENTRIES at a time."""
    pixel = tl.program_id(0)
    end = tl.load(starts + pixel + 1)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros((ENTRIES, WIDE), tl.float32)
    for first in range(tl.load(starts + pixel), end, ENTRIES):
        at = first + tl.arange(0, ENTRIES)
        entry = tl.load(order + at, mask=at < end, other=0)
        share = tl.load(shares + entry, mask=at < end, other=0.0)
        row = tl.load(
            values + (entry // EACH).to(tl.int64)[:, None] * C + channel[None, :],
            mask=(at < end)[:, None] & (channel < C)[None, :],
            other=0.0,
        )
        total += share[:, None] * row.to(tl.float32)
    tl.store(out + pixel.to(tl.int64) * C + channel, tl.sum(total, 0), mask=channel < C)
