"""Shapes, copies and constants: views, layout, joining and splitting, padding, slicing, filling.

Tensors have no strides: every result is contiguous in the stated order. Source: hicann/ops-math at c4193324,
conversion/*/op_graph; torchair's ge_ir.proto.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bevfn.ascend.interpret.node import (
    Invalid,
    Unsupported,
    fixed,
    floating,
    ints,
    of_dtype,
    one_int,
    poison,
    same_dtype,
)

# ------------------------------------------------------------------------------------------------- shapes and copies


def identity(x: Tensor) -> Tensor:
    """The same value; unlike TensorMove's, its memory need not be new."""
    return x


def tensor_move(x: Tensor) -> Tensor:
    """A copy in memory of its own, which a node may then write in place."""
    return x.clone(memory_format=torch.contiguous_format)


def bitcast(x: Tensor, *, type: torch.dtype) -> Tensor:
    """The same bits read as another dtype; here of the same size, so that the shape stays."""
    if x.dtype.itemsize != type.itemsize:
        raise Unsupported(f"from {x.dtype.itemsize} to {type.itemsize} bytes per element")
    return x.contiguous().view(type)


def shape(x: Tensor, *, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(list(x.shape), dtype=dtype)


@fixed(axis=0, num_axes=-1)
def reshape(x: Tensor, shape: Tensor) -> Tensor:
    sizes = ints(shape)
    if 0 in sizes and x.numel():
        raise Unsupported(f"a size of 0 in the shape {sizes} of a tensor that is not empty")
    return x.reshape(sizes)


def transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(ints(perm))


def unsqueeze(x: Tensor, *, axes: list[int] = []) -> Tensor:  # noqa: B006
    """axes refer to the result."""
    rank = x.dim() + len(axes)
    places = sorted(_place(axis, rank) for axis in axes)
    if len(set(places)) != len(axes):
        raise Invalid(f"axes {axes} repeat")
    for place in places:
        x = x.unsqueeze(place)
    return x


def _place(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise Invalid(f"axis {axis} is not one of {rank}")
    return axis % rank


def expand_dims(x: Tensor, axis: Tensor) -> Tensor:
    return x.unsqueeze(one_int(axis))


def squeeze(x: Tensor, *, axis: list[int] = []) -> Tensor:  # noqa: B006
    """Without the axes named, or without all axes of size 1."""
    places = {_place(a, x.dim()) for a in axis} or {i for i, size in enumerate(x.shape) if size == 1}
    if any(x.shape[place] != 1 for place in places):
        raise Invalid(f"axis {axis} is not of size 1")
    return x.reshape([size for i, size in enumerate(x.shape) if i not in places])


def flatten_v2(x: Tensor, *, axis: int = 1, end_axis: int = -1) -> Tensor:
    return x.flatten(axis, end_axis)


def broadcast_to(x: Tensor, shape: Tensor) -> Tensor:
    return x.broadcast_to(ints(shape))


def tile(x: Tensor, multiples: Tensor) -> Tensor:
    times = ints(multiples)
    if len(times) != x.dim():
        raise Invalid(f"{len(times)} multiples for {x.dim()} axes")
    return x.repeat(times)


# --------------------------------------------------------------------------------------------- joining and splitting


def concat_v2(x: list[Tensor], concat_dim: Tensor, *, N: int = 1) -> Tensor:
    _counted("N", N, x)
    same_dtype(*x)
    if any(operand.dim() != x[0].dim() for operand in x):
        raise Invalid(f"operands differ in rank: {[list(operand.shape) for operand in x]}")  # torch lets [0] pass
    return torch.cat(x, one_int(concat_dim))


def pack(x: list[Tensor], *, N: int, axis: int = 0) -> Tensor:
    _counted("N", N, x)
    same_dtype(*x)
    return torch.stack(x, axis)


def unpack(x: Tensor, *, num: int, axis: int = 0) -> tuple[Tensor, ...]:
    parts = x.unbind(axis)
    _counted("num", num, parts)
    return parts


def split_v(x: Tensor, size_splits: Tensor, split_dim: Tensor, *, num_split: int) -> tuple[Tensor, ...]:
    """One size may be -1: the rest."""
    sizes, axis = ints(size_splits), one_int(split_dim)
    _counted("num_split", num_split, sizes)
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = x.shape[axis] - sum(size for size in sizes if size != -1)
    return x.split(sizes, axis)


def _counted(name: str, stated: int, parts: list | tuple) -> None:
    if stated != len(parts):
        raise Invalid(f"attribute {name!r} = {stated}, but there are {len(parts)} parts")


# ------------------------------------------------------------------------------------------------- slicing and padding


@fixed(begin_mask=0, end_mask=0, ellipsis_mask=0, new_axis_mask=0, shrink_axis_mask=0)
def strided_slice_v2(
    x: Tensor, begin: Tensor, end: Tensor, axes: Tensor | None = None, strides: Tensor | None = None
) -> Tensor:
    """Python's slices with positive strides, on the axes named (default: the first ones)."""
    begins, ends = ints(begin), ints(end)
    places = list(range(len(begins))) if axes is None else [_place(axis, x.dim()) for axis in ints(axes)]
    steps = [1] * len(begins) if strides is None else ints(strides)
    if not len(begins) == len(ends) == len(places) == len(steps) == len(set(places)):
        raise Invalid(f"begin {begins}, end {ends}, axes {places} and strides {steps} do not belong together")
    if any(step < 1 for step in steps):
        raise Unsupported(f"strides {steps}: only positive ones are known")
    index = [slice(None)] * x.dim()
    for place, *bounds in zip(places, begins, ends, steps):
        index[place] = slice(*bounds)
    return x[tuple(index)]


@fixed(mode="constant")
def pad_v3(
    x: Tensor, paddings: Tensor, constant_values: Tensor | None = None, *, paddings_contiguous: bool = True
) -> Tensor:
    """paddings: before and after of axis 0, of axis 1, ...; not contiguous: all befores, then all afters."""
    same_dtype(x, constant_values)
    pads = ints(paddings.reshape(-1))
    if len(pads) != 2 * x.dim() or any(pad < 0 for pad in pads):
        raise Invalid(f"paddings {pads} are not two sizes of at least 0 for each of {x.dim()} axes")
    before, after = (pads[::2], pads[1::2]) if paddings_contiguous else (pads[: x.dim()], pads[x.dim() :])
    value = 0 if constant_values is None else constant_values.reshape(()).item()
    last_axis_first = [size for pair in zip(reversed(before), reversed(after)) for size in pair]
    if x.dtype == torch.bool:
        return F.pad(x.to(torch.uint8), last_axis_first, value=int(value)).to(torch.bool)
    return F.pad(x, last_axis_first, value=value)


def reverse_v2(x: Tensor, axis: Tensor) -> Tensor:
    return x.flip(ints(axis))


def roll(x: Tensor, *, shifts: list[int], dims: list[int] = []) -> Tensor:  # noqa: B006
    return torch.roll(x, shifts, dims) if dims else torch.roll(x, shifts)


def triu(x: Tensor, *, diagonal: int = 0) -> Tensor:
    return torch.triu(x, diagonal)


def tril(x: Tensor, *, diagonal: int = 0) -> Tensor:
    return torch.tril(x, diagonal)


def as_strided(x: Tensor, size: Tensor, stride: Tensor, storage_offset: Tensor) -> Tensor:
    return _strided(x, size, stride, storage_offset)


def view_copy(
    dst: Tensor,
    dst_size: Tensor,
    dst_stride: Tensor,
    dst_storage_offset: Tensor,
    src: Tensor,
    src_size: Tensor,
    src_stride: Tensor,
    src_storage_offset: Tensor,
) -> Tensor:
    """dst with a strided part of src written over a strided part of it: in place, since dst is an output too."""
    same_dtype(dst, src)
    dst = dst.contiguous()  # a broadcast has no memory of its own
    target = _strided(dst, dst_size, dst_stride, dst_storage_offset)
    target.copy_(_strided(src, src_size, src_stride, src_storage_offset))
    return dst


def _strided(x: Tensor, size: Tensor, stride: Tensor, storage_offset: Tensor) -> Tensor:
    """A view of x as if it lay contiguous in memory."""
    sizes, strides, offset = ints(size), ints(stride), one_int(storage_offset)
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides))
    if len(sizes) != len(strides) or min([0, offset, *strides]) < 0 or (0 not in sizes and last >= x.numel()):
        raise Invalid(f"size {sizes}, stride {strides}, offset {offset} leave a tensor of {x.numel()} elements")
    return x.contiguous().view(-1).as_strided(sizes, strides, offset)


# ----------------------------------------------------------------------------------------------------------- filling


def fill(dims: Tensor, value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise Invalid(f"the value to fill with has {value.numel()} elements")
    return value.reshape(()).broadcast_to(ints(dims))


def zeros_like(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def ones_like(x: Tensor) -> Tensor:
    return torch.ones_like(x)


def empty(shape: Tensor, *, dtype: torch.dtype = torch.int32, init: bool = False) -> Tensor:
    """Memory nobody wrote, unless init asks for zeros."""
    of_dtype(shape, torch.int32)
    return torch.zeros(ints(shape), dtype=dtype) if init else poison(torch.Size(ints(shape)), dtype)


@fixed(is_closed=False)
def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """start, start + delta, ... below limit. Operands of several dtypes make a float32 result, as published.

    torchair's arange mixes int32 and int64: above 2^24 its numbers are rounded.
    """
    if any(operand.numel() != 1 for operand in (start, limit, delta)):
        raise Invalid("start, limit and delta have one element each")
    dtype = start.dtype if start.dtype == limit.dtype == delta.dtype else torch.float32
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=dtype)


def lin_space(start: Tensor, stop: Tensor, num: Tensor) -> Tensor:
    """num values from start to stop, both included."""
    same_dtype(start, stop)
    floating(start)
    return torch.linspace(start.item(), stop.item(), one_int(num), dtype=start.dtype)


OPS: dict[str, Callable] = {
    "Identity": identity,
    "TensorMove": tensor_move,
    "Bitcast": bitcast,
    "Shape": shape,
    "Reshape": reshape,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
    "ExpandDims": expand_dims,
    "Squeeze": squeeze,
    "FlattenV2": flatten_v2,
    "BroadcastTo": broadcast_to,
    "Expand": broadcast_to,
    "Tile": tile,
    "ConcatV2": concat_v2,
    "Pack": pack,
    "Unpack": unpack,
    "SplitV": split_v,
    "StridedSliceV2": strided_slice_v2,
    "PadV3": pad_v3,
    "ReverseV2": reverse_v2,
    "Roll": roll,
    "Triu": triu,
    "Tril": tril,
    "AsStrided": as_strided,
    "ViewCopy": view_copy,
    "Fill": fill,
    "ZerosLike": zeros_like,
    "OnesLike": ones_like,
    "Empty": empty,
    "Range": range_,
    "LinSpace": lin_space,
}
