"""`deform_conv` for Ascend: one gather of all samples' four pixels, weighted and summed by a batched product.

The gathered pixels are stored, four times the samples (311 MB per BEVDepth sample in float32), of a few images at a time
(`kernels.parts`). A batched product reads them once and writes the samples; as products and sums they would be written and read again. No type of DrivingSDK can
stand in a graph as it is published, and the kernel of CANN's DeformableOffsets for Atlas A2 is not: docs/ascend.md.

Axes as in `reference`: B images, D deformable groups of c channels, K taps, P positions, G groups of I input channels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bevfn.kernels.deform_conv import reference
from bevfn.kernels.parts import joined, parts, summed

INDEX = 1 << 31  # what an int32 index reaches


class Corners(NamedTuple):
    """The four pixels around every sample; all [B P K D 4]."""

    row: Tensor  # int32, of the pixel in x [B H W D c]; of the nearest pixel where the corner is outside the image
    share: Tensor  # bilinear weight, 0 outside
    slope_y: Tensor  # its derivatives, 0 outside
    slope_x: Tensor


def forward(x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *step: int) -> Tensor:
    """As `reference.forward`: -> [B O H' W']."""
    if not 0 < x.numel() < INDEX:
        return reference.forward(x, offset, mask, weight, *step)
    few = parts(_stored(x, offset, weight), x, offset, mask)
    return joined(_forward(images, offsets, masks, weight, *step) for images, offsets, masks in few)


def _forward(x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *step: int) -> Tensor:
    (B, C), (O, I), size = x.shape[:2], weight.shape[:2], offset.shape[2:]
    corners = _corners(x, offset, weight, *step, order=(0, 1))
    columns = _columns(_pixels(x, corners), corners.share, mask, C, C // I)
    y = torch.bmm(columns, reference._matrix(weight, C // I, columns.dtype))  # G R O/G
    return y.reshape(C // I, B, -1, O * I // C).permute(1, 0, 3, 2).reshape(B, O, *size).to(x.dtype)


def backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.backward`: gradients of x, offset, mask (empty if it is None) and weight.

    Where x or grad is not finite, other gradients may be NaN than in the reference: corners outside count 0 times a pixel.
    """
    if not 0 < x.numel() < INDEX:
        return reference.backward(grad, x, offset, mask, weight, *step)
    few = parts(_stored(x, offset, weight), grad, x, offset, mask)
    found = [_backward(grads, images, offsets, masks, weight, *step) for grads, images, offsets, masks in few]
    grad_x, grad_offset, grad_mask = (joined(part) for part in list(zip(*found))[:3])
    return grad_x, grad_offset, grad_mask, summed(part[3] for part in found).to(weight.dtype).contiguous()


def _backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward` of a few images; the gradient of weight in the wide dtype."""
    (B, C, H, W), (O, I, kh, kw) = x.shape, weight.shape
    G, wide = C // I, reference._wide(x)
    # The corners in another order than forward: GE merges equal gathers, and a merged one would stay in memory.
    corners = _corners(x, offset, weight, *step, order=(1, 0))
    pixels = _pixels(x, corners)  # N 4 c
    slopes = grad.to(wide).reshape(B, G, O // G, -1).permute(1, 0, 3, 2).reshape(G, -1, O // G)  # G R O/G
    grad_weight = torch.bmm(slopes.transpose(1, 2), _columns(pixels, corners.share, mask, C, G))  # G O/G KI
    grad_weight = grad_weight.reshape(O, kh, kw, I).permute(0, 3, 1, 2)
    grad_columns = torch.bmm(slopes, reference._matrix(weight, G, wide).transpose(1, 2))  # G R KI
    grad_samples = grad_columns.reshape(G, -1, I).permute(1, 0, 2).reshape(len(pixels), -1)  # N c

    shares, D, c = corners.share, corners.share.shape[3], pixels.shape[2]
    by_share = torch.bmm(pixels, grad_samples[:, :, None]).reshape(shares.shape)  # B P K D 4
    grad_mask = (by_share * shares).sum(-1)
    grad_place = torch.stack([(by_share * slope).sum(-1) for slope in (corners.slope_y, corners.slope_x)], -1)
    if mask is not None:
        by_sample = _by_sample(mask, shares)
        grad_place, shares = grad_place * by_sample, shares * by_sample
    parts = torch.bmm(shares.reshape(-1, 4, 1), grad_samples[:, None])  # N 4 c
    rows = parts.new_zeros(B * H * W * D, c).index_add(0, corners.row.reshape(-1), parts.reshape(-1, c))
    return (
        rows.reshape(B, H, W, C).permute(0, 3, 1, 2).to(x.dtype).contiguous(),
        grad_place.permute(0, 3, 2, 4, 1).reshape(offset.shape).to(offset.dtype),
        offset.new_zeros(0) if mask is None else grad_mask.permute(0, 3, 2, 1).reshape(mask.shape).to(mask.dtype),
        grad_weight,
    )


def _stored(x: Tensor, offset: Tensor, weight: Tensor) -> int:
    """Bytes of one image's gathered pixels."""
    samples = offset.shape[2] * offset.shape[3] * weight.shape[2] * weight.shape[3]
    return samples * 4 * x.shape[1] * (8 if x.dtype == torch.float64 else 4)


def _corners(x: Tensor, offset: Tensor, weight: Tensor, *step: int, order: tuple[int, int]) -> Corners:
    stride, padding, dilation = step
    (B, _, H, W), (kh, kw), wide = x.shape, weight.shape[2:], reference._wide(x)
    height, width = offset.shape[2:]
    shift = offset.to(wide).reshape(B, -1, kh * kw, 2, height * width).permute(3, 0, 4, 2, 1)  # 2 B P K D
    y, x_ = (
        displaced + fixed for displaced, fixed in zip(shift, _grid(height, width, kh, kw, stride, dilation, shift))
    )
    y, x_ = y - padding, x_ - padding
    inside = (y > -1) & (y < H) & (x_ > -1) & (x_ < W)  # false for NaN
    y, x_ = (torch.where(inside, t, torch.zeros_like(t)) for t in (y, x_))
    y0, x0 = torch.floor(y), torch.floor(x_)
    shares_y, shares_x = (1 - (y - y0), y - y0), (1 - (x_ - x0), x_ - x0)
    image = torch.arange(B, dtype=torch.int32, device=x.device)[:, None, None, None] * (H * W)
    group = torch.arange(y.shape[3], dtype=torch.int32, device=x.device)

    made = []
    for i in order:
        for j in order:
            row, column = y0 + i, x0 + j
            there = (inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)).to(wide)
            pixel = image + row.clamp(0, H - 1).to(torch.int32) * W + column.clamp(0, W - 1).to(torch.int32)
            share, slope_y, slope_x = shares_y[i] * shares_x[j], (2 * i - 1) * shares_x[j], (2 * j - 1) * shares_y[i]
            made.append((pixel * y.shape[3] + group, there * share, there * slope_y, there * slope_x))
    return Corners(*(torch.stack(parts, -1) for parts in zip(*made)))


def _grid(height: int, width: int, kh: int, kw: int, stride: int, dilation: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the taps without offset and padding, [P K 1] each."""
    down, right, top, left = (
        torch.arange(n, dtype=like.dtype, device=like.device) * step
        for n, step in ((kh, dilation), (kw, dilation), (height, stride), (width, stride))
    )
    shape = (height, width, kh, kw)
    rows, columns = top[:, None, None, None] + down[:, None], left[:, None, None] + right
    return rows.expand(shape).reshape(-1, kh * kw, 1), columns.expand(shape).reshape(-1, kh * kw, 1)


def _pixels(x: Tensor, corners: Corners) -> Tensor:
    """[N 4 c] of x [B C H W]: the corners' pixels of each of the N = B P K D samples."""
    rows = x.to(reference._wide(x)).permute(0, 2, 3, 1).reshape(-1, x.shape[1] // corners.row.shape[3])
    return rows.index_select(0, corners.row.reshape(-1)).reshape(-1, 4, rows.shape[1])


def _columns(pixels: Tensor, share: Tensor, mask: Tensor | None, channels: int, groups: int) -> Tensor:
    """[N 4 c], [B P K D 4] and mask [B DK H' W'] -> the weighted samples [G R KI]."""
    (B, P, K), I = share.shape[:3], channels // groups
    weights = share if mask is None else share * _by_sample(mask, share)
    samples = torch.bmm(weights.reshape(-1, 1, 4), pixels)  # N 1 c
    return samples.reshape(B * P * K, groups, I).permute(1, 0, 2).reshape(groups, B * P, K * I)


def _by_sample(mask: Tensor, share: Tensor) -> Tensor:
    """mask [B DK H' W'] -> [B P K D 1] as `share` is."""
    B, P, K, D = share.shape[:4]
    return mask.to(share.dtype).reshape(B, D, K, P).permute(0, 3, 2, 1)[..., None]


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.bevfn.deform_conv.default: forward,
    torch.ops.bevfn.deform_conv_backward.default: backward,
}
