"""Batch norm of images by the statistics of all of them: an operator in the graph for Ascend, which has its own for it.

On a CPU or GPU it is the closed form, which a compiler gets as it is (`layers.batch_norm`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bevfn.kernels.derivatives import differentiable

_library = torch.library.Library("bevfn", "FRAGMENT")
_library.define("batch_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)")
_library.define(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor var, float eps)"
    " -> (Tensor, Tensor, Tensor)"
)
_AXES = (0, 2, 3)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [B C H W], weight and bias [C] to y like x, and mean and biased variance [C], float32, which have no derivative."""
    return _batch_norm(x, weight, bias, eps)


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The closed form, the variance in two passes: no cancellation."""
    wide, count = x.float(), x.numel() // x.shape[1]
    mean = total(wide, _AXES) / count
    centred = wide - _images(mean)
    var = total(centred * centred, _AXES) / count
    y = centred * _images(weight * torch.rsqrt(var + eps)) + _images(bias)
    return y.to(x.dtype), mean, var


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
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias: with h = (x - mean) rstd, dx = weight rstd (dy - mean(dy) - h mean(dy h))."""
    dy, count = grad.float(), x.numel() // x.shape[1]
    rstd = torch.rsqrt(var + eps)
    h = (x.float() - _images(mean)) * _images(rstd)
    of_bias, of_weight = dy.sum(_AXES), (dy * h).sum(_AXES)
    dx = (dy - _images(of_bias / count) - h * _images(of_weight / count)) * _images(weight * rstd)
    return dx.to(x.dtype), of_weight, of_bias


def _images(c: Tensor) -> Tensor:
    return c[:, None, None]


def _operator(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.bevfn.batch_norm(*operands)


def _gradients(
    wanted: frozenset[int], grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, mean: Tensor, var: Tensor
) -> tuple[Tensor | None, ...]:
    return *torch.ops.bevfn.batch_norm_backward(grad, x, weight, mean, var, eps), None, None, None


def _plain(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *_: Tensor) -> Tensor:
    return forward(x, weight, bias, eps)[0]


_batch_norm = differentiable(_operator, _gradients, _plain)


@torch.library.register_fake("bevfn::batch_norm", lib=_library)
def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(x.shape[1]), weight.new_empty(x.shape[1])


@torch.library.register_fake("bevfn::batch_norm_backward", lib=_library)
def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


_library.impl("batch_norm", forward, "CompositeExplicitAutograd")
_library.impl("batch_norm_backward", backward, "CompositeExplicitAutograd")
