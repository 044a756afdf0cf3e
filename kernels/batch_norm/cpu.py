"""CPU lowering of `batch_norm`: cpu.cpp in float32; float64 (gradient checks) takes the closed form."""

import ctypes

import torch
from torch import Tensor

from bevfn.kernels import native
from bevfn.kernels.batch_norm import reference


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mask: Tensor | None, rows: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `reference.forward`; half precision is rounded once, at the end."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.forward(x, weight, bias, eps, mask, rows, relu)
    memory, channels = _memory(x, x), [t.contiguous() for t in (weight, bias)]
    y, mean, var = torch.empty_like(memory), torch.empty_like(channels[0]), torch.empty_like(channels[0])
    operands = memory, *channels, mask, ctypes.c_double(eps), _sizes(x, relu)
    native.call("batch_norm", "batch_norm_forward", *operands, y, mean, var)
    return _like(x, y), mean, var


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    mask: Tensor | None,
    rows: Tensor | None,
    relu_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `reference.backward`."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.backward(grad, x, weight, mean, var, eps, mask, rows, relu_bias)
    memory, channels = _memory(x, x), [t.contiguous() for t in (weight, mean, var)]
    of_x, of_weight, of_bias = torch.empty_like(memory), torch.empty_like(channels[0]), torch.empty_like(channels[0])
    bias = None if relu_bias is None else relu_bias.contiguous()
    operands = _memory(grad, x), memory, *channels, bias, mask, ctypes.c_double(eps), _sizes(x, bias is not None)
    native.call("batch_norm", "batch_norm_backward", *operands, of_x, of_weight, of_bias)
    return _like(x, of_x), of_weight, of_bias


def _as_rows(x: Tensor) -> bool:
    """Rows, or images that lie channels last."""
    return x.dim() == 2 or (not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last))


def _memory(t: Tensor, x: Tensor) -> Tensor:
    """t, shaped like x, contiguous in float32, [B H W C] of images that lie channels last."""
    return (t.permute(0, 2, 3, 1) if x.dim() == 4 and _as_rows(x) else t).float().contiguous()


def _like(x: Tensor, memory: Tensor) -> Tensor:
    """What lies as `_memory` says, in x's dtype and layout."""
    made = memory.permute(0, 3, 1, 2) if x.dim() == 4 and _as_rows(x) else memory
    return made.to(x.dtype) if made.stride() == x.stride() else torch.empty_like(x).copy_(made)


def _sizes(x: Tensor, relu: bool) -> tuple[int, ...]:
    B, C = x.shape[:2]
    return B, C, x[0, 0].numel(), int(_as_rows(x)), int(relu)
