"""`sparse_conv` for CUDA in Triton: implicit matrix products over tiles of rows that have the same offsets.

A row reads few of the K offsets, and a tile of rows multiplies an offset that any of its rows reads. So rows are sorted by
their mask of offsets, the offsets in two halves, each with an order of its own: tiles then multiply 1.13 to 1.19 times
what the table asks for, unsorted 2 to 2.2 times (tables of a real key frame). A tile's offsets come as a
list, so that its loop has no branch and the gathers are loaded ahead. Sums are float32; a half adds to the one before.
The tiles are made once for all convolutions that read a table; `sparse_conv` and `weight_grad` are without them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bevfn.kernels import cuda, gathered, indices
from bevfn.kernels.sparse_conv.reference import TILE_ROWS, tile_shape

SPANS = 2048  # programs that a weight gradient is divided among, about


def sparse_conv(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """x [V C_in], weight [K C_in C_out], table [K W] int32 -> [W C_out]; also the input gradient, see `__init__`."""
    return tiled(x, weight, table, *tiles(table))


def weight_grad(x: Tensor, grad: Tensor, table: Tensor) -> Tensor:
    """x [V C_in], grad [W C_out], table [K W] -> [K C_in C_out]."""
    return tiled_weight_grad(x, grad, table, *tiles(table))


def tiles(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(order, offsets, counts) of table [K W] int32, see `reference.tiles`."""
    (K, W), table = table.shape, table.contiguous()
    indices.check("sparse_conv", "rows of the table", W)
    parts, T, N = tile_shape(table)
    per_part = triton.cdiv(K, parts)
    mask, offsets = table.new_empty(parts, W), table.new_empty(parts, T, N)
    count = table.new_empty(parts, T)
    if W == 0:
        return mask, offsets, count
    _masks[(triton.cdiv(W, 256), parts)](table, mask, W, K=K, PER_PART=per_part, BLOCK=256)
    mask, order = torch.sort(mask, dim=1, stable=True)
    _offsets[(T, parts)](mask, offsets, count, W, T, PER_PART=per_part, N=N, ROWS=TILE_ROWS)
    return order.to(torch.int32), offsets, count


def tiled(x: Tensor, weight: Tensor, table: Tensor, order: Tensor, offsets: Tensor, counts: Tensor) -> Tensor:
    """`sparse_conv` with the table's tiles."""
    _, channels_in, channels_out = weight.shape
    W = table.shape[1]
    x, table = x.contiguous(), table.contiguous()
    y = x.new_empty(W, channels_out)
    if y.numel() == 0:
        return y
    parts, T, N = offsets.shape
    sums = y if parts == 1 else torch.empty(y.shape, dtype=torch.float32, device=y.device)
    wide, deep = block(channels_out, 128), block(channels_in, 64)
    for part in range(parts):
        last = part == parts - 1
        _multiply[(T, triton.cdiv(channels_out, wide))](
            x,
            weight,
            table,
            order[part],
            offsets[part],
            counts[part],
            sums,
            y if last else sums,
            W,
            *weight.stride(),
            N=N,
            C_IN=channels_in,
            C_OUT=channels_out,
            ADD=part > 0,
            ROWS=TILE_ROWS,
            WIDE=wide,
            DEEP=deep,
            PRECISION=cuda.float32_products(),
        )
    return y


def tiled_weight_grad(x: Tensor, grad: Tensor, table: Tensor, order: Tensor, offsets: Tensor, counts: Tensor) -> Tensor:
    """`weight_grad` with the table's tiles."""
    (K, W), channels_in, channels_out = table.shape, x.shape[1], grad.shape[1]
    x, grad, table = x.contiguous(), grad.contiguous(), table.contiguous()
    if W == 0:
        return x.new_zeros(K, channels_in, channels_out)
    T = counts.shape[1]
    wide, deep = block(channels_out, 64), block(channels_in, 64)
    patches = triton.cdiv(channels_in, deep) * triton.cdiv(channels_out, wide)
    spans = min(T, max(1, SPANS // (K * patches)))
    span = triton.cdiv(T, spans)
    spans = triton.cdiv(T, span)
    sums = torch.empty(spans, K, channels_in, channels_out, dtype=torch.float32, device=x.device)
    _multiply_weight[(K, spans, patches)](
        x,
        grad,
        table,
        order,
        sums,
        W,
        T,
        span,
        K=K,
        PER_PART=triton.cdiv(K, counts.shape[0]),
        C_IN=channels_in,
        C_OUT=channels_out,
        ROWS=TILE_ROWS,
        WIDE=wide,
        DEEP=deep,
        PRECISION=cuda.float32_products(),
    )
    return sums.sum(0).to(x.dtype)


def block(channels: int, most: int) -> int:
    """How many channels a program takes: a power of two that tensor cores multiply."""
    return max(16, min(most, triton.next_power_of_2(channels)))


@triton.jit
def _masks(table, mask, W, K: tl.constexpr, PER_PART: tl.constexpr, BLOCK: tl.constexpr):
    """mask[part, row]: bit i says that the row reads offset part * PER_PART + i."""
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.int32)
    for i in range(PER_PART):
        k = part * PER_PART + i
        index = tl.load(table + k.to(tl.int64) * W + rows, mask=(rows < W) & (k < K), other=-1)
        found += (index >= 0).to(tl.int32) << i
    tl.store(mask + part.to(tl.int64) * W + rows, found, mask=rows < W)


@triton.jit
def _offsets(mask, offsets, count, W, T, PER_PART: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr):
    """The offsets of one tile, of the sorted masks."""
    tile, part = tl.program_id(0), tl.program_id(1)
    rows = tile * ROWS + tl.arange(0, ROWS)
    bit = tl.arange(0, N)
    found = tl.load(mask + part.to(tl.int64) * W + rows, mask=rows < W, other=0)
    read = tl.max((found[:, None] >> bit[None, :]) & 1, 0)
    place = (part.to(tl.int64) * T + tile) * N
    tl.store(offsets + place + tl.cumsum(read, 0) - read, part * PER_PART + bit, mask=read > 0)
    tl.store(count + part * T + tile, tl.sum(read, 0))


@triton.jit
def _multiply(
    x,
    weight,
    table,
    order,
    offsets,
    count,
    sums,
    y,
    W,
    step_k,
    step_in,
    step_out,
    N: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of rows times a block of output channels."""
    tile = tl.program_id(0)
    at = tile * ROWS + tl.arange(0, ROWS)
    rows = tl.load(order + at, mask=at < W, other=0)
    to = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    place = rows.to(tl.int64)[:, None] * C_OUT + to[None, :]
    stored = (at < W)[:, None] & (to < C_OUT)[None, :]
    CHUNKS: tl.constexpr = (C_IN + DEEP - 1) // DEEP
    total = tl.zeros((ROWS, WIDE), tl.float32)
    for step in tl.range(0, tl.load(count + tile) * CHUNKS, num_stages=3):
        k = tl.load(offsets + tile.to(tl.int64) * N + step // CHUNKS)
        of = (step % CHUNKS) * DEEP + tl.arange(0, DEEP)
        index = tl.load(table + k.to(tl.int64) * W + rows, mask=at < W, other=-1)
        a = gathered.rows(x, index, C_IN, index >= 0, of, C_IN)
        b = tl.load(
            weight + k * step_k + of[:, None] * step_in + to[None, :] * step_out,
            mask=(of < C_IN)[:, None] & (to < C_OUT)[None, :],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    if ADD:  # after the loop: its accumulator starts where the tensor cores' do
        total = tl.load(sums + place, mask=stored, other=0.0) + total
    tl.store(y + place, total.to(y.dtype.element_ty), mask=stored)


@triton.jit
def _multiply_weight(
    x,
    grad,
    table,
    order,
    sums,
    W,
    T,
    SPAN,
    K: tl.constexpr,
    PER_PART: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[span, k]: of one offset, over the tiles of one span; a tile without the offset is passed over."""
    k, span, patch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    ACROSS: tl.constexpr = (C_OUT + WIDE - 1) // WIDE
    of = (patch // ACROSS) * DEEP + tl.arange(0, DEEP)
    to = (patch % ACROSS) * WIDE + tl.arange(0, WIDE)
    order += (k // PER_PART).to(tl.int64) * W
    total = tl.zeros((DEEP, WIDE), tl.float32)
    for tile in range(span * SPAN, min(T, (span + 1) * SPAN)):
        at = tile * ROWS + tl.arange(0, ROWS)
        rows = tl.load(order + at, mask=at < W, other=0)
        index = tl.load(table + k.to(tl.int64) * W + rows, mask=at < W, other=-1)
        there = index >= 0
        if tl.max(index, 0) >= 0:
            a = tl.load(
                x + index.to(tl.int64)[None, :] * C_IN + of[:, None],
                mask=there[None, :] & (of < C_IN)[:, None],
                other=0.0,
            )
            b = gathered.rows(grad, rows, C_OUT, there, to, C_OUT)
            total = tl.dot(a, b, total, input_precision=PRECISION)
    place = ((span.to(tl.int64) * K + k) * C_IN + of[:, None]) * C_OUT + to[None, :]
    tl.store(sums + place, total, mask=(of < C_IN)[:, None] & (to < C_OUT)[None, :])
