"""`deform_attn` at BEVNeXt's size against its torch reference and mmcv's plain form, which is torch's grid_sample.

Every query of the BEV map looks at eight heights of its pillar. A nuScenes-like rig says where these lie in the six
images, and which queries a camera sees: "masked" attends with these alone, "all" with every query in every camera.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bevfn.bench import frame as frames
from bevfn.bench import machine
from bevfn.experiments import bevnext as recipe
from bevfn.experiments.bevdepth import fitted
from bevfn.heads import perspective
from bevfn.kernels.deform_attn import deform_attn, reference
from bevfn.models import bevnext

GRID, IMAGE_SIZE = 128, (256, 704)
STRIDE, HEADS = 8, 8  # image to feature pixels


def measure(
    frame: Path | None = None,
    *,
    grid: int = GRID,
    channels: int = 80,
    repeats: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict:
    """Milliseconds of forward, and of forward and backward: on a CPU with threads as torch is set, on a GPU of its clock.

    frame: folder of a key frame, whose cameras count; None: a generated one. grid: cells of the map along an axis; channels: of all heads.
    """
    generator = torch.Generator().manual_seed(0)
    locations, seen = places(grid, frame)
    size = (IMAGE_SIZE[0] // STRIDE, IMAGE_SIZE[1] // STRIDE)
    M, Q, P = locations.shape[:3]
    value = torch.randn(M, size[0] * size[1], HEADS, channels // HEADS, generator=generator)
    moved = 2 * torch.randn(M, Q, HEADS, 1, P, 2, generator=generator) / torch.tensor([size[1], size[0]])  # pixels
    weights = torch.randn(M, Q, HEADS, 1, P, generator=generator).softmax(-1)
    locations = (locations[:, :, None, None] + moved).clamp(-8, 8)  # far outside is outside, and finite in float16
    value, locations, weights = (t.to(device, dtype) for t in (value, locations, weights))
    figures: dict = {"seen_share": float(seen.float().mean())}
    for name, mask in (("masked", seen.to(device)), ("all", None)):
        figures[name] = _compared((value, locations, weights), mask, list(size), repeats)
    return figures


def places(grid: int, frame: Path | None = None) -> tuple[Tensor, Tensor]:
    """(locations [6 Q P 2], where 0 and 1 are the borders of each image; seen [6 Q]: a point of the pillar lies in it) of a
    key frame's rig (None: a generated one's), Q = grid^2."""
    lower, upper, _ = perspective.Config().x_m
    axis = (lower, upper, (upper - lower) / grid)
    config = perspective.Config(x_m=axis, y_m=axis)
    reading = fitted(recipe.Config(), bevnext.stage_one(), recipe.EVAL)
    locations, inside = perspective.anchors(frames.batch_of(frame, reading), config, IMAGE_SIZE)
    return locations[0], inside[0].any(-1)


def by_grid_sample(value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, sizes: list[int]) -> Tensor:
    """mmcv's formulation in plain torch: a grid_sample per level over images of one head each, then the weighted sum.

    In half precision it rounds the places once more, to hundredths of a pixel, and differs by percents.
    """
    (B, Q, h, _, P), d = weights.shape, value.shape[3]
    samples = []
    for level, height, width, first in reference.levels(tuple(sizes)):
        images = value[:, first : first + height * width].permute(0, 2, 3, 1).reshape(B * h, d, height, width)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).reshape(B * h, Q, P, 2)
        samples.append(F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    shares = weights.transpose(1, 2).reshape(B * h, 1, Q, -1)
    out = (torch.stack(samples, 3).flatten(3) * shares).sum(-1).reshape(B, h * d, Q).transpose(1, 2)
    return out if mask is None else out * mask[:, :, None]


def _ours(value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, sizes: list[int]) -> Tensor:
    return deform_attn(value, locations, weights, mask, sizes=tuple(zip(sizes[::2], sizes[1::2])))


class _Reference(torch.autograd.Function):
    """The plain-torch reference with its own backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, mask: Any, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(value, locations, weights, mask)
        ctx.sizes = sizes
        return reference.forward(value, locations, weights, mask, tuple(sizes))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, locations, weights, mask = ctx.saved_tensors
        return *reference.backward(grad, value, locations, weights, mask, tuple(ctx.sizes)), None, None


PEERS: dict[str, Callable[..., Tensor]] = {"ours": _ours, "reference": _Reference.apply, "grid_sample": by_grid_sample}


def _compared(operands: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, sizes: list[int], repeats: int) -> dict:
    figures: dict = {name: _figures(peer, operands, mask, sizes, repeats) for name, peer in PEERS.items()}
    ours, y = figures["ours"], _ours(*operands, mask, sizes)
    for name in list(PEERS)[1:]:
        for what in ("forward", "train"):
            ours[f"{what}_speedup_over_{name}"] = figures[name][f"{what}_ms"] / ours[f"{what}_ms"]
        difference = PEERS[name](*operands, mask, sizes) - y
        figures[name]["relative_difference"] = float(difference.float().norm() / y.float().norm())
    return figures


def _figures(
    peer: Callable, operands: tuple[Tensor, ...], mask: Tensor | None, sizes: list[int], repeats: int
) -> dict[str, float]:
    leaves = [t.detach().requires_grad_() for t in operands]

    def forward() -> Tensor:
        with torch.no_grad():
            return peer(*leaves, mask, sizes)

    def train() -> tuple[Tensor, ...]:
        y = peer(*leaves, mask, sizes)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    seconds = machine.seconds_on(operands[0].device.type, forward, train, repeats=repeats)
    return {name: 1e3 * s for name, s in zip(("forward_ms", "train_ms"), seconds)}
