"""Convolutions and their gradients in NCHW and NCDHW; half precision sums in float32 and rounds once.

strides and dilations are in the order of the layout (leading 1, 1), pads are begin and end of each image axis.
Source: hicann/ops-nn at e5c3fa93, conv/*/op_graph; torchair's ge_ir.proto.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bevfn.ascend.interpret.node import Invalid, Unsupported, fixed, image, ints, only, same_dtype, wide


@dataclass(frozen=True)
class Geometry:
    """Of the image axes only."""

    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]
    groups: int

    @property
    def even(self) -> bool:
        """Padded alike on both sides, as torch's convolutions are."""
        return self.before == self.after

    @property
    def padding(self) -> list[int]:
        return self.before if self.even else [0] * len(self.before)

    def padded(self, x: Tensor) -> Tensor:
        """x, padded unless the convolution itself does it."""
        if self.even:
            return x
        return F.pad(x, [size for pair in zip(reversed(self.before), reversed(self.after)) for size in pair])


def _geometry(
    axes: int, strides: list[int], pads: list[int], dilations: list[int], groups: int, layout: tuple[str, str]
) -> Geometry:
    """layout: data_format and the layout the operands are marked with."""
    wanted = {2: "NCHW", 3: "NCDHW"}[axes]
    only("data_format", layout[0], wanted)
    image(layout[1], wanted)
    dilations = dilations or [1] * (axes + 2)
    if len(strides) != axes + 2 or len(dilations) != axes + 2 or len(pads) != 2 * axes:
        raise Invalid(f"strides {strides}, dilations {dilations}, pads {pads} for {axes} image axes")
    if strides[:2] != [1, 1] or dilations[:2] != [1, 1] or min(pads) < 0:
        raise Unsupported(f"strides {strides}, dilations {dilations}, pads {pads} are not known")
    return Geometry(strides[2:], dilations[2:], pads[::2], pads[1::2], groups)


def forward(axes: int, default_format: str) -> Callable[..., Tensor]:
    """Conv2D, Conv3D: x [N C ...], filter [O C/groups ...] -> y [N O ...]."""

    @fixed(offset_x=0)
    def apply(
        x: Tensor,
        filter: Tensor,
        bias: Tensor | None = None,
        offset_w: None = None,
        *,
        strides: list[int],
        pads: list[int],
        dilations: list[int] = [],  # noqa: B006
        groups: int = 1,
        data_format: str = default_format,
        image_layout: str,
    ) -> Tensor:
        g = _geometry(axes, strides, pads, dilations, groups, (data_format, image_layout))
        same_dtype(x, filter)
        dtype = wide(x.dtype)
        wide_bias = None if bias is None else bias.to(dtype)
        y = torch.convolution(
            g.padded(x.to(dtype)), filter.to(dtype), wide_bias, g.strides, g.padding, g.dilations, False, [0], g.groups
        )
        return y.to(x.dtype)

    return apply


def input_gradient(axes: int, default_format: str) -> Callable[..., Tensor]:
    """Conv2DBackpropInput, Conv3DBackpropInput; input_size is the shape of x."""

    def apply(
        input_size: Tensor,
        filter: Tensor,
        out_backprop: Tensor,
        *,
        strides: list[int],
        pads: list[int],
        dilations: list[int] = [],  # noqa: B006
        groups: int = 1,
        data_format: str = default_format,
        image_layout: str,
    ) -> Tensor:
        g = _geometry(axes, strides, pads, dilations, groups, (data_format, image_layout))
        same_dtype(filter, out_backprop)
        size = ints(input_size)
        dtype = wide(filter.dtype)
        grown = size[:2] + [n + (0 if g.even else a + b) for n, a, b in zip(size[2:], g.before, g.after)]
        x = torch.empty(grown, dtype=dtype)  # only its shape is read
        dx = _backward(g, out_backprop.to(dtype), x, filter.to(dtype), [True, False, False])[0]
        for axis, (start, length) in enumerate(zip(g.before, size[2:])):
            dx = dx if g.even else dx.narrow(axis + 2, start, length)
        return dx.to(filter.dtype)

    return apply


def filter_gradient(axes: int, default_format: str) -> Callable[..., Tensor]:
    """Conv2DBackpropFilter, Conv3DBackpropFilter; filter_size is the shape of the filter.

    float32 whatever x is: `.OUTPUT(y, TensorType({DT_FLOAT}))` of the prototype in CANN 8.1.RC1's nn_calculation_ops.h.
    """

    def apply(
        x: Tensor,
        filter_size: Tensor,
        out_backprop: Tensor,
        *,
        strides: list[int],
        pads: list[int],
        dilations: list[int] = [],  # noqa: B006
        groups: int = 1,
        data_format: str = default_format,
        image_layout: str,
    ) -> Tensor:
        g = _geometry(axes, strides, pads, dilations, groups, (data_format, image_layout))
        same_dtype(x, out_backprop)
        dtype = wide(x.dtype)
        weight = torch.empty(ints(filter_size), dtype=dtype)  # only its shape is read
        dw = _backward(g, out_backprop.to(dtype), g.padded(x.to(dtype)), weight, [False, True, False])[1]
        return dw.float()

    return apply


def _backward(g: Geometry, grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    return torch.ops.aten.convolution_backward(
        grad.contiguous(), x, weight, None, g.strides, g.padding, g.dilations, False, [0], g.groups, wanted
    )


@fixed(offset_x=0)
def conv2d_transpose(
    input_size: Tensor,
    x: Tensor,
    filter: Tensor,
    bias: Tensor | None = None,
    offset_w: None = None,
    *,
    strides: list[int],
    pads: list[int],
    dilations: list[int] = [],  # noqa: B006
    groups: int = 1,
    data_format: str = "NHWC",
    output_padding: list[int] = [0, 0, 0, 0],  # noqa: B006
    image_layout: str,
) -> Tensor:
    """The input gradient of a convolution as an operator of its own; input_size is the shape of the result."""
    g = _geometry(2, strides, pads, dilations, groups, (data_format, image_layout))
    if not g.even or output_padding[:2] != [0, 0]:
        raise Unsupported(f"pads {pads} that differ by side, or output_padding {output_padding}")
    same_dtype(x, filter)
    dtype = wide(x.dtype)
    wide_bias = None if bias is None else bias.to(dtype)
    y = torch.convolution(
        x.to(dtype), filter.to(dtype), wide_bias, g.strides, g.padding, g.dilations, True, output_padding[2:], g.groups
    )
    if list(y.shape) != ints(input_size):
        raise Invalid(f"input_size {ints(input_size)}, but the convolution gives {list(y.shape)}")
    return y.to(x.dtype)


OPS: dict[str, Callable] = {
    "Conv2D": forward(2, "NHWC"),
    "Conv3D": forward(3, "NDHWC"),
    "Conv2DBackpropInput": input_gradient(2, "NHWC"),
    "Conv3DBackpropInput": input_gradient(3, "NDHWC"),
    "Conv2DBackpropFilter": filter_gradient(2, "NHWC"),
    "Conv3DBackpropFilter": filter_gradient(3, "NDHWC"),
    "Conv2DTranspose": conv2d_transpose,
}
