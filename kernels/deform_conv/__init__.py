"""Deformable convolution: a convolution whose taps are bilinear samples at learned offsets, optionally weighted.

    y[b, o, p] = sum over k, c of weight[o, c, k] * mask[b, k, p] * x[b, c](p * stride - padding + k * dilation + offset[b, k, p])

Without a mask it is version 1 (mmcv's DCN, BEVDepth's depth net), with one version 2 (DCNv2).
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bevfn.kernels.cuda import lowering
from bevfn.kernels.deform_conv import cpu, reference
from bevfn.kernels.derivatives import differentiable

_SIGNATURE = "Tensor x, Tensor offset, Tensor? mask, Tensor weight, int stride, int padding, int dilation"
_library = torch.library.Library("bevfn", "FRAGMENT")
_library.define(f"deform_conv({_SIGNATURE}) -> Tensor")
_library.define(f"deform_conv_backward(Tensor grad, {_SIGNATURE}) -> (Tensor, Tensor, Tensor, Tensor)")


def deform_conv(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """Convolves x at displaced positions. Any derivative in `x`, `offset`, `mask`, `weight`.

    A sample counts if -1 < row < H and -1 < column < W, and a corner of its bilinear patch outside the image is 0, as
    in mmcv. At whole positions the gradient of the position is the one-sided one towards larger coordinates.

    Args:
        x: [B C H W] float. Memory is cheapest in channels-last format.
        offset: [B 2DK H' W'] float, in pixels: for each of D deformable groups (of C / D channels each) and each of the
            K = kh kw taps, row by row, first the displacement of the row, then of the column. D is read off its shape.
        mask: [B DK H' W'] float, the weight of each sample, or None for ones.
        weight: [O C/G kh kw] in the dtype of x; G groups are read off its shape.
        stride, padding, dilation: of both axes; padding is zeros.

    Returns:
        [B O H' W'], dtype of x, contiguous. Positions, samples and sums are float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Source: Dai et al. 2017 (arXiv 1703.06211), Zhu et al. 2019 (arXiv 1811.11168); mmcv/ops/deform_conv.py.
    """
    _check(x, offset, mask, weight, stride, padding, dilation)
    return _deform_conv(x, offset, mask, weight, stride, padding, dilation)


def _check(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, stride: int, padding: int, dilation: int
) -> None:
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"deform_conv needs x [B C H W] and weight [O C/G kh kw], got {list(x.shape)} and {list(weight.shape)}."
        )
    B, C = x.shape[:2]
    O, channels = weight.shape[:2]
    if channels == 0 or C % channels or O % (C // channels):
        raise ValueError(
            f"deform_conv: weight {list(weight.shape)} must be [O C/G kh kw] with G dividing O and x's C = {C}."
        )
    if stride < 1 or dilation < 1 or padding < 0:
        raise ValueError(
            f"deform_conv: stride {stride} and dilation {dilation} must be at least 1, padding {padding} at least 0."
        )
    out = reference.out_size(x, weight, stride, padding, dilation)
    if min(out) < 1 or min(x.shape[2:]) < 1:
        raise ValueError(
            f"deform_conv: an image of {list(x.shape[2:])} with padding {padding} is smaller than the kernel "
            f"{list(weight.shape[2:])} with dilation {dilation}."
        )
    taps = weight.shape[2] * weight.shape[3]
    groups = offset.shape[1] // (2 * taps) if offset.dim() == 4 else 0
    if groups == 0 or tuple(offset.shape) != (B, 2 * groups * taps, *out) or C % groups:
        raise ValueError(
            f"deform_conv: offset {list(offset.shape)} must be [B 2DK H' W'] = [{B} D*{2 * taps} {out[0]} {out[1]}], "
            f"D dividing C = {C}."
        )
    if mask is not None and tuple(mask.shape) != (B, groups * taps, *out):
        raise ValueError(
            f"deform_conv: mask {list(mask.shape)} must be [B DK H' W'] = [{B} {groups * taps} {out[0]} {out[1]}] as "
            "offset says."
        )
    if not x.dtype.is_floating_point or x.dtype != weight.dtype:
        raise ValueError(f"deform_conv: x and weight must share one floating dtype, got {x.dtype} and {weight.dtype}.")
    for name, tensor in (("offset", offset), ("mask", mask), ("weight", weight)):
        if tensor is not None and not (tensor.dtype.is_floating_point and tensor.device == x.device):
            raise ValueError(
                f"deform_conv: {name} must be floating and on x's device {x.device}, got {tensor.dtype} on "
                f"{tensor.device}."
            )


def _operator(*operands: Any) -> Tensor:
    return torch.ops.bevfn.deform_conv(*operands)


def _gradients(wanted: frozenset[int], grad: Tensor, *operands: Any) -> tuple[Tensor | None, ...]:
    return *torch.ops.bevfn.deform_conv_backward(grad, *operands), None, None, None


_deform_conv = differentiable(_operator, _gradients, reference.forward)


@torch.library.register_fake("bevfn::deform_conv", lib=_library)
def _forward_fake(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, stride: int, padding: int, dilation: int
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *reference.out_size(x, weight, stride, padding, dilation))


@torch.library.register_fake("bevfn::deform_conv_backward", lib=_library)
def _backward_fake(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *_: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_mask = offset.new_empty(0) if mask is None else mask.new_empty(mask.shape)
    return x.new_empty(x.shape), offset.new_empty(offset.shape), grad_mask, weight.new_empty(weight.shape)


def _cuda() -> ModuleType:
    from bevfn.kernels.deform_conv import cuda  # needs Triton

    return cuda


_library.impl("deform_conv", reference.forward, "CompositeExplicitAutograd")
_library.impl("deform_conv_backward", reference.backward, "CompositeExplicitAutograd")
_library.impl("deform_conv", cpu.forward, "CPU")
_library.impl("deform_conv_backward", cpu.backward, "CPU")
_library.impl("deform_conv", lowering(_cuda, "forward", reference.forward), "CUDA")
_library.impl("deform_conv_backward", lowering(_cuda, "backward", reference.backward), "CUDA")
