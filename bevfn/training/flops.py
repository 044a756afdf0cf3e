"""FLOPs of matrix products and convolutions, ours too: what a detector's arithmetic is counted by."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from bevfn.kernels import deform_conv, sparse_conv  # noqa: F401  they define the operators that are counted


def count(run: Callable[[], object]) -> int:
    """FLOPs of what an eager `run` computes: of sparse convolutions the real neighbour pairs only, of deformable ones the
    product. A compiled one hides its operators."""
    _register_formulas()
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@functools.cache
def _register_formulas() -> None:
    """FLOPs of our operators; registered once per process."""

    def forward(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, *_: Any, **__: Any) -> int:
        return 2 * int((table >= 0).sum()) * weight.shape[1] * weight.shape[2]

    def weight_gradient(x: torch.Tensor, grad: torch.Tensor, table: torch.Tensor, *_: Any, **__: Any) -> int:
        return 2 * int((table >= 0).sum()) * x.shape[1] * grad.shape[1]

    register_flop_formula(torch.ops.bevfn.sparse_conv, get_raw=True)(forward)
    register_flop_formula(torch.ops.bevfn.sparse_conv_weight_grad, get_raw=True)(weight_gradient)

    def deformable(x: torch.Tensor, offset: torch.Tensor, mask: Any, weight: torch.Tensor, *_: Any, **__: Any) -> int:
        return 2 * weight.numel() * x.shape[0] * offset.shape[2] * offset.shape[3]  # the product, not the sampling

    def deformable_backward(grad: torch.Tensor, *operands: Any, **__: Any) -> int:
        return 2 * deformable(*operands)

    register_flop_formula(torch.ops.bevfn.deform_conv, get_raw=True)(deformable)
    register_flop_formula(torch.ops.bevfn.deform_conv_backward, get_raw=True)(deformable_backward)
