"""`deform_conv` for CUDA: Triton samples images into columns, torch multiplies them, some images at a time.

Columns and their gradient have x's dtype, so that tensor cores multiply them; positions, samples and the gradients' sums are
float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bevfn.kernels import gathered, indices
from bevfn.kernels.bilinear import corner, place, sums_by_pixel
from bevfn.kernels.deform_conv import reference
from bevfn.kernels.parts import joined, parts, summed

ROWS = 32  # output positions of a program
CHANNELS = 64  # that it takes at a time


def forward(x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *step: int) -> Tensor:
    """Shapes as in `reference.forward`."""
    (O, I), size = weight.shape[:2], offset.shape[2:]
    G, P = x.shape[1] // I, size[0] * size[1]
    matrix = reference._matrix(weight, G, x.dtype)  # G KI O/G
    made = []
    for some, shift, share in parts(_stored(x, offset, weight), x, offset, mask):
        y = torch.bmm(_columns(some, shift, share, weight, step), matrix)  # G R O/G
        made.append(y.view(G, len(some), P, O // G).permute(1, 0, 3, 2).reshape(len(some), O, *size))
    return joined(made).contiguous()


def backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes as in `reference.backward`."""
    O, I, kh, kw = weight.shape
    G = x.shape[1] // I
    few = parts(_stored(x, offset, weight), grad, x, offset, mask)
    made = [_backward(slope, some, shift, share, weight, step) for slope, some, shift, share in few]
    grad_x, grad_offset, grad_mask, grad_matrix = zip(*made)
    grad_weight = summed(grad_matrix).view(G, kh, kw, I, O // G).permute(0, 4, 3, 1, 2).reshape(weight.shape)
    no_mask = offset.new_empty(0) if mask is None else joined(grad_mask)
    return joined(grad_x).contiguous(), joined(grad_offset), no_mask, grad_weight.to(weight.dtype).contiguous()


def _stored(x: Tensor, offset: Tensor, weight: Tensor) -> int:
    """Bytes of an image's columns, of their gradient, and of a copy in another order."""
    columns = weight.shape[2] * weight.shape[3] * x.shape[1] * offset.shape[2] * offset.shape[3]
    return 3 * x.element_size() * columns


def _sizes(x: Tensor, offset: Tensor, weight: Tensor, step: tuple[int, ...]) -> tuple[tuple[int, ...], dict[str, int]]:
    """(Numbers, constants) of the kernels."""
    (B, C, H, W), (kh, kw), (height, width) = x.shape, weight.shape[2:], offset.shape[2:]
    D = offset.shape[1] // (2 * kh * kw)
    wide = min(CHANNELS, triton.next_power_of_2(C // D))
    numbers = B * height * width, height * width, width, H, W, *step
    return numbers, {"K": kh * kw, "KW": kw, "D": D, "C": C, "WIDE": wide, "ROWS": ROWS}


def _pixels(x: Tensor) -> Tensor:
    """[B H W C]."""
    return x.permute(0, 2, 3, 1).contiguous()


def _columns(x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, step: tuple[int, ...]) -> Tensor:
    """[G R KI], of x's dtype."""
    numbers, constants = _sizes(x, offset, weight, step)
    R, K, D, C, I = numbers[0], constants["K"], constants["D"], constants["C"], weight.shape[1]
    columns = torch.empty(C // I, R, K * I, dtype=x.dtype, device=x.device)
    if R:
        offset = offset.contiguous()
        _sample[(triton.cdiv(R, ROWS), K * D, triton.cdiv(C // D, constants["WIDE"]))](
            _pixels(x),
            offset,
            offset if mask is None else mask.contiguous(),
            columns,
            *numbers,
            I=I,
            MASKED=mask is not None,
            **constants,
        )
    return columns


def _backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, step: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, offset, mask and, [G KI O/G] float32, of the weight matrix, of some images."""
    numbers, constants = _sizes(x, offset, weight, step)
    (B, C, H, W), (O, I), R, P = x.shape, weight.shape[:2], *numbers[:2]
    G, K, D = C // I, constants["K"], constants["D"]
    slopes = grad.to(x.dtype).reshape(B, G, O // G, P).permute(1, 0, 3, 2).reshape(G, R, O // G)
    columns = _columns(x, offset, mask, weight, step)
    grad_matrix = torch.bmm(columns.transpose(1, 2), slopes).float()
    grad_columns = torch.bmm(slopes, reference._matrix(weight, G, x.dtype).transpose(1, 2), out=columns)
    grad_columns = grad_columns.view(G, R, K, I).permute(1, 2, 0, 3).reshape(R * K * D, C // D)
    grad_offset = torch.empty(offset.shape, dtype=offset.dtype, device=x.device)
    grad_mask = grad_offset if mask is None else torch.empty(mask.shape, dtype=mask.dtype, device=x.device)
    indices.check("deform_conv", "corners of samples", R * K * D * 4)
    indices.check("deform_conv", "pixels of all groups", B * H * W * D)
    reached = torch.empty(R * K * D * 4, dtype=torch.int32, device=x.device)
    shares = torch.empty(R * K * D * 4, dtype=torch.float32, device=x.device)
    if R:
        offset = offset.contiguous()
        _sample_backward[(triton.cdiv(R, ROWS), K * D)](
            _pixels(x),
            offset,
            offset if mask is None else mask.contiguous(),
            grad_columns,
            grad_offset,
            grad_mask,
            reached,
            shares,
            *numbers,
            MASKED=mask is not None,
            **constants,
        )
    grad_x = sums_by_pixel(reached, shares, grad_columns, B * H * W * D).view(B, H, W, C).permute(0, 3, 1, 2)
    return grad_x.to(x.dtype), grad_offset, grad_mask, grad_matrix


@triton.jit
def _position(offset, mask, r, R, P, WIDTH, H, W, STRIDE, PADDING, DILATION, kd, K, KW, D, MASKED: tl.constexpr):
    """Samples of one tap and group, kd = d K + k: (inside, top, left, y, x, mask's value, where its offset lies)."""
    live = r < R
    image, p = r // P, r % P
    k = kd % K
    at = (image.to(tl.int64) * (2 * D * K) + 2 * kd) * P + p
    y = (p // WIDTH * STRIDE + k // KW * DILATION - PADDING).to(tl.float32)
    x = (p % WIDTH * STRIDE + k % KW * DILATION - PADDING).to(tl.float32)
    y += tl.load(offset + at, mask=live, other=0.0).to(tl.float32)
    x += tl.load(offset + at + P, mask=live, other=0.0).to(tl.float32)
    inside, top, left, y, x = place(live, y, x, H, W)
    share = tl.zeros_like(y) + 1.0
    if MASKED:
        share = tl.load(mask + (image.to(tl.int64) * (D * K) + kd) * P + p, mask=live, other=0.0).to(tl.float32)
    return inside, top, left, y, x, share, at


@triton.jit
def _sample(
    pixels,
    offset,
    mask,
    columns,
    R,
    P,
    WIDTH,
    H,
    W,
    STRIDE,
    PADDING,
    DILATION,
    K: tl.constexpr,
    KW: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    I: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Columns of some positions, of one tap and some channels of one deformable group."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kd = tl.program_id(1)
    of = tl.program_id(2) * WIDE + tl.arange(0, WIDE)
    channel = kd // K * (C // D) + of
    inside, top, left, y, x, factor, _at = _position(
        offset, mask, r, R, P, WIDTH, H, W, STRIDE, PADDING, DILATION, kd, K, KW, D, MASKED
    )
    total = tl.zeros((ROWS, WIDE), tl.float32)
    for i in tl.static_range(4):
        pixel, there, share, _slope_y, _slope_x = corner(inside, top, left, y, x, H, W, i // 2, i % 2)
        read = gathered.rows(pixels + kd // K * (C // D), r // P * (H * W) + pixel, C, there, of, C // D)
        total += share[:, None] * read.to(tl.float32)
    total = total * factor[:, None]
    to = (channel // I).to(tl.int64)[None, :] * R + r[:, None]
    to = (to * K + kd % K) * I + (channel % I)[None, :]
    tl.store(columns + to, total.to(columns.dtype.element_ty), mask=(r < R)[:, None] & (of < C // D)[None, :])


@triton.jit
def _sample_backward(
    pixels,
    offset,
    mask,
    grad_columns,
    grad_offset,
    grad_mask,
    reached,
    shares,
    R,
    P,
    WIDTH,
    H,
    W,
    STRIDE,
    PADDING,
    DILATION,
    K: tl.constexpr,
    KW: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients of offset and mask of some positions, of one tap and group, and which pixels their corners reach."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kd = tl.program_id(1)
    live = r < R
    d = kd // K
    inside, top, left, y, x, factor, at = _position(
        offset, mask, r, R, P, WIDTH, H, W, STRIDE, PADDING, DILATION, kd, K, KW, D, MASKED
    )
    sample = (r.to(tl.int64) * K + kd % K) * D + d
    grad_share, grad_y, grad_x = tl.zeros_like(y), tl.zeros_like(y), tl.zeros_like(y)
    for i in tl.static_range(4):
        pixel, there, share, slope_y, slope_x = corner(inside, top, left, y, x, H, W, i // 2, i % 2)
        row = r // P * (H * W) + pixel
        product = tl.zeros_like(y)
        for first in range(0, C // D, WIDE):
            of = first + tl.arange(0, WIDE)
            value = gathered.rows(pixels + d * (C // D), row, C, there, of, C // D)
            slope = gathered.rows(grad_columns, sample, C // D, there, of, C // D)
            product += tl.sum(value.to(tl.float32) * slope.to(tl.float32), 1)
        grad_share += share * product
        grad_y += slope_y * product
        grad_x += slope_x * product
        tl.store(reached + sample * 4 + i, tl.where(there, row * D + d, -1), mask=live)
        tl.store(shares + sample * 4 + i, tl.where(there, share * factor, 0.0), mask=live)
    tl.store(grad_offset + at, (grad_y * factor).to(grad_offset.dtype.element_ty), mask=live)
    tl.store(grad_offset + at + P, (grad_x * factor).to(grad_offset.dtype.element_ty), mask=live)
    if MASKED:
        to = grad_mask + ((r // P).to(tl.int64) * (D * K) + kd) * P + r % P
        tl.store(to, grad_share.to(grad_mask.dtype.element_ty), mask=live)
