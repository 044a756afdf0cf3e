"""CPU lowering of `batch_norm`: cpu.cpp; of float64 x (gradient checks) and of none the closed form, in float32 too."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from bevfn.kernels import native
from bevfn.kernels.batch_norm import reference


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mask: Tensor | None, rows: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `reference.forward`; half precision is rounded once, at the end. The kernel counts the rows itself."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference.forward(x, weight, bias, eps, mask, rows, relu)
    memory = _memory(x, x)
    y, mean, var = torch.empty_like(memory), torch.empty(x.shape[1]), torch.empty(x.shape[1])
    _run("forward", [memory, *_floats(weight, bias, mask)], x, eps, relu, [y, mean, var])
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
    memory = _memory(x, x)
    of_x, of_weight, of_bias = torch.empty_like(memory), torch.empty(x.shape[1]), torch.empty(x.shape[1])
    operands = [_memory(grad, x), memory, *_floats(weight, mean, var, relu_bias, mask)]
    _run("backward", operands, x, eps, relu_bias is not None, [of_x, of_weight, of_bias])
    return _like(x, of_x), of_weight, of_bias


def _run(
    name: str, operands: Sequence[Tensor | None], x: Tensor, eps: float, relu: bool, made: Sequence[Tensor]
) -> None:
    assert x.dim() == 2 or operands[-1] is None, "a mask is of rows"
    sizes = (*x.shape[:2], x.shape[2:].numel(), int(_as_rows(x)), int(relu))
    native.call("batch_norm", f"batch_norm_{name}", *operands, (ctypes.c_float * 1)(eps), sizes, *made)


def _floats(*some: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.float().contiguous() for t in some]


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
