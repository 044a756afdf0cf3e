"""Meaning of `sparse_conv` in plain torch: per kernel offset gather the rows, multiply, add up in float32 or wider."""

import torch
from torch import Tensor

TILE_ROWS = 64
OFFSETS = 16  # up to here one order of the rows is as good as two
BITS = 30  # of a mask


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


def tiled(x: Tensor, weight: Tensor, table: Tensor, *tiles: Tensor) -> Tensor:
    """`sparse_conv`; how the rows are grouped changes how fast it is, nothing else."""
    return sparse_conv(x, weight, table)


def tiled_weight_grad(x: Tensor, grad: Tensor, table: Tensor, *tiles: Tensor) -> Tensor:
    return weight_grad(x, grad, table)


def tiles(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How the rows of table [K W] int32 are grouped: S parts of the offsets, T tiles of `TILE_ROWS` rows, all int32.

    order [S W], rows sorted by their mask of the part's offsets; offsets [S T N], those that any row of the tile reads,
    ascending, then anything; counts [S T], how many.
    """
    (K, W), (S, T, N) = table.shape, tile_shape(table)
    per_part = -(-K // S)
    bit = torch.arange(per_part, dtype=torch.int32, device=table.device)
    reads = table.new_zeros(S * per_part, W)
    reads[:K] = (table >= 0).to(torch.int32)
    mask, order = torch.sort((reads.view(S, per_part, W) << bit[:, None]).sum(1, dtype=torch.int32), stable=True)
    mask = torch.nn.functional.pad(mask, (0, T * TILE_ROWS - W)).view(S, T, TILE_ROWS, 1)
    read = ((mask >> bit) & 1).amax(2)  # S T per_part
    first = torch.arange(S, dtype=torch.int32, device=table.device)[:, None, None] * per_part
    offsets = first + torch.argsort(-read, dim=2, stable=True).to(torch.int32)
    offsets = torch.nn.functional.pad(offsets, (0, N - per_part))
    return order.to(torch.int32), offsets, read.sum(2, dtype=torch.int32)


def tile_shape(table: Tensor) -> tuple[int, int, int]:
    """(S, T, N) of the `tiles` of a table [K W]; N is a power of two."""
    K, W = table.shape
    parts = 1 if K <= OFFSETS else max(2, -(-K // BITS))
    return parts, -(-W // TILE_ROWS), 1 << (-(-K // parts) - 1).bit_length()


def _padded(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """x with a row of zeros at the end, and the table pointing there where it says -1."""
    rows = torch.cat([x, x.new_zeros(1, x.shape[1])])
    return rows, torch.where(table < 0, torch.full_like(table, x.shape[0]), table).long()
