"""What every node of a lowered graph reads, writes and computes, without computing it.

Shapes inside converters are not in the graph; they come from `interpret` run on fake tensors, with which nothing is
computed. Constants stay real there as far as they are sizes and axes.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from bevfn.ascend import interpret
from bevfn.ascend.interpret import Program
from bevfn.ascend.lower import Lowered
from bevfn.kernels import ascend as kernels

LARGE = 65_536  # elements; a constant of more is no size or axis
# Types that only change how a tensor is read. No bytes move.
VIEWS = frozenset({"Reshape", "Unsqueeze", "Squeeze", "ExpandDims", "FlattenV2", "Identity"})
FAMILIES: dict[str, frozenset[str] | set[str]] = {
    "matrix products": {"MatMul", "MatMulV2", "BatchMatMul", "BatchMatMulV2"},
    "convolutions": {
        *("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter", "Conv2DTranspose"),
        *("Conv3D", "Conv3DBackpropInput", "Conv3DBackpropFilter"),
    },
    "reductions": {
        *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceAll", "ReduceAny"),
        *("ArgMaxWithValue", "Cumsum", "LayerNormV4", "LayerNormGradV3", "SoftmaxV2", "SoftmaxGrad"),
        *("BNTrainingReduce", "BNTrainingUpdate", "BNTrainingUpdateGrad", "BNTrainingReduceGrad"),
    },
    "gather and scatter": {
        *("Gather", "GatherV2", "GatherElements", "GatherNd", "ScatterElements", "InplaceIndexAdd", "IndexByTensor"),
        *("TensorScatterUpdate", "TensorScatterMax", "TensorScatterMin", "TensorScatterAdd", "ScatterNdAdd"),
        *("UnsortedSegmentSum", "UnsortedSegmentMax", "SearchSorted"),
    },
    "sorting": {"Sort", "TopKV2"},
    "collectives": {"HcomAllReduce", "HcomAllGather"},
    "casts": {"Cast"},
    "data movement": {
        *("Transpose", "ConcatV2", "SplitV", "Pack", "Unpack", "StridedSliceV2", "Slice", "PadV3", "BroadcastTo"),
        *("Expand", "Tile", "Fill", "ZerosLike", "OnesLike", "TensorMove", "ReverseV2", "Roll"),
    },
    "views": VIEWS,
}
STILL = ("data movement", "casts", "gather and scatter", "collectives")  # families that compute nothing


@dataclass(frozen=True)
class Use:
    """A node with what it reads and writes."""

    name: str
    kind: str
    operands: tuple[Tensor | None, ...]
    results: tuple[Tensor, ...]
    sources: tuple[tuple[str, int] | None, ...]
    freed: tuple[tuple[str, int], ...]
    constant: bool
    """computed from constants only, and not copied so that it can be written: GE may do it once"""
    unknown: str = ""

    @property
    def traffic(self) -> int:
        if self.kind in VIEWS:
            return 0
        return sum(t.nbytes for t in (*self.operands, *self.results) if isinstance(t, Tensor))


def used_by(lowered: Lowered) -> Iterator[Use]:
    """Every node in the order of execution, with fake tensors for what depends on the inputs."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    program = interpret.prepare(lowered.graph, {**kernels.meanings(), **_abstract(mode)})
    with mode:
        inputs = {source: torch.empty(v.shape, dtype=v.dtype) for (source, _), v in zip(program.inputs, lowered.inputs)}
    values: dict = {**program.constants, **inputs}
    constant = _constant(program)
    for step in program.steps:
        node = step.node
        operands = tuple(None if source is None else values[source] for source in node.sources)
        fixed = node.name in constant
        unknown = ""
        results: tuple = ()
        try:
            with torch.no_grad(), _PassedChecks():
                returned = step.call(list(operands))
            returned = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
            results = tuple(_shrunk(result, mode) for result in returned)
        except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
            unknown = str(error).strip().splitlines()[0]
        yield Use(node.name, node.type, operands, results, node.sources, step.last_uses, fixed, unknown)
        if unknown:  # nothing behind it is known either
            return
        for i, result in enumerate(results):
            values[node.name, i] = result
        for source in step.last_uses:
            values.pop(source, None)


def _constant(program: Program) -> set[str]:
    """Names of the nodes that need not run in every step: all that they read is constant.

    But a constant that is written in place is copied in every step, by the TensorMove in front of the node that writes or, without
    one, by GE (mirror-cann/ge 6f5451ac, docs/architecture/features/memory_conflict.md, 3.2.2; that it leaves the TensorMove:
    hicann/ge 08ccb5aa, tensormove_delete.md beside it, scenario 4).
    """
    constant = {name for name, _ in program.constants}
    copies: set[str] = set()
    for step in program.steps:
        read = [source[0] for source in step.node.sources if source is not None]
        if all(name in constant for name in read):
            constant.add(step.node.name)
            if step.node.type == "TensorMove":
                copies.add(step.node.name)
        else:
            written = (step.node.sources[place] for place in step.node.written)
            constant -= {source[0] for source in written if source is not None} & copies
    return constant


class _PassedChecks(TorchFunctionMode):
    """Fake tensors pass what `interpret` asks of values: their extremes are 0, all of them are true, none is any."""

    ANSWERS = {Tensor.min: 0, Tensor.max: 0, Tensor.all: True, Tensor.any: False}  # noqa: RUF012

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in self.ANSWERS and len(args) == 1 and not kwargs and isinstance(args[0], FakeTensor):
            return torch.tensor(self.ANSWERS[func])
        return func(*args, **(kwargs or {}))


def _shrunk(value: Any, mode: FakeTensorMode) -> Any:
    """Contiguous, and without memory if it is large."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value.contiguous() if isinstance(value, Tensor) else value
    return mode.from_tensor(value.contiguous()) if value.numel() > LARGE else value


def _abstract(mode: FakeTensorMode) -> Mapping[str, Any]:
    """Types that would allocate large constants, and collectives, which the interpreter has no other processes for."""

    def fill(dims: Tensor, value: Tensor) -> Tensor:
        sizes = [int(size) for size in dims.tolist()]
        if math.prod(sizes) <= LARGE:
            return value.expand(sizes).clone()
        with mode:
            return torch.empty(sizes, dtype=value.dtype)

    def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        count = max(0, math.ceil((limit.item() - start.item()) / delta.item()))
        if count <= LARGE:
            return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)
        with mode:
            return torch.empty(count, dtype=start.dtype)

    def all_reduce(x: Tensor, *, reduction: str, group: str, fusion: int, fusion_id: int) -> Tensor:
        return torch.empty_like(x)

    def all_gather(x: Tensor, *, rank_size: int, group: str, fusion: int, fusion_id: int) -> Tensor:
        return x.new_empty(rank_size * x.shape[0], *x.shape[1:])

    return {"Fill": fill, "Range": range_, "HcomAllReduce": all_reduce, "HcomAllGather": all_gather}


def flops(use: Use) -> int:
    """Of a matrix product or convolution two per multiplication; else one per element written, none where nothing is computed."""
    shapes = [t.shape if isinstance(t, Tensor) else torch.Size() for t in use.operands]
    written = sum(t.numel() for t in use.results if isinstance(t, Tensor))
    if use.kind in FAMILIES["matrix products"]:
        rows, columns = shapes[1][-2:]
        return 2 * written * (rows * columns // use.results[0].shape[-1])
    if use.kind in ("Conv2D", "Conv3D"):
        return 2 * written * math.prod(shapes[1][1:])
    if use.kind.endswith("BackpropInput"):
        return 2 * shapes[2].numel() * math.prod(shapes[1][1:])
    if use.kind.endswith("BackpropFilter"):
        return 2 * shapes[2].numel() * math.prod(use.results[0].shape[1:])
    if use.kind == "Conv2DTranspose":
        return 2 * shapes[1].numel() * math.prod(shapes[2][1:])
    still = use.kind in VIEWS or any(use.kind in FAMILIES[f] for f in STILL)
    return 0 if still else written
