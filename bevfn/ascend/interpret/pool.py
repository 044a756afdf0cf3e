"""Pooling of images in NCHW.

Source: torchair's ge_ir.proto; hicann/ops-nn at e5c3fa93, pooling/avg_pool_v2/op_graph.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bevfn.ascend.interpret.node import (
    Invalid,
    Opaque,
    Unsupported,
    fixed,
    image,
    ints,
    of_dtype,
    same_dtype,
    wide,
)


@dataclass(frozen=True)
class Window:
    size: list[int]
    stride: list[int]
    pad: list[int]
    dilation: list[int]
    ceil_mode: bool


@dataclass(frozen=True, eq=False)
class Argmax(Opaque):
    """Where each maximum was, in bits that only the gradient's kernel can read."""

    flat: Tensor  # torch's index, in place of the device's bits
    shape: torch.Size  # of the pooled tensor's source
    window: Window

    def __str__(self) -> str:
        return "MaxPoolWithArgmaxV1's argmax, which is no index: only MaxPoolGradWithArgmaxV1 can read it"


def _window(
    ksize: list[int], strides: list[int], pads: list[int], dilation: list[int], ceil_mode: bool, layout: str
) -> Window:
    """The meaningful pair stands in the middle, [1 h w 1], of pads too, whatever the layout."""
    image(layout)
    for values in (ksize, strides, pads, dilation):
        if len(values) != 4 or values[0] != 1 or values[3] != 1:
            raise Unsupported(f"ksize {ksize}, strides {strides}, pads {pads}, dilation {dilation}: not [1 h w 1]")
    return Window(ksize[1:3], strides[1:3], pads[1:3], dilation[1:3], ceil_mode)


@fixed(dtype=3)
def max_pool_with_argmax_v1(
    x: Tensor,
    *,
    ksize: list[int],
    strides: list[int],
    pads: list[int],
    dilation: list[int] = [1, 1, 1, 1],  # noqa: B006
    ceil_mode: bool = False,
    image_layout: str,
) -> tuple[Tensor, Argmax]:
    """Maxima, and an argmax for the gradient. Of equal values the first one counts, as in torch (not published)."""
    w = _window(ksize, strides, pads, dilation, ceil_mode, image_layout)
    y, flat = torch.ops.aten.max_pool2d_with_indices(x, w.size, w.stride, w.pad, w.dilation, w.ceil_mode)
    return y, Argmax(flat, x.shape, w)


@fixed(dtype=3)
def max_pool_grad_with_argmax_v1(
    x: Tensor,
    grad: Tensor,
    argmax: Argmax,
    *,
    ksize: list[int],
    strides: list[int],
    pads: list[int],
    dilation: list[int] = [1, 1, 1, 1],  # noqa: B006
    ceil_mode: bool = False,
    image_layout: str,
) -> Tensor:
    same_dtype(x, grad)
    w = _window(ksize, strides, pads, dilation, ceil_mode, image_layout)
    if not isinstance(argmax, Argmax) or argmax.window != w or argmax.shape != x.shape:
        raise Invalid("argmax is not of a MaxPoolWithArgmaxV1 of the same window and source")
    return torch.ops.aten.max_pool2d_with_indices_backward(
        grad.contiguous(), x, w.size, w.stride, w.pad, w.dilation, w.ceil_mode, argmax.flat
    )


CALCULATED = fixed(padding_mode="CALCULATED", data_format="NCHW", global_pooling=False)


def _average(
    ksize: list[int], strides: list[int], pads: list[int], layout: str
) -> tuple[list[int], list[int], list[int]]:
    """Size, stride and padding of an average's window."""
    if layout:
        image(layout)  # torchair does not mark the gradient's operands
    if len(ksize) != 4 or len(strides) != 4 or ksize[:2] != [1, 1] or strides[:2] != [1, 1]:
        raise Unsupported(f"ksize {ksize}, strides {strides}: not [1 1 h w]")
    if len(pads) != 4 or pads[0] != pads[1] or pads[2] != pads[3]:
        raise Unsupported(f"pads {pads} that differ by side")
    return ksize[2:], strides[2:], [pads[0], pads[2]]


@CALCULATED
def avg_pool_v2(
    x: Tensor,
    *,
    ksize: list[int],
    strides: list[int],
    pads: list[int] = [0, 0, 0, 0],  # noqa: B006
    ceil_mode: bool = False,
    exclusive: bool = True,
    divisor_override: int = 0,
    image_layout: str,
) -> Tensor:
    """exclusive: the padding does not count; divisor_override 0: none."""
    image(image_layout)
    window = _average(ksize, strides, pads, image_layout)
    return F.avg_pool2d(x.to(wide(x.dtype)), *window, ceil_mode, not exclusive, divisor_override or None).to(x.dtype)


@CALCULATED
def avg_pool_v2_grad(
    orig_input_shape: Tensor,
    input_grad: Tensor,
    *,
    ksize: list[int],
    strides: list[int],
    pads: list[int] = [0, 0, 0, 0],  # noqa: B006
    ceil_mode: bool = False,
    exclusive: bool = True,
    divisor_override: int = 0,
    image_layout: str,
) -> Tensor:
    of_dtype(orig_input_shape, torch.int32)
    window = _average(ksize, strides, pads, image_layout)
    grad = input_grad.to(wide(input_grad.dtype))
    x = torch.empty(ints(orig_input_shape), dtype=grad.dtype)  # only its shape is read
    return torch.ops.aten.avg_pool2d_backward(grad, x, *window, ceil_mode, not exclusive, divisor_override or None).to(
        input_grad.dtype
    )


OPS: dict[str, Callable] = {
    "MaxPoolWithArgmaxV1": max_pool_with_argmax_v1,
    "MaxPoolGradWithArgmaxV1": max_pool_grad_with_argmax_v1,
    "AvgPoolV2": avg_pool_v2,
    "AvgPoolV2Grad": avg_pool_v2_grad,
}
