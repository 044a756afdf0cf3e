"""`sparse_conv` for Ascend: gather all offsets' rows side by side (im2col), one matrix product.

The cube unit multiplies zeros for the missing neighbours, 27 rows instead of the 2 to 14 real ones. A product per offset
multiplies as many, and reads and writes its sums 27 times (figures in docs/ascend.md). Products of half precision are
summed in float32 and rounded once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

COLUMNS = 1 << 29  # elements of a columns matrix: more would be gigabytes, and beyond the int32 offsets in kernels


def sparse_conv(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """x [V C_in], weight [K C_in C_out], table [K W] int32 -> [W C_out]; also the input gradient, see `__init__`."""
    K, channels_in, channels_out = weight.shape
    rows = torch.cat([x.new_zeros(1, channels_in), x])  # -1 + 1: the row of zeros
    weight = weight.reshape(K * channels_in, channels_out)
    parts = [torch.mm(columns, weight) for columns, _ in _columns(rows, table + 1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def weight_grad(x: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    """x [V C_in], grad [W C_out], table [K W] -> [K C_in C_out].

    The zeros come last, unlike in `sparse_conv`: GE merges equal nodes, and a merged columns matrix would stay in memory
    from the forward pass to here, in every layer.
    """
    rows = torch.cat([x, x.new_zeros(1, x.shape[1])])
    index = torch.where(table < 0, torch.full_like(table, x.shape[0]), table)
    # grad is transposed, and the result, not the 27 times larger columns: the transpose may be a node of its own.
    parts = [torch.mm(grad[part].t(), columns) for columns, part in _columns(rows, index)]
    total = parts[0]
    if len(parts) > 1:
        total = torch.stack(parts).to(torch.promote_types(x.dtype, torch.float32)).sum(0).to(x.dtype)
    return total.t().reshape(table.shape[0], x.shape[1], grad.shape[1])


def _columns(rows: Tensor, index: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Per part of the outputs: [W, K C_in] rows at index [K W], and which outputs."""
    (K, W), channels = index.shape, rows.shape[1]
    step = max(1, COLUMNS // (K * channels))
    index = index.t()
    for start in range(0, max(W, 1), step):
        part = slice(start, min(start + step, W))
        yield rows.index_select(0, index[part].reshape(-1)).reshape(-1, K * channels), part


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.bevfn.sparse_conv.default: sparse_conv,
    torch.ops.bevfn.sparse_conv_weight_grad.default: weight_grad,
}
