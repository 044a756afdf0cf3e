"""What deformable convolution and attention share on CUDA: bilinear samples, and sums of gradients by the pixel they reach.

Many samples reach one pixel. Instead of atomic additions, whose order would be another in every run, the corners of all
samples are sorted by pixel and a program for each pixel adds up its own. Imported by the lowerings only: it needs Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bevfn.kernels import cuda, gathered


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
    each = pixels.numel() // max(1, len(values))
    order, starts = cuda.intervals(pixels, count)
    return gathered.sums(order, starts, shares, values, image=max(1, each), pixels=1, dtype=torch.float32)


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
