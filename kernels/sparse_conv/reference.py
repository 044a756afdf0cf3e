"""Meaning of `sparse_conv` in plain torch: per kernel offset gather the rows, multiply, add up in float32 or wider."""

import torch
from torch import Tensor


def sparse_conv(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """x [V C_in], weight [K C_in C_out], table [K W] -> [W C_out]; also the input gradient, see `__init__`."""
    rows, index = _padded(x, table)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(table.shape[1], weight.shape[2], dtype=wide, device=x.device)
    for k in range(table.shape[0]):
        y = y + torch.mm(rows.index_select(0, index[k]), weight[k]).to(wide)
    return y.to(x.dtype)


def weight_grad(x: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    """x [V C_in], grad [W C_out], table [K W] -> [K C_in C_out]."""
    rows, index = _padded(x, table)
    return torch.stack([torch.mm(rows.index_select(0, index[k]).t(), grad) for k in range(table.shape[0])])


def _padded(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """x with a row of zeros at the end, and the table pointing there where it says -1."""
    rows = torch.cat([x, x.new_zeros(1, x.shape[1])])
    return rows, torch.where(table < 0, torch.full_like(table, x.shape[0]), table).long()
