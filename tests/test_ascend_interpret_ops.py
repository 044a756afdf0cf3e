"""Every GE type that the interpreter knows computes what the torch function does from which a converter makes it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ge_graphs import FLOATS, INTS, Drawn, assert_same, drawn, need_torchair, round_trip, run_node
from hypothesis import Phase, given, settings
from torch import Tensor

from bevfn.ascend import interpret

need_torchair()
aten = torch.ops.aten
FEW = settings(max_examples=5, derandomize=True, database=None, phases=[Phase.generate])
NUMBERS = (*FLOATS, *INTS)
ANY = (*NUMBERS, torch.bool)
F32 = (torch.float32,)

# --------------------------------------------------------------- types that converters emit: torch function and back
# {GE types that must appear: function of Drawn -> (torch function, its operands)}

UNARY = {  # type: function
    "Abs": torch.abs, "Neg": torch.neg, "Sign": torch.sign, "Reciprocal": torch.reciprocal, "Expm1": torch.expm1,
    "Sin": torch.sin, "Cos": torch.cos, "Erf": torch.erf, "Tanh": torch.tanh, "Sigmoid": torch.sigmoid,
    "Floor": torch.floor, "Ceil": torch.ceil, "Trunc": torch.trunc, "Round": torch.round, "Exp": torch.exp,
    "Relu": torch.relu, "HardSwish": F.hardswish, "Swish": F.silu, "GeluV2": F.gelu, "ZerosLike": torch.zeros_like,
    "OnesLike": torch.ones_like,
}  # fmt: skip
OF_POSITIVE = {"Sqrt": torch.sqrt, "Rsqrt": torch.rsqrt, "Log": torch.log, "Log1p": torch.log1p}
BINARY = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Maximum": torch.maximum, "Minimum": torch.minimum}
COMPARISONS = {
    "Equal": torch.eq, "NotEqual": torch.ne, "Less": torch.lt, "LessEqual": torch.le, "Greater": torch.gt,
    "GreaterEqual": torch.ge,
}  # fmt: skip
BITWISE = {"BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor}
Case = tuple[Callable, tuple[Tensor, ...]]


def gradient(function: Callable) -> Callable:
    """(x, ..., weight) -> the gradients of sum(function(x, ...) weight) by the floating operands."""

    def apply(*operands: Tensor) -> tuple[Tensor, ...]:
        *inputs, weight = operands
        places = tuple(i for i, x in enumerate(inputs) if x.is_floating_point())
        return torch.func.grad(lambda *xs: (function(*xs) * weight).sum(), places)(*inputs)

    return apply


def with_gradient(function: Callable) -> Callable:
    """(x, ..., weight) -> what the function returns, and its gradients."""
    return lambda *operands: (function(*operands[:-1]), gradient(function)(*operands))


def of_gradient(d: Drawn, function: Callable, x: Tensor) -> Case:
    return gradient(function), (x, d.tensor(x.shape, (x.dtype,)))


def reduction(d: Drawn, function: Callable, dtypes=FLOATS) -> Case:
    x = d.tensor(d.shape(1), dtypes)
    axes, keep = d.axes(x), d.flag()
    return lambda x: function(x, axes, keep), (x,)


def where_case(d: Drawn) -> Case:
    a, b = d.pair(ANY)
    return torch.where, (d.tensor(a.shape, (torch.bool,)), a, b)


def cast_case(d: Drawn) -> Case:
    x, dtype = d.tensor(dtypes=ANY), d.among(*ANY)
    return lambda x: x.to(dtype), (x,)


def slice_case(d: Drawn) -> Case:
    x = d.tensor((d.int(3, 7), d.int(3, 7)), ANY)
    axis, step = d.axis(x), d.int(1, 3)
    low, high = d.int(-8, 2), d.among(None, -1, 3, 9)
    return lambda x: aten.slice.Tensor(x, axis, low, high, step).clone(), (x,)


def pad_case(d: Drawn) -> Case:
    x = d.tensor(d.shape(2))
    pads, value = [d.int(0, 2) for _ in range(4)], d.among(0.0, 1.5)
    return lambda x: F.pad(x, pads, value=value), (x,)


def cat_case(d: Drawn) -> Case:
    x = d.tensor(d.shape(1), ANY)
    axis = d.axis(x)
    return lambda *xs: torch.cat(xs, axis), (x, d.tensor(x.shape, (x.dtype,)), d.tensor(x.shape, (x.dtype,)))


def stack_case(d: Drawn) -> Case:
    x = d.tensor(dtypes=ANY)
    axis = d.int(-x.dim() - 1, x.dim())
    return lambda *xs: torch.stack(xs, axis), (x, d.tensor(x.shape, (x.dtype,)))


def split_case(d: Drawn) -> Case:
    x = d.tensor(d.shape(1, 3, 7), NUMBERS)
    axis, size = d.axis(x), d.int(1, 3)
    return lambda x: [part * 2 for part in x.split(size, axis)], (x,)


def gather_case(d: Drawn) -> Case:
    x = d.tensor(d.shape(1), NUMBERS)
    axis = d.axis(x)
    return lambda x, i: torch.gather(x, axis, i), (x, d.index(x.shape, x.shape[axis]))


def select_rows_case(d: Drawn) -> Case:
    x = d.tensor(d.shape(1), ANY)
    axis = d.axis(x)
    return lambda x, i: torch.index_select(x, axis, i), (x, d.index([d.int(1, 5)], x.shape[axis]))


def advanced_index_case(d: Drawn) -> Case:
    x = d.tensor(d.shape(2, 3), ANY)
    i, j = (d.index([4], size, low=-size) for size in x.shape[:2])
    chosen = d.among(lambda x, i, j: x[i], lambda x, i, j: x[:, j], lambda x, i, j: x[i, j])
    return chosen, (x, i, j)


def scatter_case(d: Drawn) -> Case:
    """Distinct cells, or sums: repeated cells have a test of their own."""
    x = d.tensor(d.shape(1, 2), NUMBERS)
    axis = d.axis(x)
    order = d.index(x.shape, 1000).argsort(axis)
    source = d.tensor(x.shape, (x.dtype,))
    if d.flag():
        return lambda x, i, s: x.scatter(axis, i, s), (x, order, source)
    return lambda x, i, s: x.scatter_add(axis, i, s), (x, d.index(x.shape, x.shape[axis]), source)


def index_add_case(d: Drawn) -> Case:
    x = d.tensor(d.shape(1), (torch.float32, torch.float16, *INTS))
    axis, count = d.axis(x), d.int(1, 6)
    shape = list(x.shape)
    shape[axis] = count
    i = d.index([count], x.shape[axis])
    alpha = d.among(1, 2)
    return lambda x, i, s: x.index_add(axis, i, s, alpha=alpha) + x, (x, i, d.tensor(shape, (x.dtype,)))


def embedding_case(d: Drawn) -> Case:
    table, i = d.tensor((d.int(2, 6), 3), F32), d.index(d.shape(1, 2), 2)
    return gradient(lambda table, i: F.embedding(i, table)), (table, i, d.tensor((*i.shape, 3), F32))


def sort_case(d: Drawn) -> Case:
    """Equal keys: a stable sort keeps their order."""
    x = d.tensor(d.shape(1, 2, 9), (torch.float32, *INTS))
    axis, down = d.axis(x), d.flag()
    return lambda x: torch.sort(x, dim=axis, descending=down, stable=True), (x,)


def top_k_case(d: Drawn) -> Case:
    x = torch.randperm(12, generator=torch.Generator().manual_seed(d.int(0, 9))).view(3, 4).to(d.among(*FLOATS))
    k, largest = d.int(1, 4), d.flag()
    return lambda x: torch.topk(x, k, -1, largest), (x,)


def search_case(d: Drawn) -> Case:
    x, right = d.tensor((9,), (torch.float32, *INTS)), d.flag()
    return lambda x, v: torch.searchsorted(x, v, right=right), (x.sort().values, d.tensor((2, 3), (x.dtype,)))


def arg_case(d: Drawn) -> Case:
    x = d.tensor(d.shape(1))
    axis, keep = d.axis(x), d.flag()
    return lambda x: torch.max(x, axis, keep), (x,)


def matmul_case(d: Drawn) -> Case:
    dtype, (m, k, n) = d.among(*FLOATS), (d.int(1, 9) for _ in range(3))
    a, b, bias = (d.tensor(shape, (dtype,)) for shape in ((m, k), (n, k), (n,)))
    return lambda a, b, bias: (a @ b.T, F.linear(a, b, bias)), (a, b, bias)


def batched_case(d: Drawn) -> Case:
    dtype, (b, m, k, n) = d.among(*FLOATS), (d.int(1, 5) for _ in range(4))
    return lambda x, y: torch.bmm(x, y.mT), (d.tensor((b, m, k), (dtype,)), d.tensor((b, n, k), (dtype,)))


def conv_case(d: Drawn, axes: int) -> Case:
    groups, dtype = d.among(1, 2), torch.float32
    kernel = [d.int(1, 3) for _ in range(axes)]
    stride, padding, dilation = ([d.int(low, 2) for _ in range(axes)] for low in (1, 0, 1))
    size = [d.int(5, 8) for _ in range(axes)]
    x, w = d.tensor((d.int(1, 2), 4, *size), (dtype,)), d.tensor((2 * groups, 4 // groups, *kernel), (dtype,))
    bias = d.tensor((2 * groups,), (dtype,))
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]

    def apply(x, w, bias):
        return function(x, w, bias, stride, padding, dilation, groups)

    weight = d.tensor(apply(x, w, bias).shape, (dtype,))
    return with_gradient(apply), (x, w, bias, weight)


def half_conv_case(d: Drawn) -> Case:
    """On the device half precision sums in float32: so does the expectation."""
    dtype = d.among(torch.float16, torch.bfloat16)
    x, w = d.tensor((1, 3, 6, 5), (dtype,)), d.tensor((4, 3, 3, 2), (dtype,))
    return lambda x, w: F.conv2d(x, w, None, 2, 1), (x, w)


def deconv_case(d: Drawn) -> Case:
    stride = d.int(1, 3)
    kernel, padding, extra = d.int(stride, 4), d.int(0, 1), d.int(0, stride - 1)
    x, w = d.tensor((1, 2, 4, 3), F32), d.tensor((2, 3, kernel, kernel), F32)
    apply = lambda x, w: F.conv_transpose2d(x, w, None, stride, padding, extra)  # noqa: E731
    return with_gradient(apply), (x, w, d.tensor(apply(x, w).shape, F32))


def max_pool_case(d: Drawn) -> Case:
    kernel, stride, ceil = d.int(2, 3), d.int(1, 3), d.flag()
    padding = d.int(0, kernel // 2)
    x = d.tensor((2, 3, d.int(5, 8), 6), (torch.float32, torch.float16))
    apply = lambda x: F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)  # noqa: E731
    return with_gradient(apply), (x, d.tensor(apply(x).shape, (x.dtype,)))


def avg_pool_case(d: Drawn) -> Case:
    kernel, stride, ceil, include = d.int(2, 3), d.int(1, 3), d.flag(), d.flag()
    padding = d.int(0, kernel // 2)
    x = d.tensor((2, 3, d.int(5, 8), 6), F32)
    apply = lambda x: F.avg_pool2d(x, kernel, stride, padding, ceil, include)  # noqa: E731
    return with_gradient(apply), (x, d.tensor(apply(x).shape, F32))


def layer_norm_case(d: Drawn) -> Case:
    x = d.tensor((d.int(1, 3), d.int(1, 4), d.int(2, 6)), F32)
    shape = x.shape[-d.int(1, 2) :]
    w, b = d.tensor(shape, F32), d.tensor(shape, F32)
    apply = lambda x, w, b: F.layer_norm(x, shape, w, b, 1e-3)  # noqa: E731
    return with_gradient(apply), (x, w, b, d.tensor(x.shape, F32))


def frozen_norm_case(d: Drawn) -> Case:
    x = d.tensor((2, 3, 4, 2), F32)
    w, b, mean = (d.tensor((3,), F32) for _ in range(3))
    return lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b, False), (x, w, b, mean, d.tensor((3,), F32, positive=True))


def softmax_case(d: Drawn, function: Callable) -> Case:
    x = d.tensor(d.shape(1))
    axis = d.axis(x)
    apply = lambda x: function(x, axis)  # noqa: E731
    return with_gradient(apply), (x, d.tensor(x.shape, (x.dtype,)))


def nll_case(d: Drawn) -> Case:
    """Targets -100 do not count."""
    x = d.tensor((d.int(2, 6), 4), F32)
    target, reduction = d.index(x.shape[:1], 4), d.among("mean", "sum")
    target[0] = d.among(-100, 1)
    apply = lambda x, target: F.nll_loss(x, target, reduction=reduction)  # noqa: E731
    return with_gradient(apply), (x, target, d.tensor((), F32))


def mse_case(d: Drawn) -> Case:
    x = d.tensor((3, 4))
    y, reduction = d.tensor((3, 4), (x.dtype,)), d.among("mean", "sum")
    apply = lambda x, y: F.mse_loss(x, y, reduction=reduction)  # noqa: E731
    return with_gradient(apply), (x, y, d.tensor((), (x.dtype,)))


def nearest_case(d: Drawn) -> Case:
    x, scale = d.tensor((1, 2, d.int(2, 4), 3), (torch.float32, torch.float16)), d.int(1, 3)
    size = [x.shape[2] * scale, x.shape[3] * 2]
    apply = lambda x: F.interpolate(x, size=size, mode="nearest")  # noqa: E731
    return with_gradient(apply), (x, d.tensor(apply(x).shape, (x.dtype,)))


def grid_case(d: Drawn) -> Case:
    mode, padding, corners = d.among("bilinear", "nearest"), d.among("zeros", "border"), d.flag()
    x, grid = d.tensor((1, 2, 4, 5), F32), d.tensor((1, 3, 4, 2), F32) * 0.6
    apply = lambda x, grid: F.grid_sample(x, grid, mode, padding, align_corners=corners)  # noqa: E731
    return with_gradient(apply), (x, grid, d.tensor((1, 2, 3, 4), F32))


def rows(count: int, dtype=torch.float32) -> Callable[[Drawn], tuple[Tensor, ...]]:
    return lambda d: tuple(d.tensor((3, 4), (dtype,)) for _ in range(count))


def on(function: Callable, operands: Callable[[Drawn], tuple[Tensor, ...]]) -> Callable[[Drawn], Case]:
    """A case whose function has no attributes to draw."""
    return lambda d: (function, operands(d))


ROUND_TRIPS: dict[str, Callable[[Drawn], Case]] = {
    **{name: on(function, lambda d: (d.tensor(),)) for name, function in UNARY.items()},
    **{name: on(function, lambda d: (d.tensor(positive=True),)) for name, function in OF_POSITIVE.items()},
    **{name: on(function, lambda d: d.pair(NUMBERS)) for name, function in BINARY.items()},
    **{name: on(function, lambda d: d.pair(NUMBERS)) for name, function in COMPARISONS.items()},
    **{name: on(function, lambda d: d.pair(INTS)) for name, function in BITWISE.items()},
    "LogicalAnd": on(torch.logical_and, lambda d: d.pair((torch.bool,))),
    "LogicalOr": on(torch.logical_or, lambda d: d.pair((torch.bool,))),
    "LogicalNot": on(torch.logical_not, lambda d: (d.tensor(dtypes=(torch.bool,)),)),
    "RightShift": on(torch.bitwise_right_shift, lambda d: d.pair(INTS, positive=True)),
    "RealDiv": on(torch.div, lambda d: d.pair(positive=True)),
    "FloorMod": on(torch.remainder, lambda d: d.pair((*F32, *INTS), positive=True)),
    "FloorDiv": on(lambda a, b: torch.div(a, b, rounding_mode="floor"), lambda d: d.pair(INTS, positive=True)),
    "TruncateDiv": on(lambda a, b: torch.div(a, b, rounding_mode="trunc"), lambda d: d.pair(INTS, positive=True)),
    "Pow": on(lambda x: (x**2.0, x**3, 2.0**x), lambda d: (d.tensor(),)),
    "Atan2": on(torch.atan2, lambda d: d.pair(F32)),
    "ClipByValueV2": on(lambda x: (x.clamp(-0.5, 0.5), x.clamp(min=0.1)), lambda d: (d.tensor(),)),
    "SelectV2": where_case,
    "MaskedFill": on(lambda m, x: x.masked_fill(m, 2.5), lambda d: (d.tensor((3, 2), (torch.bool,)), d.tensor((3, 2)))),
    "Addcmul": on(lambda x, a, b: torch.addcmul(x, a, b, value=0.5), rows(3)),
    "Addcdiv": on(lambda x, a, b: torch.addcdiv(x, a, b, value=0.5), rows(3)),
    "NanToNum": on(lambda x: torch.nan_to_num(x / 0, 1.0, 2.0, 3.0), lambda d: (d.tensor((9,)).round(),)),
    "Cast": cast_case,
    "ReluGrad": lambda d: of_gradient(d, F.relu, d.tensor()),
    "SigmoidGrad": lambda d: of_gradient(d, torch.sigmoid, d.tensor()),
    "TanhGrad": lambda d: of_gradient(d, torch.tanh, d.tensor()),
    "GeluGradV2": lambda d: of_gradient(d, F.gelu, d.tensor()),
    "HardSwishGrad": lambda d: of_gradient(d, F.hardswish, d.tensor()),
    "LeakyRelu LeakyReluGrad": lambda d: of_gradient(d, lambda x: F.leaky_relu(x, 0.2) ** 2, d.tensor(dtypes=F32)),
    "Elu EluGradV2": lambda d: of_gradient(d, lambda x: F.elu(x, 0.7) ** 2, d.tensor(dtypes=F32)),
    "ReduceSum": lambda d: reduction(d, torch.sum, NUMBERS),
    "ReduceMean": lambda d: reduction(d, torch.mean),
    "ReduceMax": lambda d: reduction(d, torch.amax),
    "ReduceMin": lambda d: reduction(d, torch.amin),
    "ReduceLogSumExp": lambda d: reduction(d, torch.logsumexp),
    "LpNormV2": lambda d: reduction(d, lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    "ReduceAll": on(torch.all, lambda d: (d.tensor(dtypes=(torch.bool,)),)),
    "ReduceAny": on(lambda x: x.any(-1), lambda d: (d.tensor(d.shape(1), (torch.bool,)),)),
    "ReduceStdWithMean": on(lambda x: x.std(0), lambda d: (d.tensor((d.int(2, 5), 3)),)),
    "ArgMaxWithValue": arg_case,
    "ArgMin": on(lambda x: x.argmin(0), lambda d: (d.tensor((5, 3)),)),
    "ArgMaxV2": on(lambda x: x.argmax(0), lambda d: (d.tensor((5, 3)),)),
    "Cumsum": on(lambda x: x.cumsum(0), lambda d: (d.tensor((d.int(1, 6), 2), (*F32, *INTS)),)),
    "Sort": sort_case,
    "TopKV2": top_k_case,
    "SearchSorted": search_case,
    "Reshape": on(lambda x: x.reshape(-1) * 2, lambda d: (d.tensor(d.shape(2), NUMBERS),)),
    "Transpose": on(lambda x: x.movedim(0, -1).contiguous() + 1, lambda d: (d.tensor(d.shape(2), NUMBERS),)),
    "Unsqueeze": on(lambda x: x.unsqueeze(1) * 2, lambda d: (d.tensor(d.shape(1), NUMBERS),)),
    "Squeeze": on(lambda x: x.squeeze(1) * 2, lambda d: (d.tensor((d.int(1, 4), 1, 3), NUMBERS),)),
    "BroadcastTo": on(lambda x: x.expand(4, *x.shape[1:]) * 1, lambda d: (d.tensor((1, *d.shape(1)), NUMBERS),)),
    "Tile": on(lambda x: x.repeat(2, 1, 3), lambda d: (d.tensor(d.shape(3)),)),
    "ConcatV2": cat_case,
    "Pack": stack_case,
    "Unpack": on(lambda x: [part * 2 for part in x.unbind(0)], lambda d: (d.tensor((d.int(2, 4), 3)),)),
    "SplitV": split_case,
    "StridedSliceV2": slice_case,
    "PadV3": pad_case,
    "ReverseV2": on(lambda x: x.flip([0]), lambda d: (d.tensor(d.shape(1), NUMBERS),)),
    "Roll": on(lambda x: x.roll((2, -1), (0, 1)), lambda d: (d.tensor((d.int(1, 5), d.int(1, 5))),)),
    "Triu": on(lambda x: x.triu(1), lambda d: (d.tensor((4, d.int(2, 5))),)),
    "Tril": on(lambda x: x.tril(-1), lambda d: (d.tensor((4, d.int(2, 5))),)),
    "AsStrided": on(lambda x: x.as_strided((2, 2), (3, 1), 1) * 1, lambda d: (d.tensor((3, 4)),)),
    "Fill Shape": on(lambda x: torch.full_like(x, 3), lambda d: (d.tensor(dtypes=NUMBERS),)),
    "Range": on(lambda x: x + torch.arange(5), lambda d: (d.tensor((5,), INTS),)),
    "LinSpace": on(lambda x: x + torch.linspace(0.5, 2.0, 4), lambda d: (d.tensor((4,), F32),)),
    "Identity": on(lambda x: x.clone(), lambda d: (d.tensor(dtypes=NUMBERS),)),
    "GatherElements": gather_case,
    "GatherV2": select_rows_case,
    "IndexByTensor": advanced_index_case,
    "ScatterElements": scatter_case,
    "TensorMove InplaceIndexAdd": index_add_case,
    "EmbeddingDenseGrad": embedding_case,
    "MatMul": matmul_case,
    "BatchMatMul": batched_case,
    "MatMulV2": on(lambda a, b, c: torch.addmm(c, a, b.T), lambda d: (*rows(2)(d), d.tensor((3, 3), F32))),
    "Conv2D Conv2DBackpropFilter Conv2DBackpropInput Unsqueeze": lambda d: conv_case(d, 1),
    "Conv2D Conv2DBackpropFilter Conv2DBackpropInput FlattenV2": lambda d: conv_case(d, 2),
    "Conv3D Conv3DBackpropFilter Conv3DBackpropInput": lambda d: conv_case(d, 3),
    "Conv2D": half_conv_case,
    "Conv2DBackpropInput Conv2D": deconv_case,
    "MaxPoolWithArgmaxV1 MaxPoolGradWithArgmaxV1": max_pool_case,
    "AvgPoolV2 AvgPoolV2Grad": avg_pool_case,
    "LayerNormV4 LayerNormGradV3": layer_norm_case,
    "BNInfer": frozen_norm_case,
    "SoftmaxV2 SoftmaxGrad": lambda d: softmax_case(d, torch.softmax),
    "LogSoftmaxV2 LogSoftmaxGrad": lambda d: softmax_case(d, torch.log_softmax),
    "NLLLoss NLLLossGrad": nll_case,
    "MseLoss MseLossGrad": mse_case,
    "ResizeNearestNeighborV2 ResizeNearestNeighborV2Grad": nearest_case,
    "GridSampler2D GridSampler2DGrad": grid_case,
}


@pytest.mark.parametrize("types", ROUND_TRIPS)
def test_lowered_and_interpreted_equals_torch(types):
    seen = set()

    @FEW
    @given(case=drawn(ROUND_TRIPS[types]))
    def check(case):
        function, operands = case
        seen.update(round_trip(function, *operands))

    check()
    assert set(types.split()) <= seen  # the row is about these types


# ------------------------------------------------------- types that no converter of ours emits: one GE node and its formula
# {GE types: function of Drawn -> (builder of the node, the formula, operands)}
Node = tuple[Callable, Callable, tuple[Tensor, ...]]


def images(value, *indices: int):
    """A GE value whose node's operands are marked NCHW, as converters mark them."""
    from torchair._ge_concrete_graph.utils import specific_op_input_layout

    specific_op_input_layout(value[0] if isinstance(value, tuple) else value, indices=list(indices), layout="NCHW")
    return value


def node(name: str, formula: Callable, operands: Callable[[Drawn], tuple[Tensor, ...]], **attributes):
    """A node that takes the operands as they are."""
    return lambda d: (lambda ge, *x: getattr(ge, name)(*x, **attributes), formula, operands(d))


def scattered(name: str, reduction: str | None) -> Callable[[Drawn], Node]:
    def make(d: Drawn) -> Node:
        x, cells = d.tensor((4, 3, 2), F32), d.index((5, 2), 3)
        cells = cells if reduction else torch.cartesian_prod(torch.arange(4), torch.arange(3))[d.int(0, 6) :]
        updates = d.tensor((len(cells), 2), F32)

        def formula(x, cells, updates):
            flat = (cells[:, 0] * 3 + cells[:, 1])[:, None].expand_as(updates)
            rows, updates = x.reshape(12, 2), -updates if name == "TensorScatterSub" else updates
            if reduction is None:
                return rows.scatter(0, flat, updates).view(4, 3, 2)
            return rows.scatter_reduce(0, flat, updates, reduction).view(4, 3, 2)

        return lambda ge, *o: getattr(ge, name)(*o), formula, (x, cells, updates)

    return make


def batch_norm(d: Drawn) -> tuple[Tensor, ...]:
    channels = [d.tensor((3,), F32) for _ in range(3)]
    return d.tensor((2, 3, 4, 5), FLOATS), *channels, d.tensor((3,), F32, positive=True)


def trained(x, w, b, mean, var):
    """torch's batch norm, and what GE returns beside it."""
    mean, var = mean.clone(), var.clone()
    y = F.batch_norm(x.float(), mean, var, w, b, True, 0.1, 1e-3).to(x.dtype)
    own = x.float().var((0, 2, 3), correction=0)
    return y, mean, var, x.float().mean((0, 2, 3)), torch.rsqrt(own + 1e-3)


def batch_norm_build(ge, x, w, b, mean, var):
    mean, var = ge.TensorMove(mean), ge.TensorMove(var)  # the node writes them
    return images(ge.BatchNormV3(x, w, b, mean, var, epsilon=1e-3), 0)


def training_batch_norm_build(ge, x, w, b, mean, var):
    total, squares = images(ge.BNTrainingReduce(x), 0)
    running = ge.TensorMove(mean), ge.TensorMove(var)
    return images(ge.BNTrainingUpdate(x, total, squares, w, b, *running, factor=0.1, epsilon=1e-3), 0)


def trained_with_variance(*operands):
    *same, rstd = trained(*operands)
    return *same, 1 / rstd.square() - 1e-3


def batch_norm_gradient_build(ge, grad, x, w, mean, var):
    ds, do = images(ge.BNTrainingUpdateGrad(grad, x, mean, var, epsilon=1e-3), 0, 1)
    return images(ge.BNTrainingReduceGrad(grad, x, ds, do, w, mean, var, epsilon=1e-3), 0, 1), ds, do


def batch_norm_gradient(grad, x, w, mean, var):
    apply = lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.1, 1e-3)  # noqa: E731
    return gradient(apply)(x, w, torch.zeros(3), grad)


def batch_norm_gradient_operands(d: Drawn) -> tuple[Tensor, ...]:
    x = d.tensor((2, 3, 4, 5), F32)
    return d.tensor(x.shape, F32), x, d.tensor((3,), F32), x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)


def deconv_node(d: Drawn) -> Node:
    stride = d.int(1, 3)
    kernel, padding, extra = d.int(stride, 4), d.int(0, 1), d.int(0, stride - 1)
    x, w, b = d.tensor((1, 2, 4, 3), F32), d.tensor((2, 3, kernel, kernel), F32), d.tensor((3,), F32)
    formula = lambda x, w, b: F.conv_transpose2d(x, w, b, stride, padding, extra)  # noqa: E731
    size = list(formula(x, w, b).shape)

    def build(ge, x, w, b):
        y = ge.Conv2DTranspose(
            size, x, w, b, None, strides=[1, 1, stride, stride], pads=[padding] * 4, data_format="NCHW",
            output_padding=[0, 0, extra, extra],
        )  # fmt: skip
        return images(y, 1, 2)

    return build, formula, (x, w, b)


def uneven_conv_node(d: Drawn) -> Node:
    """More padding on one side, which torch's convolution does not have."""
    pads = [d.int(0, 2) for _ in range(4)]  # top, bottom, left, right
    x, w = d.tensor((1, 2, 5, 6), F32), d.tensor((3, 2, 3, 2), F32)
    geometry = {"strides": [1, 1, 2, 1], "pads": pads, "data_format": "NCHW"}
    apply = lambda x, w: F.conv2d(F.pad(x, [*pads[2:], *pads[:2]]), w, None, (2, 1))  # noqa: E731

    def build(ge, x, w, g):
        return (
            images(ge.Conv2D(x, w, None, None, **geometry), 0, 1),
            images(ge.Conv2DBackpropInput([1, 2, 5, 6], w, g, **geometry), 1, 2),
            images(ge.Conv2DBackpropFilter(x, [3, 2, 3, 2], g, **geometry), 0, 2),
        )

    def formula(x, w, g):
        return apply(x, w), *gradient(apply)(x, w, g)

    return build, formula, (x, w, d.tensor(apply(x, w).shape, F32))


def bilinear_node(d: Drawn) -> Node:
    corners, size = d.flag(), [d.int(1, 9), d.int(1, 9)]
    how = {"align_corners": corners, "half_pixel_centers": not corners}
    apply = lambda x: F.interpolate(x, size=size, mode="bilinear", align_corners=corners)  # noqa: E731

    def build(ge, x, w):
        from torchair.ge._ge_graph import DataType

        y = images(ge.ResizeBilinearV2(x, ge.Const(size, dtype=DataType.DT_INT32), **how), 0)
        return y, images(ge.ResizeBilinearV2Grad(w, x, **how), 0, 1)

    return (
        build,
        lambda x, w: (apply(x), *gradient(apply)(x, w)),
        (d.tensor((1, 2, 4, 5), F32), d.tensor((1, 2, *size), F32)),
    )


def group_norm(x, w, b):
    groups = x.reshape(2, 2, -1)
    return F.group_norm(x, 2, w, b, 1e-3), groups.mean(-1), groups.var(-1, correction=0)


def of(*shapes: tuple[int, ...], dtypes=F32) -> Callable[[Drawn], tuple[Tensor, ...]]:
    return lambda d: tuple(d.tensor(shape, dtypes) for shape in shapes)


def lists(name: str, formula: Callable, count: int) -> Callable[[Drawn], Node]:
    """A Foreach type of `count` lists of two tensors and a scalar."""

    def make(d: Drawn) -> Node:
        tensors = tuple(d.tensor((3,) if i % 2 else (2, 2), F32, positive=True) for i in range(2 * count))
        groups = lambda x: [list(x[2 * i : 2 * i + 2]) for i in range(count)]  # noqa: E731
        return (
            lambda ge, *x: getattr(ge, name)(*groups(x[:-1]), x[-1]),
            lambda *x: formula(*groups(x[:-1]), x[-1].item()),
            (*tensors, torch.tensor(2.0)),
        )

    return make


def tanh_gelu_gradient(dy, x, y):
    return aten.gelu_backward(dy, x, approximate="tanh")


SINGLE_NODES: dict[str, Callable[[Drawn], Node]] = {
    "IsFinite": node("IsFinite", torch.isfinite, lambda d: (d.tensor((9,)).round().reciprocal(),)),
    "IsInf": node("IsInf", torch.isinf, lambda d: (d.tensor((9,)).round().reciprocal(),)),
    "IsNan": node("IsNan", torch.isnan, lambda d: (d.tensor((9,)).round().log(),)),
    "Square": node("Square", torch.square, lambda d: (d.tensor(dtypes=NUMBERS),)),
    "Tan": node("Tan", torch.tan, lambda d: (d.tensor(dtypes=F32),)),
    "Atan": node("Atan", torch.atan, lambda d: (d.tensor(),)),
    "Invert": node("Invert", torch.bitwise_not, lambda d: (d.tensor(dtypes=INTS),)),
    "LeftShift": node("LeftShift", torch.bitwise_left_shift, lambda d: d.pair(INTS, positive=True)),
    "Mod": node("Mod", torch.fmod, lambda d: d.pair((*F32, *INTS), positive=True)),
    "Softplus": node("Softplus", F.softplus, lambda d: (d.tensor() * 9,)),
    "Gelu": node("Gelu", lambda x: F.gelu(x, approximate="tanh"), lambda d: (d.tensor(),)),
    "GeluGrad": node("GeluGrad", tanh_gelu_gradient, rows(3)),
    "GeluV2": node("GeluV2", lambda x: F.gelu(x, approximate="tanh"), lambda d: (d.tensor(),), approximate="tanh"),
    "Exp": node("Exp", lambda x: 2.0 ** (0.5 * x + 1), lambda d: (d.tensor(),), base=2.0, scale=0.5, shift=1.0),
    "Log": node(
        "Log", lambda x: torch.log2(0.5 * x + 1), lambda d: (d.tensor(positive=True),), base=2.0, scale=0.5, shift=1.0
    ),
    "Muls": node("Muls", lambda x: x * 0.5, lambda d: (d.tensor(),), value=0.5),
    "Adds": node("Adds", lambda x: x + 0.5, lambda d: (d.tensor(),), value=0.5),
    "AxpyV2": node("AxpyV2", lambda x, y, a: x + a * y, of((3, 4), (3, 4), ())),
    "Sxpy": node("Sxpy", lambda x, y, a: x - a * y, of((3, 4), (3, 4), ())),
    "Lerp": node("Lerp", torch.lerp, rows(3)),
    "ReduceProd": node(
        "ReduceProd", lambda x, axes: x.prod(0, dtype=x.dtype), lambda d: (d.tensor((3, 2), NUMBERS), torch.tensor([0]))
    ),
    "ArgMinWithValue": node(
        "ArgMinWithValue", lambda x: (x.argmin(1).int(), x.amin(1)), lambda d: (d.tensor((3, 4)),), dimension=1
    ),
    "Cumsum": node(
        "Cumsum",
        lambda x, axis: x.flip(0).cumsum(0).flip(0) - x,
        lambda d: (d.tensor((5, 2), F32), torch.tensor([0])),
        exclusive=True,
        reverse=True,
    ),
    "MatrixInverse": node("MatrixInverse", torch.linalg.inv, lambda d: (d.tensor((2, 3, 3), F32) + 5 * torch.eye(3),)),
    "Gather": node("Gather", lambda x, i: x[i], lambda d: (d.tensor((4, 2), ANY), d.index((2, 3), 4))),
    "BatchMatMulV2": lambda d: (
        lambda ge, a, b, c: ge.BatchMatMulV2(a, b, c, None, adj_x2=True),
        lambda a, b, c: a @ b.mT + c,
        of((2, 3, 4), (5, 4), (5,))(d),
    ),
    "Bitcast": node("Bitcast", lambda x: x.view(torch.int32), lambda d: (d.tensor(dtypes=F32),), type=3),
    "Expand": node("Expand", lambda x, s: x.expand(4, 3), lambda d: (d.tensor((1, 3), NUMBERS), torch.tensor([4, 3]))),
    "ExpandDims": node("ExpandDims", lambda x, a: x.unsqueeze(1), lambda d: (d.tensor((2, 3)), torch.tensor(1))),
    "Empty": node(
        "Empty", lambda s: torch.zeros(2, 3), lambda d: (torch.tensor([2, 3], dtype=torch.int32),), dtype=0, init=True
    ),
    "PadV3": lambda d: (
        lambda ge, x, p: ge.PadV3(x, p, None, paddings_contiguous=False),
        lambda x, p: F.pad(x, [3, 4, 1, 2]),
        (d.tensor((2, 3)), torch.tensor([1, 3, 2, 4])),
    ),
    "TensorScatterAdd": scattered("TensorScatterAdd", "sum"),
    "TensorScatterSub": scattered("TensorScatterSub", "sum"),
    "TensorScatterMax": scattered("TensorScatterMax", "amax"),
    "TensorScatterMin": scattered("TensorScatterMin", "amin"),
    "TensorScatterUpdate": scattered("TensorScatterUpdate", None),
    "BatchNormV3": lambda d: (batch_norm_build, trained, batch_norm(d)),
    "BNTrainingReduce BNTrainingUpdate": lambda d: (
        training_batch_norm_build,
        trained_with_variance,
        batch_norm(d),
    ),
    "BNTrainingUpdateGrad BNTrainingReduceGrad": lambda d: (
        batch_norm_gradient_build,
        batch_norm_gradient,
        batch_norm_gradient_operands(d),
    ),
    "BNInferGrad": lambda d: (
        lambda ge, g, w, v: images(ge.BNInferGrad(g, w, v, epsilon=1e-3), 0),
        lambda g, w, v: g * (w * torch.rsqrt(v + 1e-3)).view(3, 1, 1),
        (d.tensor((2, 3, 4, 5), F32), d.tensor((3,), F32), d.tensor((3,), F32, positive=True)),
    ),
    "GroupNorm": lambda d: (
        lambda ge, *x: images(ge.GroupNorm(*x, num_groups=2, eps=1e-3), 0),
        group_norm,
        of((2, 4, 3, 2), (4,), (4,))(d),
    ),
    "Conv2DTranspose": deconv_node,
    "Conv2D Conv2DBackpropInput Conv2DBackpropFilter": uneven_conv_node,
    "ResizeBilinearV2 ResizeBilinearV2Grad": bilinear_node,
    "ForeachAddScalar": lists("ForeachAddScalar", lambda x, s: [t + s for t in x], 1),
    "ForeachMulScalar": lists("ForeachMulScalar", lambda x, s: [t * s for t in x], 1),
    "ForeachNorm": lists("ForeachNorm", lambda x, s: [t.norm() for t in x], 1),
    "ForeachLerpScalar": lists("ForeachLerpScalar", lambda x, y, s: [a + s * (b - a) for a, b in zip(x, y)], 2),
    "ForeachAddcmulScalar": lists(
        "ForeachAddcmulScalar", lambda x, y, z, s: [a + s * b * c for a, b, c in zip(x, y, z)], 3
    ),
    "ForeachAddcdivScalar": lists(
        "ForeachAddcdivScalar", lambda x, y, z, s: [a + s * b / c for a, b, c in zip(x, y, z)], 3
    ),
}


@pytest.mark.parametrize("types", SINGLE_NODES)
def test_a_node_computes_its_formula(types):
    @FEW
    @given(case=drawn(SINGLE_NODES[types]))
    def check(case):
        build, formula, operands = case
        assert_same(run_node(build, *operands), formula(*(x.clone() for x in operands)))

    check()


def test_every_type_has_a_test():
    tested = {name for row in (*ROUND_TRIPS, *SINGLE_NODES) for name in row.split()}
    elsewhere = {"ViewCopy"}  # test_ascend_interpret_memory.py
    assert tested | elsewhere == set(interpret.FUNCTIONS)
