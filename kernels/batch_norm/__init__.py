"""Batch norm of images, or of the rows that a mask counts, by their statistics, and a ReLU behind it where one is asked for.

It is an operator in the graph for Ascend, which has its own for it, and on a CPU, where a kernel of ours makes in one call what
would be a fifth of all that inductor writes and compiles of a train step. On a GPU a compiler gets the closed form
(`layers.batch_norm`).
"""

from typing import Any

import torch
from torch import Tensor

from bevfn.kernels.batch_norm import cpu, reference
from bevfn.kernels.derivatives import differentiable

_library = torch.library.Library("bevfn", "FRAGMENT")
_TAGS = (torch.Tag.flexible_layout,)  # the kernel takes images that lie channels last: no copy
_library.define(
    "batch_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? mask, Tensor? rows, bool relu)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor var, float eps, Tensor? mask, Tensor? rows,"
    " Tensor? relu_bias) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, and mean and biased variance [C], float32, which have no derivative.

    Args:
        x: [B C H W], or [R C] of rows of which some count; weight and bias: [C] float32.
        mask: [R 1] float32, 1 where a row counts, else 0, as its y is; None for images. rows: [], their number, 1 at least.
    """
    return _batch_norm(x, weight, bias, eps, mask, rows, relu)


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
    relu: bool,
    mean: Tensor,
    var: Tensor,
) -> tuple[Tensor | None, ...]:
    relu_bias = bias if relu else None
    gradients = torch.ops.bevfn.batch_norm_backward(grad, x, weight, mean, var, eps, mask, rows, relu_bias)
    return *gradients, None, None, None, None, None, None


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mask: Tensor | None,
    rows: Tensor | None,
    relu: bool,
    *_: Tensor,
) -> Tensor:
    return reference.forward(x, weight, bias, eps, mask, rows, relu)[0]


_batch_norm = differentiable(_operator, _gradients, _plain)


@torch.library.register_fake("bevfn::batch_norm", lib=_library)
def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_of_channels(x)


@torch.library.register_fake("bevfn::batch_norm_backward", lib=_library)
def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_of_channels(x)


def _of_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float32, whatever x and the weight are."""
    one, two = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return one, two


_library.impl("batch_norm", reference.forward, "CompositeExplicitAutograd")
_library.impl("batch_norm_backward", reference.backward, "CompositeExplicitAutograd")
_library.impl("batch_norm", cpu.forward, "CPU")
_library.impl("batch_norm_backward", cpu.backward, "CPU")
