"""Batch norm and its gradient in torch: the closed form."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mask: Tensor | None, rows: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The closed form, the variance in two passes: no cancellation."""
    wide, count = x.float(), _count(x, rows)
    mean = total(_masked(wide, mask), _axes(x)) / count
    centred = _masked(wide - _per_channel(mean, x), mask)
    var = total(centred * centred, _axes(x)) / count
    y = _masked(_scaled(centred, weight, bias, var, eps), mask).to(x.dtype)
    return y.relu() if relu else y, mean, var


def _scaled(centred: Tensor, weight: Tensor, bias: Tensor, var: Tensor, eps: float) -> Tensor:
    return centred * _per_channel(weight * torch.rsqrt(var + eps), centred) + _per_channel(bias, centred)


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
    relu_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias: with h = (x - mean) rstd, dx = weight rstd (dy - mean(dy) - h mean(dy h)).

    relu_bias: the bias, where a ReLU follows, which is known by it; else None."""
    centred, count = x.float() - _per_channel(mean, x), _count(x, rows)
    if relu_bias is not None:
        grad = torch.where(_scaled(centred, weight, relu_bias, var, eps) <= 0, 0.0, grad)
    dy = _masked(grad.float(), mask)
    rstd = torch.rsqrt(var + eps)
    h = centred * _per_channel(rstd, x)
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
