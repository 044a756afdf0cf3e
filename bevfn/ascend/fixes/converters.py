"""Converters to stock GE types, for operators that torchair cannot convert, or converts to a type that drops something."""

from functools import cache
from typing import Any

import torch

aten = torch.ops.aten


def register() -> None:
    """Registers all of them over torchair's own; torchair must be loaded."""
    for overload, convert in _converters().items():
        _register(overload, convert)


def _register(overload: Any, convert: Any) -> None:
    import torchair

    torchair.register_fx_node_ge_converter(overload)(convert)


@cache
def _stock(overload: Any) -> Any:
    """torchair's own converter, as it was when ours took its place."""
    return overload._ge_converter.__wrapped__


def _converters() -> dict:
    """{overload: converter}; torchair passes `meta_outputs`, what the traced operator gives."""
    return {
        **_elementwise(),
        **_reductions(),
        **_counters(),
        aten.sort.stable: _sort(),
        aten.index_add.default: _index_add(),
        aten.convolution.default: _convolution(),
        aten.native_layer_norm.default: _with_int32(aten.native_layer_norm.default),
        aten.topk.default: _with_int32(aten.topk.default),
    }


def _elementwise() -> dict:
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair._ge_concrete_graph.utils import dtype_promote
    from torchair.ge._ge_graph import DataType

    def gelu(x: Any, *, approximate: str = "none", meta_outputs: Any = None) -> Any:
        return ge.GeluV2(x, approximate=approximate)

    def gelu_backward(grad: Any, x: Any, *, approximate: str = "none", meta_outputs: Any = None) -> Any:
        return ge.GeluGradV2(grad, x, approximate=approximate)

    def roll(x: Any, shifts: Any, dims: Any = (), meta_outputs: Any = None) -> Any:
        return ge.Roll(x, shifts=list(shifts), dims=list(dims))

    def unary(build: Any) -> Any:
        def convert(x: Any, meta_outputs: Any = None) -> Any:
            return build(x)

        return convert

    def binary(build: Any) -> Any:
        def convert(x: Any, y: Any, meta_outputs: Any = None) -> Any:
            return build(*dtype_promote(x, y, target_dtype=meta_outputs.dtype))

        return convert

    stock_mul = _stock(aten.mul.Tensor)

    def mul(x: Any, y: Any, meta_outputs: Any = None) -> Any:
        # torchair casts products, sums and floors to the dtype that they have. A product of bools, one of bytes, needs its cast.
        if meta_outputs.dtype == DataType.DT_BOOL:
            return stock_mul(x, y, meta_outputs=meta_outputs)
        if isinstance(y, (int, float)) and x.dtype in (DataType.DT_FLOAT16, DataType.DT_BF16):
            return ge.Muls(x, value=y)
        return ge.Mul(*dtype_promote(x, y, target_dtype=meta_outputs.dtype))

    def bitwise(integer: Any, boolean: Any) -> Any:
        def convert(x: Any, y: Any, meta_outputs: Any = None) -> Any:
            x, y = dtype_promote(x, y, target_dtype=meta_outputs.dtype)
            return (boolean if meta_outputs.dtype == DataType.DT_BOOL else integer)(x, y)

        return convert

    xor = bitwise(ge.BitwiseXor, ge.NotEqual)
    both = bitwise(ge.BitwiseAnd, ge.LogicalAnd)
    either = bitwise(ge.BitwiseOr, ge.LogicalOr)
    return {
        aten.gelu.default: gelu,
        aten.gelu_backward.default: gelu_backward,
        aten.roll.default: roll,
        aten.mul.Tensor: mul,
        aten.floor.default: unary(ge.Floor),
        aten.trunc.default: unary(ge.Trunc),
        aten.atan2.default: binary(ge.Atan2),
        aten.bitwise_xor.Tensor: xor,
        aten.bitwise_xor.Scalar: xor,
        aten.bitwise_and.Scalar: both,
        aten.bitwise_or.Scalar: either,
        aten.__rshift__.Scalar: binary(ge.RightShift),
        aten.__rshift__.Tensor: binary(ge.RightShift),
        aten.bitwise_right_shift.Tensor: binary(ge.RightShift),
        aten.bitwise_right_shift.Tensor_Scalar: binary(ge.RightShift),
    }


def _reductions() -> dict:
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair._ge_concrete_graph.utils import dtype_promote
    from torchair.ge._ge_graph import DataType

    def reduce(build: Any, dtype: Any = None) -> Any:
        def convert(x: Any, dim: Any = (), keepdim: bool = False, meta_outputs: Any = None) -> Any:
            x = x if dtype is None else dtype_promote(x, target_dtype=dtype)
            dims = [dim] if isinstance(dim, int) else list(dim)
            axes = [d % x.rank for d in dims] or list(range(x.rank))
            return build(x, ge.Const(axes, dtype=DataType.DT_INT64), keep_dims=keepdim)

        return convert

    def total(x: Any, *, dtype: Any = None, meta_outputs: Any = None) -> Any:
        return ge.ReduceSum(dtype_promote(x, target_dtype=meta_outputs.dtype), list(range(x.rank)))

    return {
        aten.sum.default: total,
        aten.amax.default: reduce(ge.ReduceMax),
        aten.amin.default: reduce(ge.ReduceMin),
        aten.all.dim: reduce(ge.ReduceAll, DataType.DT_BOOL),
    }


def _sort() -> Any:
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair.ge._ge_graph import DataType

    def sort(x: Any, *, stable: Any = False, dim: int = -1, descending: bool = False, meta_outputs: Any = None) -> Any:
        # Sort wants the last axis.
        order = list(range(x.rank))
        order[dim], order[-1] = order[-1], order[dim]
        moved = order != list(range(x.rank))

        def swap(t: Any) -> Any:
            return ge.Transpose(t, ge.Const(order, dtype=DataType.DT_INT64)) if moved else t

        values, index = ge.Sort(swap(x), axis=x.rank - 1, descending=descending, stable=bool(stable))
        return swap(values), ge.Cast(swap(index), dst_type=DataType.DT_INT64)

    return sort


def _index_add() -> Any:
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair._ge_concrete_graph.utils import dtype_promote
    from torchair.ge._ge_graph import DataType

    stock = _stock(aten.index_add.default)

    def index_add(x: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1, meta_outputs: Any = None) -> Any:
        # torchair broadcasts the source to the shape that it has: a copy, of 630 MB per sample in lift-splat.
        if index.rank != 1 or x.rank == 0 or source.rank != x.rank:
            return stock(x, dim, index, source, alpha=alpha)
        index = dtype_promote(index, target_dtype=DataType.DT_INT32)
        # Where alpha is given A2's kernel multiplies a whole buffer for every row.
        alpha = None if alpha == 1 else dtype_promote(alpha, target_dtype=x.dtype)
        return ge.InplaceIndexAdd(ge.TensorMove(x), index, source, alpha, axis=dim % x.rank)

    return index_add


def _with_int32(overload: Any) -> Any:
    """torchair's converter with its second operand, a size, as int32: TopKV2's prototype and A2's kernels of LayerNormV4 take no
    other, and GE casts floats only."""
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair.ge._ge_graph import DataType

    stock = _stock(overload)

    def convert(x: Any, size: Any, *more: Any, meta_outputs: Any = None, **named: Any) -> Any:
        return stock(x, ge.Const(size, dtype=DataType.DT_INT32), *more, meta_outputs=meta_outputs, **named)

    return convert


def _convolution() -> Any:
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair._ge_concrete_graph.utils import dtype_promote, specific_op_input_layout, specific_op_output_layout
    from torchair.ge._ge_graph import DataType

    stock = _stock(aten.convolution.default)

    def convolution(
        x: Any,
        weight: Any,
        bias: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        transposed: bool,
        output_padding: Any,
        groups: int,
        meta_outputs: Any = None,
    ) -> Any:
        # A transposed convolution is the gradient of a convolution. torchair's own Conv2DTranspose takes its size from a
        # sum of int32 and int64, and operands of the type are float16 by its prototype.
        if not transposed or meta_outputs.rank != 4:
            return stock(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, meta_outputs)
        x, weight = dtype_promote(x, weight, target_dtype=meta_outputs.dtype)
        pads = [side for p in padding for side in (p, p)]
        size = ge.Const(list(meta_outputs.size), dtype=DataType.DT_INT32)
        steps = {"strides": [1, 1, *stride], "pads": pads, "dilations": [1, 1, *dilation]}
        y = ge.Conv2DBackpropInput(size, weight, x, **steps, groups=groups, data_format="NCHW")
        specific_op_input_layout(y, indices=[1, 2], layout="NCHW")
        specific_op_output_layout(y, indices=0, layout="NCHW")
        if bias is None:
            return y
        return ge.Add(y, ge.Unsqueeze(dtype_promote(bias, target_dtype=meta_outputs.dtype), axes=[1, 2]))

    return convolution


def _counters() -> dict:
    """arange in its three forms."""
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair.ge._ge_graph import DataType

    integers = (DataType.DT_INT32, DataType.DT_INT64)

    def arange(start: Any, end: Any, step: Any, meta_outputs: Any) -> Any:
        # torchair mixes int64 and int32; Range then counts in float32, whose integers end at 2^24.
        whole = all(isinstance(number, int) for number in (start, end, step))
        dtype = meta_outputs.dtype if meta_outputs.dtype in integers else DataType.DT_INT64
        if not whole:
            dtype = DataType.DT_DOUBLE if meta_outputs.dtype == DataType.DT_DOUBLE else DataType.DT_FLOAT
            end = start + step * (meta_outputs.size[0] - 0.5)  # the last number is not a matter of rounding
        counted = ge.Range(*(ge.Const(number, dtype=dtype) for number in (start, end, step)))
        return counted if dtype == meta_outputs.dtype else ge.Cast(counted, dst_type=meta_outputs.dtype)

    def arange_to(end: Any, *, meta_outputs: Any = None, **_: Any) -> Any:
        return arange(0, end, 1, meta_outputs)

    def arange_from(start: Any, end: Any, *, meta_outputs: Any = None, **_: Any) -> Any:
        return arange(start, end, 1, meta_outputs)

    def arange_step(start: Any, end: Any, step: Any = 1, *, meta_outputs: Any = None, **_: Any) -> Any:
        return arange(start, end, step, meta_outputs)

    return {
        aten.arange.default: arange_to,
        aten.arange.start: arange_from,
        aten.arange.start_step: arange_step,
    }
