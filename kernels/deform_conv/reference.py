"""What `deform_conv` means, in plain torch on any device: four gathers of rows per sample, then a matrix product.

Every spelling has an Ascend converter (torchair of torch_npu 2.13.0); `ascend.py` says the same with 2.7 times fewer bytes.

Axes: B images, D deformable groups of c channels, K taps, P output positions, G groups of I input channels, R = B P.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Corner(NamedTuple):
    """One of the four pixels around every sample; all [B D K P]."""

    row: Tensor  # int64, row of the pixel in `_rows`; the last one, of zeros, outside the image
    share: Tensor  # bilinear weight
    slope_y: Tensor  # its derivatives
    slope_x: Tensor


def forward(x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *step: int) -> Tensor:
    """x [B C H W], offset [B 2DK H' W'], mask [B DK H' W'] or None, weight [O C/G kh kw] -> [B O H' W'], dtype of x.

    step: stride, padding and dilation of both axes.
    """
    (B, C), (O, I) = x.shape[:2], weight.shape[:2]
    size = out_size(x, weight, *step)
    corners = _corners(x, offset, weight, *step)
    samples = _weighted(_samples(_rows(x, corners), corners, _wide(x)), mask)
    y = torch.bmm(_columns(samples, C // I), _matrix(weight, C // I, _wide(x)))  # G R O/G
    y = y.view(C // I, B, size[0] * size[1], O * I // C).permute(1, 0, 3, 2)  # B G O/G P
    return y.reshape(B, O, *size).to(x.dtype).contiguous()


def backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad [B O H' W'] -> gradients of x, offset, mask (empty if it is None) and weight."""
    (B, C, H, W), (O, I, kh, kw), wide = x.shape, weight.shape, _wide(x)
    G = C // I
    corners = _corners(x, offset, weight, *step)
    rows = _rows(x, corners)
    samples = _samples(rows, corners, wide)
    _, D, K, P, c = samples.shape
    slopes = grad.to(wide).reshape(B, G, O // G, P).permute(1, 0, 3, 2).reshape(G, B * P, O // G)
    grad_weight = torch.bmm(_columns(_weighted(samples, mask), G).transpose(1, 2), slopes)  # G KI O/G
    grad_weight = grad_weight.view(G, kh, kw, I, O // G).permute(0, 4, 3, 1, 2).reshape(weight.shape)
    grad_columns = torch.bmm(slopes, _matrix(weight, G, wide).transpose(1, 2))  # G R KI
    grad_samples = grad_columns.view(G, B, P, K, I).permute(1, 2, 3, 0, 4).reshape(B, P, K, D, c).permute(0, 3, 2, 1, 4)
    grad_mask = (grad_samples * samples).sum(-1)  # B D K P
    grad_samples = _weighted(grad_samples, mask)

    grad_rows = torch.zeros_like(rows, dtype=wide)
    grad_y = grad_x = torch.zeros_like(grad_mask)
    for corner in corners:
        product = (grad_samples * _gather(rows, corner.row).to(wide)).sum(-1)
        grad_y = grad_y + corner.slope_y * product
        grad_x = grad_x + corner.slope_x * product
        share = (grad_samples * corner.share[..., None]).reshape(B * D * K * P, c)
        grad_rows = grad_rows.index_add(0, corner.row.reshape(B * D * K * P), share)
    grad_image = grad_rows[: B * D * H * W].view(B, D, H, W, c).permute(0, 1, 4, 2, 3).reshape(x.shape)
    return (
        grad_image.to(x.dtype).contiguous(),
        torch.stack([grad_y, grad_x], 3).reshape(offset.shape).to(offset.dtype),
        offset.new_empty(0) if mask is None else grad_mask.reshape(mask.shape).to(mask.dtype),
        grad_weight.to(weight.dtype).contiguous(),
    )


def out_size(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """(H', W')."""
    H, W = ((n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(x.shape[2:], weight.shape[2:]))
    return H, W


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of positions and sums."""
    return torch.promote_types(x.dtype, torch.float32)


def _corners(x: Tensor, offset: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> list[Corner]:
    (B, _, H, W), (kh, kw), wide = x.shape, weight.shape[2:], _wide(x)
    height, width = offset.shape[2:]
    D = offset.shape[1] // (2 * kh * kw)
    down, right = (torch.arange(n, device=x.device) * dilation - padding for n in (kh, kw))
    top, left = (torch.arange(n, device=x.device) * stride for n in (height, width))
    shift = offset.to(wide).reshape(B, D, kh, kw, 2, height, width)
    y = (down.view(kh, 1, 1, 1) + top.view(height, 1)).to(wide) + shift[:, :, :, :, 0]  # B D kh kw H' W'
    x_ = (right.view(kw, 1, 1) + left).to(wide) + shift[:, :, :, :, 1]
    y, x_ = (t.reshape(B, D, kh * kw, height * width) for t in (y, x_))
    inside = (y > -1) & (y < H) & (x_ > -1) & (x_ < W)  # false for NaN
    y, x_ = (torch.where(inside, t, torch.zeros_like(t)) for t in (y, x_))
    y0, x0 = torch.floor(y), torch.floor(x_)
    image = (torch.arange(B * D, device=x.device) * (H * W)).view(B, D, 1, 1)

    corners = []
    for i, share_y in enumerate((1 - (y - y0), y - y0)):
        for j, share_x in enumerate((1 - (x_ - x0), x_ - x0)):
            row, column = y0.long() + i, x0.long() + j
            there = inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            index = torch.where(there, image + row * W + column, torch.full_like(row, B * D * H * W))
            corners.append(Corner(index, share_y * share_x, (2 * i - 1) * share_x, (2 * j - 1) * share_y))
    return corners


def _rows(x: Tensor, corners: list[Corner]) -> Tensor:
    """[B D H W + 1, c]: the pixels, and a row of zeros that stands for all outside."""
    (B, C, H, W), D = x.shape, corners[0].row.shape[1]
    rows = x.reshape(B, D, C // D, H, W).permute(0, 1, 3, 4, 2).reshape(B * D * H * W, C // D)
    return torch.cat([rows, rows.new_zeros(1, C // D)])


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index.reshape(index.numel())).view(*index.shape, rows.shape[1])


def _samples(rows: Tensor, corners: list[Corner], wide: torch.dtype) -> Tensor:
    """[B D K P c], not yet masked."""
    first, *others = (_gather(rows, corner.row).to(wide) * corner.share[..., None] for corner in corners)
    return sum(others, first)


def _weighted(samples: Tensor, mask: Tensor | None) -> Tensor:
    """samples [B D K P c] times mask [B DK H' W']."""
    return samples if mask is None else samples * mask.to(samples.dtype).reshape(*samples.shape[:4], 1)


def _columns(samples: Tensor, groups: int) -> Tensor:
    """[B D K P c] -> [G R KI]."""
    B, D, K, P, c = samples.shape
    columns = samples.permute(0, 3, 2, 1, 4).reshape(B * P, K, groups, D * c // groups)
    return columns.permute(2, 0, 1, 3).reshape(groups, B * P, K * (D * c // groups))


def _matrix(weight: Tensor, groups: int, wide: torch.dtype) -> Tensor:
    """[O I kh kw] -> [G KI O/G]."""
    O, I, kh, kw = weight.shape
    matrix = weight.to(wide).reshape(groups, O // groups, I, kh * kw)
    return matrix.permute(0, 3, 2, 1).reshape(groups, kh * kw * I, O // groups)
