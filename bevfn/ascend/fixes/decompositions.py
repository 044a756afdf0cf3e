"""Operators that become others while a step is traced: torch's own decompositions, and a few of ours."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import get_decompositions

aten = torch.ops.aten

# Without a converter, or with a wrong one (batch norm); torch takes them apart into operators that convert.
TORCH = (
    *(aten._native_batch_norm_legit_functional, aten._native_batch_norm_legit),
    *(aten.native_batch_norm, aten.native_batch_norm_backward),
    *(aten._unsafe_index_put, aten.index_copy, aten.pixel_shuffle, aten.pixel_unshuffle),
    *(aten.softplus, aten.softplus_backward),
    *(aten.binary_cross_entropy, aten.binary_cross_entropy_backward),
    *(aten.smooth_l1_loss, aten.smooth_l1_loss_backward, aten.huber_loss, aten.huber_loss_backward),
    *(aten.nll_loss2d_forward, aten.nll_loss2d_backward),
    *(aten.affine_grid_generator, aten.im2col, aten.col2im),
)


def table() -> dict[Any, Callable]:
    """{overload: function} for `make_fx`. A function that returns NotImplemented leaves its operator as it is."""
    return {
        **get_decompositions(list(TORCH)),
        aten.select_backward.default: _select_backward,
        aten.avg_pool2d.default: _avg_pool2d,
        aten.avg_pool2d_backward.default: _avg_pool2d_backward,
        aten.baddbmm.default: _baddbmm,
        aten.linspace.default: _linspace,
        aten.index_put.default: _index_put,
        aten.where.self: _where,
        aten.rsub.Scalar: _rsub,
        aten.mul.Tensor: _mul,
        aten.var.correction: _var,
        aten.var_mean.correction: _var_mean,
        aten.min.dim: _min,
        aten.squeeze.dims: _squeeze,
        aten.isnan.default: lambda x: x != x,
        aten.sub.Scalar: lambda x, y, alpha=1: x - alpha * y,
        aten.clamp_min.Tensor: torch.maximum,
        aten.clamp_max.Tensor: torch.minimum,
    }


def _select_backward(grad: Tensor, input_sizes: Sequence[int], dim: int, index: int) -> Tensor:
    """Torchair scatters into memory that nobody has cleared."""
    dim %= len(input_sizes)
    index %= input_sizes[dim]
    behind = [0, 0] * (len(input_sizes) - 1 - dim)  # constant_pad_nd starts at the last axis
    return F.pad(grad.unsqueeze(dim), [*behind, index, input_sizes[dim] - 1 - index])


def _avg_pool2d(x: Tensor, kernel: Sequence[int], *window: Any) -> Tensor:
    """A convolution of every channel with equal weights: an A2 averages float16 only, and not at all for a gradient, and
    torchair never counts the padding in float16."""
    if (convolved := _averaging(x, kernel, *window)) is None:
        return NotImplemented
    weight, how = convolved
    return aten.convolution.default(x.float(), weight, None, *how).to(x.dtype)


def _avg_pool2d_backward(grad: Tensor, x: Tensor, kernel: Sequence[int], *window: Any) -> Tensor:
    if (convolved := _averaging(x, kernel, *window)) is None:
        return NotImplemented
    weight, how = convolved
    given = aten.convolution_backward.default(grad.float(), x.float(), weight, None, *how, [True, False, False])
    return given[0].to(x.dtype)


def _averaging(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> tuple[Tensor, tuple] | None:
    """(weights, the other operands of a convolution) of an average that divides by the same number everywhere."""
    padded = any(padding)
    if x.dtype == torch.float64 or ceil_mode or divisor or x.dim() != 4 or (padded and not count_include_pad):
        return None
    (height, width), C = (kernel if len(kernel) == 2 else [*kernel] * 2), x.shape[1]
    weight = torch.full((C, 1, height, width), 1 / (height * width), device=x.device)
    both = [list(pair) * (2 // len(pair)) for pair in (stride or kernel, padding)]
    return weight, (both[0], both[1], [1, 1], False, [0, 0], C)


def _baddbmm(x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Torchair multiplies floats by integer constants."""
    product = torch.bmm(a, b)
    product = product if alpha == 1 else product * float(alpha)
    if beta == 0:  # torch: what x holds, NaN too, does not matter then
        return product
    return product + (x if beta == 1 else x * float(beta))


def _linspace(start: float, end: float, steps: int, **options: object) -> Tensor:
    """Torchair gives LinSpace integer ends, whose prototype is for floats."""
    if isinstance(start, float) and isinstance(end, float):
        return NotImplemented
    return aten.linspace.default(float(start), float(end), steps, **options)


def _index_put(
    x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False, unsafe: bool = False
) -> Tensor:
    """By one linear index over the indexed axes: index_add, or scatter where nothing is accumulated."""
    used = {d: index for d, index in enumerate(indices) if index is not None}
    axes = list(used)
    if any(index.dtype in (torch.bool, torch.uint8) for index in used.values()):
        return NotImplemented
    rest = [d for d in range(x.dim()) if d not in axes]
    shape = [x.shape[d] for d in axes]
    linear = _linear_index(list(used.values()), shape)
    # The index's axes stand where the indexed axes stood if those are side by side, in front otherwise.
    side_by_side = axes == list(range(axes[0], axes[-1] + 1))
    before = [x.shape[d] for d in rest if side_by_side and d < axes[0]]
    after = [x.shape[d] for d in rest if not side_by_side or d > axes[0]]
    values = values.to(x.dtype).expand([*before, *linear.shape, *after])
    values = values.movedim(tuple(range(len(before), len(before) + linear.dim())), tuple(range(linear.dim())))
    values, linear = values.reshape(linear.numel(), -1), linear.reshape(-1)
    rows = x.permute(*axes, *rest).reshape(math.prod(shape), -1)
    if accumulate:
        rows = rows.index_add(0, linear, values)
    else:
        rows = rows.scatter(0, linear[:, None].expand(values.shape), values)
    inverse = sorted(range(x.dim()), key=[*axes, *rest].__getitem__)
    return rows.reshape([*shape, *(x.shape[d] for d in rest)]).permute(inverse)


def _linear_index(indices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    linear = torch.zeros((), dtype=torch.int64, device=indices[0].device)
    for index, size in zip(torch.broadcast_tensors(*indices), shape):
        linear = linear * size + torch.where(index < 0, index + size, index)
    return linear


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Of integers by arithmetic: A2's SelectV2 takes them through float32, which is exact to 2^24, where cell numbers reach
    340 M. Either product is 0, so nothing overflows; the AI Core adds and multiplies integers as they are."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    if dtype not in (torch.int32, torch.int64):
        return NotImplemented
    condition = condition.bool()  # of bytes, ~ would be the complement of 8 bits
    chosen = condition.to(dtype)
    return a.to(dtype) * chosen + b.to(dtype) * (~condition).to(dtype)


def _rsub(x: Tensor, other: complex, alpha: complex = 1) -> Tensor:
    """Torchair makes Sxpy of it, which no unit of an A2 computes."""
    minuend = torch.full((), other, dtype=torch.result_type(x, other), device=x.device)
    return minuend - (x if alpha == 1 else alpha * x)


def _mul(x: Tensor, y: Tensor | complex) -> Tensor:
    """Of two bools, as isfinite is made of: torchair multiplies bytes, and A2 casts bytes to bool on its AI CPU."""
    if isinstance(y, Tensor) and x.dtype == y.dtype == torch.bool:
        return torch.logical_and(x, y)
    return NotImplemented


def _var(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    axes = [d % x.dim() for d in dim] if dim else list(range(x.dim()))
    count = math.prod(x.shape[d] for d in axes)
    centred = x - x.mean(axes, keepdim=True)
    return (centred * centred).sum(axes, keepdim=keepdim) / max(count - (1 if correction is None else correction), 0)


def _var_mean(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    axes = list(dim) if dim else list(range(x.dim()))
    return _var(x, axes, correction=correction, keepdim=keepdim), x.mean(axes, keepdim=keepdim)


def _min(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    value, index = torch.max(-x, dim, keepdim)
    return -value, index


def _squeeze(x: Tensor, dims: Sequence[int]) -> Tensor:
    gone = {d % x.dim() for d in dims if x.shape[d] == 1}
    return x.reshape([size for d, size in enumerate(x.shape) if d not in gone])
