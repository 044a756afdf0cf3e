"""CPU lowering of `voxel_pool`: cpu.cpp in float32; float64 (gradient checks) goes to the reference."""

import torch
from torch import Tensor

from bevfn.kernels import native
from bevfn.kernels.voxel_pool import reference


def forward(depth: Tensor, context: Tensor, cell: Tensor, num_cells: int) -> Tensor:
    """depth [M D H W], context [M H W C], cell [M D H W] int32 -> [num_cells C], dtype of depth."""
    if depth.dtype == torch.float64:
        return reference.forward(depth, context, cell, num_cells)
    out = torch.empty(num_cells, context.shape[-1], dtype=torch.float32, device="cpu")
    forward_into(out, depth, context, cell)
    return out.to(depth.dtype)


def forward_into(out: Tensor, depth: Tensor, context: Tensor, cell: Tensor) -> None:
    """Overwrites out [num_cells C] float32: what `forward` does apart from allocating the result."""
    operands = [_plain(depth), _plain(context), cell.contiguous(), out]
    native.call("voxel_pool", "voxel_pool_forward", *operands, *depth.shape, *out.shape[::-1])


def backward(grad: Tensor, depth: Tensor, context: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """grad [num_cells C] -> gradients of depth [M D H W] and context [M H W C]."""
    if depth.dtype == torch.float64:
        return reference.backward(grad, depth, context, cell)
    grad_depth = torch.empty(depth.shape, dtype=torch.float32, device="cpu")
    grad_context = torch.empty(context.shape, dtype=torch.float32, device="cpu")
    operands = [_plain(grad), _plain(depth), _plain(context), cell.contiguous(), grad_depth, grad_context]
    native.call("voxel_pool", "voxel_pool_backward", *operands, *depth.shape, *grad.shape[::-1])
    return grad_depth.to(depth.dtype), grad_context.to(context.dtype)


def _plain(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()
