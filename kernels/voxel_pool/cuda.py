"""`voxel_pool` for CUDA in Triton: points sorted by cell, a program for each cell adds up its own.

The gradient needs no order: a program for each few pixels reads the gradient's rows along the depth bins, which give the
bins' gradients and add up to the context's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bevfn.kernels import cuda

POINTS = 16  # that a program adds at a time: the median cell of BEVFusion's grid has 15


def forward(depth: Tensor, context: Tensor, cell: Tensor, num_cells: int) -> Tensor:
    """depth [M D H W], context [M H W C], cell [M D H W] int32 -> [num_cells C], dtype of depth."""
    (_, D, H, W), C = depth.shape, context.shape[3]
    cuda.check_rows("voxel_pool", "points", cell.numel())
    order, starts = cuda.intervals(cell.reshape(-1), num_cells)
    out = context.new_empty(num_cells, C)
    if out.numel():
        _pool[(num_cells,)](
            depth.contiguous(),
            context.contiguous(),
            order,
            starts,
            out,
            D * H * W,
            H * W,
            C=C,
            WIDE=triton.next_power_of_2(C),
            POINTS=POINTS,
        )
    return out


def backward(grad: Tensor, depth: Tensor, context: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """grad [num_cells C] -> gradients of depth [M D H W] and context [M H W C]."""
    (M, D, H, W), C = depth.shape, context.shape[3]
    cuda.check_rows("voxel_pool", "points", cell.numel())
    grad_depth = torch.empty(depth.shape, dtype=depth.dtype, device=depth.device)
    grad_context = torch.empty(context.shape, dtype=context.dtype, device=depth.device)
    pixels = M * H * W
    if pixels:
        _pool_backward[(triton.cdiv(pixels, POINTS),)](
            grad.contiguous(),
            depth.contiguous(),
            context.contiguous(),
            cell.contiguous(),
            grad_depth,
            grad_context,
            D,
            H * W,
            pixels,
            grad.shape[0],
            C=C,
            WIDE=triton.next_power_of_2(max(C, 1)),
            POINTS=POINTS,
        )
    return grad_depth, grad_context


@triton.jit
def _pool(depth, context, order, starts, out, IMAGE, PIXELS, C: tl.constexpr, WIDE: tl.constexpr, POINTS: tl.constexpr):
    """One cell: its interval of the sorted points, POINTS at a time."""
    cell = tl.program_id(0)
    end = tl.load(starts + cell + 1)
    channel = tl.arange(0, WIDE)
    total = tl.zeros((POINTS, WIDE), tl.float32)
    for first in range(tl.load(starts + cell), end, POINTS):
        at = first + tl.arange(0, POINTS)
        point = tl.load(order + at, mask=at < end, other=0)
        weight = tl.load(depth + point, mask=at < end, other=0.0).to(tl.float32)
        pixel = (point // IMAGE).to(tl.int64) * PIXELS + point % PIXELS
        row = tl.load(
            context + pixel[:, None] * C + channel[None, :],
            mask=(at < end)[:, None] & (channel < C)[None, :],
            other=0.0,
        )
        total += weight[:, None] * row.to(tl.float32)
    place = cell.to(tl.int64) * C + channel
    tl.store(out + place, tl.sum(total, 0).to(out.dtype.element_ty), mask=channel < C)


@triton.jit
def _pool_backward(
    grad,
    depth,
    context,
    cell,
    grad_depth,
    grad_context,
    D,
    PIXELS,
    ALL_PIXELS,
    CELLS,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    POINTS: tl.constexpr,
):
    """POINTS pixels, along their depth bins."""
    pixel = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    live = pixel < ALL_PIXELS
    channel = tl.arange(0, WIDE)
    place = pixel.to(tl.int64)[:, None] * C + channel[None, :]
    stored = live[:, None] & (channel < C)[None, :]
    row = tl.load(context + place, mask=stored, other=0.0).to(tl.float32)
    total = tl.zeros((POINTS, WIDE), tl.float32)
    for bin in range(D):
        point = (pixel // PIXELS * D + bin) * PIXELS + pixel % PIXELS
        to = tl.load(cell + point, mask=live, other=-1)
        inside = (to >= 0) & (to < CELLS)
        slope = tl.load(
            grad + to.to(tl.int64)[:, None] * C + channel[None, :],
            mask=inside[:, None] & (channel < C)[None, :],
            other=0.0,
        ).to(tl.float32)
        weight = tl.load(depth + point, mask=live, other=0.0).to(tl.float32)
        total += weight[:, None] * slope
        tl.store(grad_depth + point, tl.sum(slope * row, 1).to(grad_depth.dtype.element_ty), mask=live)
    tl.store(grad_context + place, total.to(grad_context.dtype.element_ty), mask=stored)
