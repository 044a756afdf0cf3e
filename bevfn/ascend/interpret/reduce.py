"""Reductions along axes, cumulative sums.

Source: hicann/ops-math at c4193324, math/*/op_graph; torchair's ge_ir.proto.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bevfn.ascend.interpret.node import (
    Invalid,
    Unsupported,
    fixed,
    floating,
    ints,
    of_dtype,
    one_int,
    only,
    same_dtype,
    wide,
)


def along(function: Callable[[Tensor, list[int], bool], Tensor], *dtypes: torch.dtype) -> Callable[..., Tensor]:
    """A reduction along the axes of an operand; of one of `dtypes`, if any are given."""

    def apply(x: Tensor, axes: Tensor, *, keep_dims: bool = False) -> Tensor:
        if dtypes:
            of_dtype(x, *dtypes)
        places = ints(axes)
        if not places and x.dim():
            raise Unsupported("no axes: which ones are then reduced depends on the chip")
        return function(x, places, keep_dims) if x.dim() else x

    return apply


def reduce_mean(x: Tensor, axes: Tensor, *, keep_dims: bool = False, noop_with_empty_axes: bool = True) -> Tensor:
    floating(x)
    places = ints(axes)
    if not places and noop_with_empty_axes:
        return x
    return x.mean(places, keepdim=keep_dims)  # torch reduces all axes where none is named


def _prod(x: Tensor, axes: list[int], keep_dims: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep_dims, dtype=x.dtype)
    return x


@fixed(invert=False, unbiased=True)
def reduce_std_with_mean(
    x: Tensor,
    mean: Tensor,
    *,
    dim: list[int] = [],  # noqa: B006
    keepdim: bool = False,
    epsilon: float = 0.001,
    correction: int = 1,
) -> Tensor:
    """Root of the sum of (x - mean)^2 over (n - correction), mean being as large as x; epsilon is invert's."""
    same_dtype(x, mean)
    floating(x)
    if x.shape != mean.shape:
        raise Invalid(f"mean {list(mean.shape)} must have the shape of x {list(x.shape)}")
    places = dim or list(range(x.dim()))
    count = 1
    for place in places:
        count *= x.shape[place]
    centred = x.to(wide(x.dtype)) - mean.to(wide(x.dtype))
    return ((centred * centred).sum(places, keepdim=keepdim) / max(count - correction, 0)).sqrt().to(x.dtype)


def lp_norm_v2(
    x: Tensor,
    *,
    p: float = 2.0,
    axes: list[int] = [],  # noqa: B006
    keepdim: bool = False,
    epsilon: float = 1e-12,
) -> Tensor:
    """p-norm along axes, none meaning all. Where epsilon enters is not published."""
    only("epsilon", epsilon, 0.0)
    floating(x)
    return torch.linalg.vector_norm(x, p, axes or None, keepdim)


def arg_with_value(function: Callable) -> Callable[..., tuple[Tensor, Tensor]]:
    """ArgMaxWithValue, ArgMinWithValue -> indices, values: indices come first. Of equal values the first one counts."""

    def apply(
        x: Tensor, *, dimension: int, keep_dims: bool = False, indice_dtype: torch.dtype = torch.int32
    ) -> tuple[Tensor, Tensor]:
        index = function(x, dimension, keepdim=True)
        value = x.gather(dimension, index)
        index = index.to(indice_dtype)
        return (index, value) if keep_dims else (index.squeeze(dimension), value.squeeze(dimension))

    return apply


def arg(function: Callable) -> Callable[..., Tensor]:
    """ArgMin, ArgMaxV2: of equal values the first one counts."""

    def apply(x: Tensor, dimension: Tensor, *, dtype: torch.dtype = torch.int64) -> Tensor:
        return function(x, one_int(dimension)).to(dtype)

    return apply


def cumsum(x: Tensor, axis: Tensor, *, exclusive: bool = False, reverse: bool = False) -> Tensor:
    place = one_int(axis)
    x = x.flip(place) if reverse else x
    y = x.cumsum(place, dtype=x.dtype)
    if exclusive:
        y = torch.cat([torch.zeros_like(y.narrow(place, 0, 1)), y.narrow(place, 0, y.shape[place] - 1)], place)
    return y.flip(place) if reverse else y


OPS: dict[str, Callable] = {
    "ReduceSum": along(lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype)),
    "ReduceMax": along(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "ReduceMin": along(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "ReduceProd": along(_prod),
    "ReduceAll": along(lambda x, axes, keep: torch.all(x, axes, keepdim=keep), torch.bool),
    "ReduceAny": along(lambda x, axes, keep: torch.any(x, axes, keepdim=keep), torch.bool),
    "ReduceLogSumExp": along(lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
    "ReduceMean": reduce_mean,
    "ReduceStdWithMean": reduce_std_with_mean,
    "LpNormV2": lp_norm_v2,
    "ArgMaxWithValue": arg_with_value(torch.argmax),
    "ArgMinWithValue": arg_with_value(torch.argmin),
    "ArgMaxV2": arg(torch.argmax),
    "ArgMin": arg(torch.argmin),
    "Cumsum": cumsum,
}
