"""Sparse convolution over a neighbour table: gather, multiply, sum; differentiable in features and weight."""

from types import ModuleType

import torch
from torch import Tensor

from bevfn.kernels.cuda import lowering
from bevfn.kernels.derivatives import differentiable
from bevfn.kernels.sparse_conv import cpu, reference

_library = torch.library.Library("bevfn", "FRAGMENT")
_library.define("sparse_conv(Tensor x, Tensor weight, Tensor table) -> Tensor")
_library.define("sparse_conv_weight_grad(Tensor x, Tensor grad, Tensor table) -> Tensor")


def sparse_conv(x: Tensor, weight: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    """y[w] = sum over k of x[table[k, w]] @ weight[k], leaving out entries of -1.

    Sums run in float32 for half-precision inputs. Any derivative in x and weight (`kernels.derivatives`).

    Args:
        x: [V C_in] features, float16, bfloat16, float32 or float64.
        weight: [K C_in C_out], dtype of x.
        table: [K W] int32, input row of output row w under offset k, or -1 (see `bevfn.kernels.neighbours`).
        inverse: [K V] int32, output row that input row v feeds under offset k, or -1; the same pairs as `table`,
            read only by the gradient. For a submanifold convolution with odd kernel `table.flip(0)`.

    Returns:
        [W C_out], dtype of x.

    Raises:
        ValueError: shapes or dtypes do not fit together.
        RuntimeError: a table entry is not a row (CPU).
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"sparse_conv: x [V, C_in] and weight [K, C_in, C_out] must agree in C_in and dtype, "
            f"got {x.dtype} {list(x.shape)} and {weight.dtype} {list(weight.shape)}."
        )
    K = weight.shape[0]
    for name, index in (("table", table), ("inverse", inverse)):
        if index.ndim != 2 or index.shape[0] != K or index.dtype != torch.int32:
            raise ValueError(
                f"sparse_conv: {name} must be int32 [{K}, rows] for {K} kernel offsets, "
                f"got {index.dtype} {list(index.shape)}."
            )
    if inverse.shape[1] != x.shape[0]:
        raise ValueError(
            f"sparse_conv: inverse has {inverse.shape[1]} columns for {x.shape[0]} input rows; "
            "were table and inverse swapped?"
        )
    return _sparse_conv(x, weight, table, inverse)


def _operator(x: Tensor, weight: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    return torch.ops.bevfn.sparse_conv(x, weight, table)


def _plain(x: Tensor, weight: Tensor, table: Tensor, inverse: Tensor) -> Tensor:
    return reference.sparse_conv(x, weight, table)


def _gradients(
    wanted: frozenset[int], grad: Tensor, x: Tensor, weight: Tensor, table: Tensor, inverse: Tensor
) -> tuple[Tensor | None, ...]:
    grad_x = grad_weight = None
    if 0 in wanted:  # an input feeds along `inverse` what its outputs read along `table`
        grad_x = torch.ops.bevfn.sparse_conv(grad, weight.transpose(1, 2), inverse)
    if 1 in wanted:
        grad_weight = torch.ops.bevfn.sparse_conv_weight_grad(x, grad, table)
    return grad_x, grad_weight, None, None


_sparse_conv = differentiable(_operator, _gradients, _plain)


@torch.library.register_fake("bevfn::sparse_conv", lib=_library)
def _forward_fake(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    return x.new_empty(table.shape[1], weight.shape[2])


@torch.library.register_fake("bevfn::sparse_conv_weight_grad", lib=_library)
def _weight_grad_fake(x: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    return x.new_empty(table.shape[0], x.shape[1], grad.shape[1])


def _cuda() -> ModuleType:
    from bevfn.kernels.sparse_conv import cuda  # needs Triton

    return cuda


_library.impl("sparse_conv", reference.sparse_conv, "CompositeExplicitAutograd")
_library.impl("sparse_conv", cpu.sparse_conv, "CPU")
_library.impl("sparse_conv", lowering(_cuda, "sparse_conv", reference.sparse_conv), "CUDA")
_library.impl("sparse_conv_weight_grad", reference.weight_grad, "CompositeExplicitAutograd")
_library.impl("sparse_conv_weight_grad", cpu.weight_grad, "CPU")
_library.impl("sparse_conv_weight_grad", lowering(_cuda, "weight_grad", reference.weight_grad), "CUDA")
