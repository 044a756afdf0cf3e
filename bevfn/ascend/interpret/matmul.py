"""Matrix products. The cube unit multiplies half precision into float32 sums, which are rounded once.

Source: hicann/ops-nn at e5c3fa93, matmul/*/op_graph; torchair's ge_ir.proto.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bevfn.ascend.interpret.node import Invalid, fixed, same_dtype, wide


def matmul(
    x1: Tensor, x2: Tensor, bias: Tensor | None = None, *, transpose_x1: bool = False, transpose_x2: bool = False
) -> Tensor:
    """[M K] [K N] -> [M N], plus a bias [N]."""
    if x1.dim() != 2 or x2.dim() != 2:
        raise Invalid("both operands are matrices")
    return _product(x1, x2, transpose_x1, transpose_x2, bias)


@fixed(offset_x=0)
def matmul_v2(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    offset_w: None = None,
    *,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
) -> Tensor:
    return matmul(x1, x2, bias, transpose_x1=transpose_x1, transpose_x2=transpose_x2)


def batch_matmul(x1: Tensor, x2: Tensor, *, adj_x1: bool = False, adj_x2: bool = False) -> Tensor:
    """[... M K] [... K N] -> [... M N]; leading axes broadcast."""
    if x1.dim() < 2 or x2.dim() < 2:
        raise Invalid("both operands have at least two axes")
    return _product(x1, x2, adj_x1, adj_x2, None)


@fixed(offset_x=0)
def batch_matmul_v2(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    offset_w: None = None,
    *,
    adj_x1: bool = False,
    adj_x2: bool = False,
) -> Tensor:
    return _product(x1, x2, adj_x1, adj_x2, bias)


def _product(x1: Tensor, x2: Tensor, transpose_x1: bool, transpose_x2: bool, bias: Tensor | None) -> Tensor:
    same_dtype(x1, x2)
    dtype = wide(x1.dtype)
    a = (x1.mT if transpose_x1 else x1).to(dtype)
    b = (x2.mT if transpose_x2 else x2).to(dtype)
    y = torch.matmul(a, b)
    return (y if bias is None else y + bias.to(dtype)).to(x1.dtype)


@fixed(adjoint=False)
def matrix_inverse(x: Tensor) -> Tensor:
    return torch.linalg.inv(x)


OPS: dict[str, Callable] = {
    "MatMul": matmul,
    "MatMulV2": matmul_v2,
    "BatchMatMul": batch_matmul,
    "BatchMatMulV2": batch_matmul_v2,
    "MatrixInverse": matrix_inverse,
}
