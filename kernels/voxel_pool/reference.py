"""What `voxel_pool` means, in plain torch on any device: outer product and index_add, a few depth bins at a time."""

import torch
from torch import Tensor

# Products of one slab of depth bins: 2^24 float32 = 64 MiB, whatever the size of the problem (at least one bin).
SLAB = 1 << 24


def forward(depth: Tensor, context: Tensor, cell: Tensor, num_cells: int) -> Tensor:
    """depth [M D H W], context [M H W C], cell [M D H W] int32 -> [num_cells C], dtype of depth."""
    C = context.shape[-1]
    sums = _wide(context).new_zeros(num_cells + 1, C)  # the last row takes the points outside
    for bins in _slabs(depth, C):
        product = _wide(depth[:, bins])[..., None] * _wide(context)[:, None]  # M d H W C
        sums = sums.index_add(0, _rows(cell[:, bins], num_cells), product.reshape(-1, C))
    return sums[:num_cells].to(depth.dtype)


def backward(grad: Tensor, depth: Tensor, context: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """grad [num_cells C] -> gradients of depth [M D H W] and context [M H W C]."""
    num_cells, C = grad.shape
    padded = torch.cat([_wide(grad), _wide(grad).new_zeros(1, C)])
    grad_depth = torch.empty_like(depth, memory_format=torch.contiguous_format)
    grad_context = torch.zeros_like(_wide(context), memory_format=torch.contiguous_format)
    for bins in _slabs(depth, C):
        rows = padded.index_select(0, _rows(cell[:, bins], num_cells)).view(*cell[:, bins].shape, C)  # M d H W C
        grad_depth[:, bins] = (rows * _wide(context)[:, None]).sum(-1).to(depth.dtype)
        grad_context += (rows * _wide(depth[:, bins])[..., None]).sum(1)
    return grad_depth, grad_context.to(context.dtype)


def _wide(x: Tensor) -> Tensor:
    """The dtype that sums are kept in."""
    return x if x.dtype == torch.float64 else x.float()


def _rows(cell: Tensor, num_cells: int) -> Tensor:
    """Flat int64 rows; points outside go to the extra row num_cells."""
    outside = (cell < 0) | (cell >= num_cells)
    return torch.where(outside, num_cells, cell).reshape(-1).long()


def _slabs(depth: Tensor, channels: int) -> list[slice]:
    M, D, H, W = depth.shape
    step = max(1, SLAB // max(1, M * H * W * channels))
    return [slice(start, start + step) for start in range(0, D, step)]
