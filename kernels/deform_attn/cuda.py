"""`deform_attn` for CUDA in Triton: a program for a few queries of a head gathers their samples, level after level."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bevfn.kernels import gathered, indices
from bevfn.kernels.bilinear import corner, place, sums_by_pixel
from bevfn.kernels.deform_attn.reference import levels

ROWS = 16  # queries, of any heads, of a program


def forward(value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
    """Shapes as in `reference.forward`."""
    (B, S, h, d), (_, Q, _, L, P) = value.shape, weights.shape
    operands, N = _checked(value, locations, weights, mask)
    out = torch.zeros(N, d, dtype=torch.float32, device=value.device)
    for level, height, width, first in levels(sizes) if N else ():
        _attend[(triton.cdiv(N, ROWS),)](
            *operands,
            out,
            N,
            Q * h,
            S,
            height,
            width,
            first,
            level,
            HEADS=h,
            L=L,
            P=P,
            D=d,
            WIDE=triton.next_power_of_2(d),
            MASKED=mask is not None,
            ROWS=ROWS,
        )
    return out.view(B, Q, h * d).to(value.dtype)


def backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `reference.backward`."""
    (B, S, h, d), (_, Q, _, L, P) = value.shape, weights.shape
    operands, N = _checked(value, locations, weights, mask)
    grad, device = grad.contiguous(), value.device
    grad_locations = torch.empty(locations.shape, dtype=locations.dtype, device=device)
    grad_weights = torch.empty(weights.shape, dtype=weights.dtype, device=device)
    pixels = torch.empty(N * L * P * 4, dtype=torch.int32, device=device)
    shares = torch.empty(N * L * P * 4, dtype=torch.float32, device=device)
    for level, height, width, first in levels(sizes) if N else ():
        _attend_backward[(triton.cdiv(N, ROWS),)](
            grad,
            *operands,
            grad_locations,
            grad_weights,
            pixels,
            shares,
            N,
            Q * h,
            S,
            height,
            width,
            first,
            level,
            HEADS=h,
            L=L,
            P=P,
            D=d,
            WIDE=triton.next_power_of_2(d),
            MASKED=mask is not None,
            ROWS=ROWS,
        )
    grad_value = sums_by_pixel(pixels, shares, grad.view(N, d), B * S * h)
    return grad_value.view(value.shape).to(value.dtype), grad_locations, grad_weights


def _checked(value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None) -> tuple[list[Tensor], int]:
    """(Operands of the kernels, without a mask any address in its place; queries times heads)."""
    N = weights.shape[0] * weights.shape[1] * weights.shape[2]
    indices.check("deform_attn", "corners of samples", 4 * weights.numel())
    indices.check("deform_attn", "pixels of all heads", value.numel() // value.shape[3])
    floats = [x.contiguous() for x in (value, locations, weights)]
    return [*floats, floats[2] if mask is None else mask.contiguous()], N


@triton.jit
def _sample(locations, weights, mask, n, N, HEIGHT, WIDTH, LEVEL, p, HEADS, L, P, MASKED: tl.constexpr):
    """The p-th samples of some rows: (inside, top, left, y, x, weight), where the weight lies, and which rows count."""
    counts = n < N
    if MASKED:
        counts = counts & (tl.load(mask + n // HEADS, mask=counts, other=0) != 0)
    tap = (n * L + LEVEL) * P + p
    x = tl.load(locations + tap.to(tl.int64) * 2, mask=counts, other=0.0).to(tl.float32) * WIDTH - 0.5
    y = tl.load(locations + tap.to(tl.int64) * 2 + 1, mask=counts, other=0.0).to(tl.float32) * HEIGHT - 0.5
    inside, top, left, y, x = place(counts, y, x, HEIGHT, WIDTH)
    weight = tl.load(weights + tap, mask=counts, other=0.0).to(tl.float32)
    return inside, top, left, y, x, weight, tap, counts


@triton.jit
def _attend(
    value,
    locations,
    weights,
    mask,
    out,
    N,
    ROWS_OF_IMAGE,
    S,
    HEIGHT,
    WIDTH,
    FIRST,
    LEVEL,
    HEADS: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds one level's samples to some rows of out [B Q h, d]."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    stored = (n < N)[:, None] & (channel < D)[None, :]
    to = out + n.to(tl.int64)[:, None] * D + channel[None, :]
    total = tl.load(to, mask=stored, other=0.0)
    image = (n // ROWS_OF_IMAGE) * S + FIRST
    for p in range(P):
        inside, top, left, y, x, weight, _tap, _counts = _sample(
            locations, weights, mask, n, N, HEIGHT, WIDTH, LEVEL, p, HEADS, L, P, MASKED
        )
        for i in tl.static_range(4):
            pixel, there, share, _slope_y, _slope_x = corner(inside, top, left, y, x, HEIGHT, WIDTH, i // 2, i % 2)
            read = gathered.rows(value, (image + pixel) * HEADS + n % HEADS, D, there, channel, D)
            total += (share * weight)[:, None] * read.to(tl.float32)
    tl.store(to, total, mask=stored)


@triton.jit
def _attend_backward(
    grad,
    value,
    locations,
    weights,
    mask,
    grad_locations,
    grad_weights,
    pixels,
    shares,
    N,
    ROWS_OF_IMAGE,
    S,
    HEIGHT,
    WIDTH,
    FIRST,
    LEVEL,
    HEADS: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One level's gradients of locations and weights, and which pixels the samples' corners reach with which share."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = n < N
    channel = tl.arange(0, WIDE)
    image = (n // ROWS_OF_IMAGE) * S + FIRST
    slope = gathered.rows(grad, n, D, live, channel, D).to(tl.float32)
    for p in range(P):
        inside, top, left, y, x, weight, tap, counts = _sample(
            locations, weights, mask, n, N, HEIGHT, WIDTH, LEVEL, p, HEADS, L, P, MASKED
        )
        grad_weight, grad_y, grad_x = tl.zeros_like(y), tl.zeros_like(y), tl.zeros_like(y)
        for i in tl.static_range(4):
            pixel, there, share, slope_y, slope_x = corner(inside, top, left, y, x, HEIGHT, WIDTH, i // 2, i % 2)
            row = (image + pixel) * HEADS + n % HEADS
            read = gathered.rows(value, row, D, there, channel, D)
            product = tl.where(counts, tl.sum(read.to(tl.float32) * slope, 1), 0.0)
            grad_weight += share * product
            grad_y += slope_y * product
            grad_x += slope_x * product
            entry = tap.to(tl.int64) * 4 + i
            tl.store(pixels + entry, tl.where(there, row, -1), mask=live)
            tl.store(shares + entry, tl.where(there, share * weight, 0.0), mask=live)
        tl.store(grad_weights + tap, grad_weight.to(grad_weights.dtype.element_ty), mask=live)
        to = grad_locations + tap.to(tl.int64) * 2
        tl.store(to, (grad_x * weight * WIDTH).to(grad_locations.dtype.element_ty), mask=live)
        tl.store(to + 1, (grad_y * weight * HEIGHT).to(grad_locations.dtype.element_ty), mask=live)
