"""`deform_attn` for Ascend: one gather of all samples' quads of pixels, weighted and summed by one batched product.

A table holds, for every place that the pixel above and to the left of a sample can have, all four pixels around it:
four times the image, which is small, for a quarter of the gathered rows and indices, each four times as long (160
bytes in BEVNeXt). The gathered quads are stored (1.0 GB per BEVNeXt sample in float32), of a few images at a time (`kernels.parts`). `mask` skips nothing here: rows
where it is False read zeros.

Axes as in `reference`: B images, h heads of d channels, Q queries, L levels, P points, N = B Q h; F places of a table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bevfn.kernels.deform_attn import reference
from bevfn.kernels.parts import joined, parts

INDEX = 1 << 31  # what an int32 index reaches


class Samples(NamedTuple):
    """[B Q h L P] each."""

    row: Tensor  # int32, of the sample's quad in the table; a spare row of zeros where it does not count
    y: Tensor  # how far the sample is from the quad's first pixel, 0 .. 1 pixels
    x: Tensor


def forward(value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, sizes: list[int]) -> Tensor:
    """As `reference.forward`."""
    if not _fits(value, weights, sizes):
        return reference.forward(value, locations, weights, mask, tuple(sizes))
    few = parts(_stored(value, weights), value, locations, weights, mask)
    return joined(_forward(v, places, w, m, sizes) for v, places, w, m in few)


def _forward(value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, sizes: list[int]) -> Tensor:
    (B, Q, h, _, _), d, order = weights.shape, value.shape[3], (0, 1)
    samples = _samples(value, locations, mask, sizes)
    quads = _table(value, weights, sizes, order).index_select(0, samples.row.reshape(-1))
    shares = _shares(samples, reference.attended(weights.to(quads.dtype), mask), order)
    out = torch.bmm(shares.reshape(B * Q * h, 1, -1), quads.reshape(B * Q * h, -1, d))
    return out.reshape(B, Q, h * d).to(value.dtype)


def backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.backward`: gradients of value, locations and weights."""
    if not _fits(value, weights, sizes):
        return reference.backward(grad, value, locations, weights, mask, tuple(sizes))
    few = parts(_stored(value, weights), grad, value, locations, weights, mask)
    found = [_backward(g, v, places, w, m, sizes) for g, v, places, w, m in few]
    grad_value, grad_locations, grad_weights = map(joined, zip(*found))
    return grad_value, grad_locations, grad_weights


def _backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    # The corners in another order than forward: GE merges equal gathers, and a merged one would stay in memory.
    (B, Q, h, L, P), d, order = weights.shape, value.shape[3], (1, 0)
    N, samples, table = B * Q * h, _samples(value, locations, mask, sizes), _table(value, weights, sizes, order)
    quads = table.index_select(0, samples.row.reshape(-1)).reshape(N, L * P * 4, d)
    slopes = reference.attended(grad.to(table.dtype), mask).reshape(N, 1, d)
    own = reference.attended(weights.to(table.dtype), mask)
    by_share = torch.bmm(quads, slopes.reshape(N, d, 1)).reshape(B, Q, h, L, P, 4)
    parts = torch.bmm(_shares(samples, own, order).reshape(N, -1, 1), slopes)  # N 4LP d
    rows = torch.zeros_like(table).index_add(0, samples.row.reshape(-1), parts.reshape(-1, 4 * d))

    (_, y, x), of = samples, {corner: by_share[..., k] for k, corner in enumerate(_corners(order))}
    upper, lower = (of[i, 0] + x * (of[i, 1] - of[i, 0]) for i in (0, 1))
    left, right = (of[0, j] + y * (of[1, j] - of[0, j]) for j in (0, 1))
    return (
        _fold(rows, value, sizes, order).to(value.dtype),
        reference.to_locations((lower - upper) * own, (right - left) * own, tuple(sizes)).to(locations.dtype),
        (upper + y * (lower - upper)).to(weights.dtype),
    )


def _stored(value: Tensor, weights: Tensor) -> int:
    """Bytes of one image's gathered quads."""
    return weights.shape[1:].numel() * 4 * value.shape[3] * reference.wide(value).itemsize


def _corners(order: tuple[int, int]) -> list[tuple[int, int]]:
    """(row, column) of a quad's pixels, each 0 or 1."""
    return [(i, j) for i in order for j in order]


def _shares(samples: Samples, own: Tensor, order: tuple[int, int]) -> Tensor:
    """[B Q h L P 4], bilinear weights of a quad's pixels times the sample's own weight."""
    by_row, by_column = ((1 - samples.y) * own, samples.y * own), (1 - samples.x, samples.x)
    return torch.stack([by_row[i] * by_column[j] for i, j in _corners(order)], -1)


def _places(sizes: list[int]) -> int:
    """F: one more than the level has rows times one more than it has columns."""
    return sum((height + 1) * (width + 1) for _, height, width, _ in reference.levels(tuple(sizes)))


def _fits(value: Tensor, weights: Tensor, sizes: list[int]) -> bool:
    """Whether there is something to do, in a table that int32 reaches."""
    (B, _, h, d), Q = value.shape, weights.shape[1]
    return weights.numel() > 0 and (B * _places(sizes) * h + Q) * 4 * d < INDEX


def _table(value: Tensor, weights: Tensor, sizes: list[int], order: tuple[int, int]) -> Tensor:
    """[B F h + Q, 4d] of the wide dtype: the quads, and Q rows of zeros, over which samples that do not count spread."""
    (B, _, h, d), made = value.shape, []
    for _, height, width, first in reference.levels(tuple(sizes)):
        image = value[:, first : first + height * width].to(reference.wide(value)).reshape(B, height, width, h * d)
        image = F.pad(image, (0, 0, 1, 1, 1, 1))
        corners = [image[:, i : i + height + 1, j : j + width + 1] for i, j in _corners(order)]
        made.append(torch.stack([c.reshape(B, (height + 1) * (width + 1), h, d) for c in corners], 3))
    quads = torch.cat(made, 1).reshape(-1, 4 * d)
    return torch.cat([quads, quads.new_zeros(weights.shape[1], 4 * d)])


def _fold(rows: Tensor, value: Tensor, sizes: list[int], order: tuple[int, int]) -> Tensor:
    """The transpose of `_table`: [B F h + Q, 4d] -> [B S h d]."""
    B, _, h, d = value.shape
    quads = rows[: B * _places(sizes) * h].reshape(B, -1, h, 4, d)
    made, place = [], 0
    for _, height, width, _ in reference.levels(tuple(sizes)):
        size = (height + 1) * (width + 1)
        level = quads[:, place : place + size].reshape(B, height + 1, width + 1, h, 4, d)
        sums = level.new_zeros(B, height, width, h, d)
        for k, (i, j) in enumerate(_corners(order)):
            sums = sums + level[:, 1 - i : 1 - i + height, 1 - j : 1 - j + width, :, k]
        made.append(sums.reshape(B, height * width, h, d))
        place += size
    return torch.cat(made, 1)


def _samples(value: Tensor, locations: Tensor, mask: Tensor | None, sizes: list[int]) -> Samples:
    (B, _, h, _), Q, device = value.shape, locations.shape[1], value.device
    locations, places = locations.to(reference.wide(value)), _places(sizes)
    image = torch.arange(B, dtype=torch.int32, device=device)[:, None, None, None] * places
    head = torch.arange(h, dtype=torch.int32, device=device)[:, None]
    spare = torch.arange(Q, dtype=torch.int32, device=device)[:, None, None] + B * places * h
    made, first = [], 0
    for level, height, width, _ in reference.levels(tuple(sizes)):
        inside, top, left, y, x = reference.place(reference.of_level(locations, level), mask, height, width)
        quad = top.to(torch.int32) * (width + 1) + left.to(torch.int32) + (image + first + width + 2)
        made.append(Samples(torch.where(inside, quad * h + head, spare), y, x))
        first += (height + 1) * (width + 1)
    return Samples(*map(reference.all_levels, zip(*made)))


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.bevfn.deform_attn.default: forward,
    torch.ops.bevfn.deform_attn_backward.default: backward,
}
