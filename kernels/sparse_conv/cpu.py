"""Host lowering of `sparse_conv`: `cpu.cpp` in float32; float64 (gradient checks) takes the reference."""

import torch
from torch import Tensor

from bevfn.kernels import native
from bevfn.kernels.sparse_conv import reference


def sparse_conv(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """x [V C_in], weight [K C_in C_out], table [K W] int32 -> [W C_out]; half precision is rounded once, at the end."""
    if x.dtype == torch.float64:
        return reference.sparse_conv(x, weight, table)
    K, channels_in, channels_out = weight.shape
    rows, kernel, table = x.float().contiguous(), weight.float(), table.contiguous()
    y = torch.empty(table.shape[1], channels_out)
    last = sum((n - 1) * step for n, step in zip(kernel.shape, kernel.stride()))
    memory = kernel.as_strided(
        (last + 1 if kernel.numel() else 0,), (1,)
    )  # the gradient passes transposed weights: no copy
    sizes = (K, x.shape[0], table.shape[1], channels_in, channels_out)
    bad = native.call("sparse_conv", "sparse_conv", rows, memory, kernel.stride(), table, *sizes, y)
    _check(bad, x)
    return y.to(x.dtype)


def weight_grad(x: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    """x [V C_in], grad [W C_out], table [K W] int32 -> [K C_in C_out]."""
    if x.dtype == torch.float64:
        return reference.weight_grad(x, grad, table)
    rows, slopes, table = x.float().contiguous(), grad.float().contiguous(), table.contiguous()
    g = torch.empty(table.shape[0], x.shape[1], grad.shape[1])
    sizes = (table.shape[0], x.shape[0], table.shape[1], x.shape[1], grad.shape[1])
    bad = native.call("sparse_conv", "sparse_conv_weight_grad", rows, slopes, table, *sizes, g)
    _check(bad, x)
    return g.to(x.dtype)


def _check(bad: int, x: Tensor) -> None:
    if bad:
        raise RuntimeError(
            f"sparse_conv: a table entry is beyond x's {x.shape[0]} rows; was the table made for other features?"
        )
