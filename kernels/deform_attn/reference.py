"""What `deform_attn` means, in plain torch on any device: four gathers of rows per sample, summed by batched products.

Axes: B images, S pixels of all levels, h heads of d channels, Q queries, L levels, P points, N = B Q h.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where the samples of one level lie; all [B Q h P], of the wide dtype but for the first."""

    inside: Tensor  # bool: the sample counts
    row: Tensor  # of the pixel above and to the left, -1 .. H - 1; 0 where the sample does not count
    column: Tensor
    y: Tensor  # how far the sample is from it, 0 .. 1 pixels
    x: Tensor


class Corner(NamedTuple):
    """One of the four pixels around every sample; all [B Q h L P]."""

    row: Tensor  # int64, row of the pixel in `_rows`; the last one, of zeros, outside the image
    share: Tensor  # bilinear weight
    slope_y: Tensor  # its derivatives
    slope_x: Tensor


def forward(value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
    """value [B S h d], locations [B Q h L P 2], weights [B Q h L P], mask [B Q] or None, sizes (H, W, H, W, …) of the
    levels -> [B Q hd], dtype of value.
    """
    (B, _, h, d), Q, taps = value.shape, weights.shape[1], weights.shape[3] * weights.shape[4]
    rows, weights = _rows(value), attended(weights.to(wide(value)), mask)
    out = rows.new_zeros(B * Q * h, 1, d)
    for corner in _corners(value, locations, mask, sizes):
        out = out + torch.bmm((corner.share * weights).reshape(-1, 1, taps), _gather(rows, corner.row, taps))
    return out.reshape(B, Q, h * d).to(value.dtype)


def backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [B Q hd] -> gradients of value, locations and weights."""
    (B, S, h, d), Q, taps = value.shape, weights.shape[1], weights.shape[3] * weights.shape[4]
    rows, share_of = _rows(value), attended(weights.to(wide(value)), mask)
    slopes = attended(grad.to(rows.dtype), mask).reshape(B * Q * h, 1, d)
    grad_rows = torch.zeros_like(rows)
    grad_weights = grad_y = grad_x = torch.zeros_like(share_of)
    for corner in _corners(value, locations, mask, sizes):
        product = torch.bmm(_gather(rows, corner.row, taps), slopes.transpose(1, 2)).reshape(share_of.shape)
        grad_weights = grad_weights + corner.share * product
        grad_y = grad_y + corner.slope_y * product
        grad_x = grad_x + corner.slope_x * product
        part = torch.bmm((corner.share * share_of).reshape(-1, taps, 1), slopes)  # N LP d
        grad_rows = grad_rows.index_add(0, corner.row.reshape(-1), part.reshape(B * Q * h * taps, d))
    return (
        grad_rows[: B * S * h].reshape(value.shape).to(value.dtype),
        to_locations(grad_y * share_of, grad_x * share_of, sizes).to(locations.dtype),
        grad_weights.to(weights.dtype),
    )


def wide(value: Tensor) -> torch.dtype:
    """The dtype of positions and sums."""
    return torch.promote_types(value.dtype, torch.float32)


def attended(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B Q …], 0 where `mask` [B Q] is False."""
    return x if mask is None else torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - 2)), x, torch.zeros_like(x))


def levels(sizes: tuple[int, ...]) -> Iterator[tuple[int, int, int, int]]:
    """(number, height, width, first pixel) of each level."""
    first = 0
    for level, (height, width) in enumerate(zip(sizes[::2], sizes[1::2])):
        yield level, height, width, first
        first += height * width


def place(locations: Tensor, mask: Tensor | None, height: int, width: int) -> Place:
    """Of one level's locations [B Q h P 2], of the wide dtype."""
    x, y = (locations[..., i] * size - 0.5 for i, size in enumerate((width, height)))
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)  # false for NaN
    if mask is not None:
        inside = inside & mask[:, :, None, None]
    y, x = (torch.where(inside, t, torch.zeros_like(t)) for t in (y, x))
    row, column = torch.floor(y), torch.floor(x)
    return Place(inside, row, column, y - row, x - column)


def to_locations(grad_y: Tensor, grad_x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Gradients of positions in pixels, [B Q h L P] each -> of locations [B Q h L P 2]."""
    scaled = [
        torch.stack([of_level(grad_x, level) * width, of_level(grad_y, level) * height], -1)
        for level, height, width, _ in levels(sizes)
    ]
    return all_levels(scaled)


def of_level(x: Tensor, level: int) -> Tensor:
    """[B Q h L …] -> [B Q h …]; a view where there is one level only."""
    return x[:, :, :, level] if x.shape[3] > 1 else x.squeeze(3)


def all_levels(parts: Sequence[Tensor]) -> Tensor:
    """[B Q h …] of every level -> [B Q h L …]; a view where there is one level only."""
    return torch.stack(tuple(parts), 3) if len(parts) > 1 else parts[0].unsqueeze(3)


def _rows(value: Tensor) -> Tensor:
    """[B S h + 1, d] of the wide dtype: every head's pixels, and a row of zeros that stands for all outside."""
    B, S, h, d = value.shape
    rows = value.to(wide(value)).reshape(B * S * h, d)
    return torch.cat([rows, rows.new_zeros(1, d)])


def _gather(rows: Tensor, index: Tensor, taps: int) -> Tensor:
    """[N taps d]."""
    return rows.index_select(0, index.reshape(-1)).reshape(index.numel() // taps, taps, rows.shape[1])


def _corners(value: Tensor, locations: Tensor, mask: Tensor | None, sizes: tuple[int, ...]) -> list[Corner]:
    (B, S, h, _), device = value.shape, value.device
    locations = locations.to(wide(value))
    image = torch.arange(B, device=device)[:, None, None, None] * S
    head = torch.arange(h, device=device)[:, None]
    corners: list[list[Corner]] = [[], [], [], []]
    for level, height, width, first in levels(sizes):
        inside, top, left, y, x = place(of_level(locations, level), mask, height, width)
        for i, share_y in enumerate((1 - y, y)):
            for j, share_x in enumerate((1 - x, x)):
                row, column = top.long() + i, left.long() + j
                there = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
                pixel = (image + first + row * width + column) * h + head
                index = torch.where(there, pixel, torch.full_like(pixel, B * S * h))
                corner = Corner(index, share_y * share_x, (2 * i - 1) * share_x, (2 * j - 1) * share_y)
                corners[2 * i + j].append(corner)
    return [Corner(*map(all_levels, zip(*made))) for made in corners]
