"""CPU lowering of `deform_attn`: cpu.cpp in float32 or float64."""

import torch
from torch import Tensor

from bevfn.kernels import indices, native
from bevfn.kernels.deform_attn import reference


def forward(value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, sizes: list[int]) -> Tensor:
    """Shapes as in `reference.forward`."""
    operands = _plain(value, locations, weights, mask, sizes)
    out = torch.empty(*weights.shape[:2], value.shape[2] * value.shape[3], dtype=reference.wide(value))
    _run("forward", [*operands, out], value, weights, sizes)
    return out.to(value.dtype)


def backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in `reference.backward`."""
    operands, slopes = _plain(value, locations, weights, mask, sizes), grad.to(reference.wide(value)).contiguous()
    grads = [torch.empty(x.shape, dtype=slopes.dtype) for x in (value, locations, weights)]
    _run("backward", [slopes, *operands, *grads], value, weights, sizes)
    return grads[0].to(value.dtype), grads[1].to(locations.dtype), grads[2].to(weights.dtype)


def _plain(
    value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, sizes: list[int]
) -> list[Tensor | None]:
    heights, widths = sizes[::2], sizes[1::2]  # of a level, which has a border, and zeros behind the last one
    pixels = sum((H + 2) * (W + 2) for H, W in zip(heights, widths)) + max(widths) + 4
    indices.check("deform_attn", "pixels of an image's levels with their borders", pixels, smaller="image")
    floats = [x.to(reference.wide(value)).contiguous() for x in (value, locations, weights)]
    return [*floats, None if mask is None else mask.contiguous()]


def _run(name: str, tensors: list[Tensor | None], value: Tensor, weights: Tensor, sizes: list[int]) -> None:
    (B, _, h, d), (_, Q, _, L, P) = value.shape, weights.shape
    kind = "double" if reference.wide(value) == torch.float64 else "float"
    native.call("deform_attn", f"deform_attn_{name}_{kind}", *tensors, (B, Q, h, d, P, L, *sizes))
