"""Batch norm of images, or of the rows that a mask counts, by their statistics: an operator in the graph for Ascend, which has its
own for it.

On a CPU or GPU it is the closed form, which a compiler gets as it is (`layers.batch_norm`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bevfn.kernels.derivatives import differentiable

_library = torch.library.Library("bevfn", "FRAGMENT")
_library.define(
    "batch_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? mask, Tensor? rows) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor var, float eps, Tensor? mask, Tensor? rows)"
    " -> (Tensor, Tensor, Tensor)"
)


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mask: Tensor | None = None, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, and mean and biased variance [C], float32, which have no derivative.

    Args:
        x: [B C H W], or [R C] of rows of which some count; weight and bias: [C] float32.
        mask: [R 1] float32, 1 where a row counts, else 0, as its y is; None for images. rows: [], their number, 1 at least.
    """
    return _batch_norm(x, weight, bias, eps, mask, rows)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mask: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The closed form, the variance in two passes: no cancellation."""
    wide, count = x.float(), _count(x, rows)
    mean = total(_masked(wide, mask), _axes(x)) / count
    centred = _masked(wide - _per_channel(mean, x), mask)
    var = total(centred * centred, _axes(x)) / count
    y = centred * _per_channel(weight * torch.rsqrt(var + eps), x) + _per_channel(bias, x)
    return _masked(y, mask).to(x.dtype), mean, var


def total(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Sum of images [... H W] or rows [R C] over `axes`, ascending, in two steps: inductor adds one number to the next, which rounds
    a mean of 10^5 equal numbers by 5e-5 (docs/benchmarks.md); in two it is at 1e-7, as torch's own sum, a tree, in one.

    One step all the same where R has no factor in common with 64, for groups of rows [G R C], and in effect for images of W = 1."""
    if axes[-1] == x.dim() - 1:
        return x.sum(-1).sum(list(axes[:-1]))
    some = math.gcd(len(x), 64)
    if x.dim() > 2 or some == 1:
        return x.sum(list(axes))
    return x.reshape(-1, some, x.shape[1]).sum(1).sum(0)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    mask: Tensor | None,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias: with h = (x - mean) rstd, dx = weight rstd (dy - mean(dy) - h mean(dy h))."""
    dy, count = _masked(grad.float(), mask), _count(x, rows)
    rstd = torch.rsqrt(var + eps)
    h = (x.float() - _per_channel(mean, x)) * _per_channel(rstd, x)
    of_bias, of_weight = dy.sum(_axes(x)), (dy * h).sum(_axes(x))
    dx = dy - _per_channel(of_bias / count, x) - h * _per_channel(of_weight / count, x)
    return _masked(dx * _per_channel(weight * rstd, x), mask).to(x.dtype), of_weight, of_bias


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _count(x: Tensor, rows: Tensor | None) -> Tensor | int:
    return x.numel() // x.shape[1] if rows is None else rows


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _per_channel(c: Tensor, x: Tensor) -> Tensor:
    return c if x.dim() == 2 else c[:, None, None]


def _operator(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.bevfn.batch_norm(*operands)


def _gradients(
    wanted: frozenset[int],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mask: Tensor | None,
    rows: Tensor | None,
    mean: Tensor,
    var: Tensor,
) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.bevfn.batch_norm_backward(grad, x, weight, mean, var, eps, mask, rows)
    return *gradients, None, None, None, None, None


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mask: Tensor | None, rows: Tensor | None, *_: Tensor
) -> Tensor:
    return forward(x, weight, bias, eps, mask, rows)[0]


_batch_norm = differentiable(_operator, _gradients, _plain)


@torch.library.register_fake("bevfn::batch_norm", lib=_library)
def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(x.shape[1]), weight.new_empty(x.shape[1])


@torch.library.register_fake("bevfn::batch_norm_backward", lib=_library)
def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float, *_: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


_library.impl("batch_norm", forward, "CompositeExplicitAutograd")
_library.impl("batch_norm_backward", backward, "CompositeExplicitAutograd")
