"""`voxel_pool` for CUDA in Triton: points sorted by cell, a program for each cell adds up its own.

The gradient needs no order: a program for each few pixels reads the gradient's rows along the depth bins, which give the
bins' gradients and add up to the context's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bevfn.kernels import cuda, gathered, indices

PIXELS = 16  # of a program


def forward(depth: Tensor, context: Tensor, cell: Tensor, num_cells: int) -> Tensor:
    """depth [M D H W], context [M H W C], cell [M D H W] int32 -> [num_cells C], dtype of depth."""
    (_, D, H, W), C = depth.shape, context.shape[3]
    indices.check("voxel_pool", "points", cell.numel())
    order, starts = cuda.intervals(cell.reshape(-1), num_cells)
    rows = context.reshape(-1, C)
    return gathered.sums(order, starts, depth.reshape(-1), rows, image=D * H * W, pixels=H * W, dtype=depth.dtype)


def backward(grad: Tensor, depth: Tensor, context: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """grad [num_cells C] -> gradients of depth [M D H W] and context [M H W C]."""
    (M, D, H, W), C = depth.shape, context.shape[3]
    indices.check("voxel_pool", "points", cell.numel())
    grad_depth = torch.empty(depth.shape, dtype=depth.dtype, device=depth.device)
    grad_context = torch.empty(context.shape, dtype=context.dtype, device=depth.device)
    pixels = M * H * W
    if pixels:
        _pool_backward[(triton.cdiv(pixels, PIXELS),)](
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
            ROWS=PIXELS,
        )
    return grad_depth, grad_context


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
    ROWS: tl.constexpr,
):
    """ROWS pixels, along their depth bins."""
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = pixel < ALL_PIXELS
    channel = tl.arange(0, WIDE)
    row = gathered.rows(context, pixel, C, live, channel, C).to(tl.float32)
    total = tl.zeros((ROWS, WIDE), tl.float32)
    for bin in range(D):
        point = (pixel // PIXELS * D + bin) * PIXELS + pixel % PIXELS
        to = tl.load(cell + point, mask=live, other=-1)
        inside = (to >= 0) & (to < CELLS)
        slope = gathered.rows(grad, to, C, inside, channel, C).to(tl.float32)
        weight = tl.load(depth + point, mask=live, other=0.0).to(tl.float32)
        total += weight[:, None] * slope
        tl.store(grad_depth + point, tl.sum(slope * row, 1).to(grad_depth.dtype.element_ty), mask=live)
    place = grad_context + pixel.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(place, total.to(grad_context.dtype.element_ty), mask=live[:, None] & (channel < C)[None, :])
