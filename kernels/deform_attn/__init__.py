"""Multi-scale deformable attention: every query and head sums bilinear samples at its own places of images, weighted.

out[b, q, h] = sum over l, p of weights[b, q, h, l, p] * value_l[b, h](locations[b, q, h, l, p])
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bevfn.kernels.cuda import lowering
from bevfn.kernels.deform_attn import cpu, reference
from bevfn.kernels.derivatives import differentiable

_SIGNATURE = "Tensor value, Tensor locations, Tensor weights, Tensor? mask, int[] sizes"
_library = torch.library.Library("bevfn", "FRAGMENT")
_library.define(f"deform_attn({_SIGNATURE}) -> Tensor")
_library.define(f"deform_attn_backward(Tensor grad, {_SIGNATURE}) -> (Tensor, Tensor, Tensor)")


def deform_attn(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    *,
    sizes: tuple[tuple[int, int], ...],
) -> Tensor:
    """Attends to samples of images. Any derivative in `value`, `locations`, `weights` (`kernels.derivatives`).

    Location (x, y) of a level of H rows and W columns is column x W - 1/2 and row y H - 1/2 (align_corners=False). A
    sample counts if -1 < row < H and -1 < column < W, and a corner of its bilinear patch outside the image is 0, as in
    mmcv. At whole positions the gradient of the position is the one-sided one towards larger coordinates.

    Args:
        value: [B S h d] float; S = sum of H W over the levels, one level after the other, each row by row.
        locations: [B Q h L P 2] float, (x, y), 0 .. 1 inside the image.
        weights: [B Q h L P] float, as they are: a softmax over L P in the paper.
        mask: [B Q] bool or None. Rows where it is False are 0, whatever their operands hold, and neither take nor give
            a gradient; on a CPU they cost nothing.
        sizes: (H, W) of each of the L levels.

    Returns:
        [B Q hd], dtype of value, head by head. Positions, samples and sums are float32 (float64 for float64) and, on a
        CPU, in an order that does not depend on the number of threads.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Source: Zhu et al. 2020 (arXiv 2010.04159) section 4.1; mmcv/ops/multi_scale_deform_attn.py.
    """
    _check(value, locations, weights, mask, sizes)
    return _deform_attn(value, locations, weights, mask, *(n for size in sizes for n in size))


def _check(
    value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, sizes: tuple[tuple[int, int], ...]
) -> None:
    if value.dim() != 4 or locations.dim() != 6:
        raise ValueError(
            f"deform_attn needs value [B S h d] and locations [B Q h L P 2], got {list(value.shape)} and "
            f"{list(locations.shape)}."
        )
    if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise ValueError(f"deform_attn: sizes {sizes} must be (H, W) of each level, at least one level and one pixel.")
    (B, S, h, d), (_, Q, _, _, P, _), L = value.shape, locations.shape, len(sizes)
    if min(h, d, P) < 1:
        raise ValueError(
            f"deform_attn needs at least one head, channel and point, got value {list(value.shape)} and locations "
            f"{list(locations.shape)}."
        )
    if sum(height * width for height, width in sizes) != S:
        raise ValueError(
            f"deform_attn: value {list(value.shape)} must be [B S h d] with S = "
            f"{sum(height * width for height, width in sizes)}, the pixels of sizes {sizes}."
        )
    if tuple(locations.shape) != (B, Q, h, L, P, 2):
        raise ValueError(
            f"deform_attn: locations {list(locations.shape)} must be [B Q h L P 2] = [{B} Q {h} {L} P 2] as value "
            f"{list(value.shape)} and {L} sizes say."
        )
    if tuple(weights.shape) != (B, Q, h, L, P):
        raise ValueError(
            f"deform_attn: weights {list(weights.shape)} must be [B Q h L P] = [{B} {Q} {h} {L} {P}] as locations say."
        )
    if mask is not None and tuple(mask.shape) != (B, Q):
        raise ValueError(f"deform_attn: mask {list(mask.shape)} must be [B Q] = [{B} {Q}] as locations say.")
    for name, tensor in (("value", value), ("locations", locations), ("weights", weights)):
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"deform_attn: {name} must be floating, got {tensor.dtype}.")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"deform_attn: mask must be bool, got {mask.dtype}; compare it with 0.")
    for name, other in (("locations", locations), ("weights", weights), ("mask", mask)):
        if other is not None and other.device != value.device:
            raise ValueError(f"deform_attn: {name} must be on value's device {value.device}, got {other.device}.")


# Heights and widths are operands of their own here: forward over reverse mode takes no tuple in a Function's operands.
def _operator(value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, *sizes: int) -> Tensor:
    return torch.ops.bevfn.deform_attn(value, locations, weights, mask, sizes)


def _gradients(wanted: frozenset[int], *operands: Any) -> tuple[Tensor | None, ...]:
    tensors, sizes = operands[:5], operands[5:]
    return *torch.ops.bevfn.deform_attn_backward(*tensors, sizes), None, *(None for _ in sizes)


def _plain(value: Tensor, locations: Tensor, weights: Tensor, mask: Tensor | None, *sizes: int) -> Tensor:
    return reference.forward(value, locations, weights, mask, sizes)


_deform_attn = differentiable(_operator, _gradients, _plain)


@torch.library.register_fake("bevfn::deform_attn", lib=_library)
def _forward_fake(value: Tensor, locations: Tensor, *_: Any) -> Tensor:
    return value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])


@torch.library.register_fake("bevfn::deform_attn_backward", lib=_library)
def _backward_fake(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _cuda() -> ModuleType:
    from bevfn.kernels.deform_attn import cuda  # needs Triton

    return cuda


_library.impl("deform_attn", reference.forward, "CompositeExplicitAutograd")
_library.impl("deform_attn_backward", reference.backward, "CompositeExplicitAutograd")
_library.impl("deform_attn", cpu.forward, "CPU")
_library.impl("deform_attn_backward", cpu.backward, "CPU")
_library.impl("deform_attn", lowering(_cuda, "forward", reference.forward), "CUDA")
_library.impl("deform_attn_backward", lowering(_cuda, "backward", reference.backward), "CUDA")
