"""What is in a lowered graph: what is missing, what leaves the AI Core, what it moves and computes.

Shapes inside converters are not in the graph; they come from `interpret` run on fake tensors, with which nothing is
computed. Constants stay real there as far as they are sizes and axes.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from bevfn.ascend import engines, interpret
from bevfn.ascend.lower import HF32, Lowered
from bevfn.ascend.trace import Value
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
class Family:
    """The nodes of one kind, constants left out."""

    nodes: int = 0
    gflop: float = 0.0
    """of matrix products and convolutions, two per multiplication; elsewhere one per element written"""
    gigabytes: float = 0.0
    """operands read and results written, each once per node, before GE fuses nodes"""


@dataclass(frozen=True)
class Report:
    """Figures of one graph; everything a promise is made about is named as in docs/ascend.md."""

    step: str
    ops: str
    """what this package's own operators are: of stock GE types only, or DrivingSDK's where they can be"""
    graph_breaks: int
    """0: a step that would break is an error of `trace`"""
    ge_graphs: int
    aten_nodes: int
    nodes: int
    """of the GE graph; `constants` of them are Const, `folded` more have constant operands only"""
    constants: int
    folded: int
    types: dict[str, int]
    missing: list[str]
    unknown: list[str]
    """nodes with an unknown dimension"""
    off_core: list[str]
    """host and AI CPU nodes, by type and dtype, with the reason and one line that they come from"""
    casts: dict[str, int]
    """nodes: those the step asks for, those that converters insert; folded ones left out"""
    transposes: int
    allow_hf32: bool
    """whether a device may compute float32 with HF32's 11 bits"""
    bytes: dict[str, int] = field(default_factory=dict)
    """of the inputs by kind; of the outputs; of the values between nodes that live at once at most (activations); of the
    operands and results of the largest node (workspace: what a kernel needs to change a layout); of what is computed from
    constants and read by other nodes (folded: kept in the model where GE folds it)"""
    families: dict[str, Family] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """One static graph with nothing missing."""
        return not (self.missing or self.unknown or self.graph_breaks) and self.ge_graphs == 1

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "complete": self.complete}


def report(name: str, lowered: Lowered) -> Report:
    """The figures of `lowered`.

    If operators are missing, or types that `interpret` does not know are in the graph, shapes are not known: bytes,
    FLOPs and engines are left out.
    """
    graph, kinds = lowered.graph, Counter(op.type for op in lowered.graph.op)
    uses: list[_Use] = []
    unknown = [
        f"{op.type} {op.name}: {list(descriptor.shape.dim)}"
        for op in graph.op
        for descriptor in op.output_desc
        if any(size < 0 for size in descriptor.shape.dim)
    ]
    if not lowered.missing:
        try:
            uses = list(_uses(lowered))
        except (interpret.Unsupported, interpret.Invalid) as error:
            unknown.append(f"all, because the graph cannot be interpreted: {error}")
    unknown += [f"{use.kind} {use.name}: {use.unknown}" for use in uses if use.unknown]
    constant = {use.name for use in uses if use.constant}
    working = [use for use in uses if not use.constant]  # what the device does each step; GE computes the rest once
    casts = [op.name for op in graph.op if op.type == "Cast" and op.name not in constant]
    asked = sum(lowered.sources[cast][0] == "aten._to_copy.default" for cast in casts)
    return Report(
        step=name,
        ops=lowered.ops,
        graph_breaks=0,
        ge_graphs=1,
        aten_nodes=len(lowered.aten.graph.nodes),
        nodes=len(graph.op),
        constants=kinds["Const"],
        folded=len(constant),
        types=dict(kinds.most_common()),
        missing=_grouped([(m.op, m.reason, m.source) for m in lowered.missing]),
        unknown=unknown,
        off_core=_off_core(lowered, working),
        casts={"asked": asked, "inserted": len(casts) - asked},
        transposes=sum(op.type == "Transpose" and op.name not in constant for op in graph.op),
        allow_hf32=HF32,
        bytes={**_inputs(lowered), **(_memory(uses) if uses else {})},
        families=_families(working),
        seconds=round(lowered.seconds, 2),
    )


def text(made: Report) -> str:
    """The report for people."""
    lines = [
        f"{made.step}: {'one static graph' if made.complete else 'NOT one static graph'}, custom operators: {made.ops}",
        f"  graph breaks {made.graph_breaks}, GE graphs {made.ge_graphs}, aten nodes {made.aten_nodes}, GE nodes {made.nodes} "
        f"({made.constants} constants, {made.folded} computed from constants), converted in {made.seconds:.1f} s",
        f"  missing converters: {_listed(made.missing)}",
        f"  unknown dimensions: {_listed(made.unknown)}",
        f"  off the AI Core: {_listed(made.off_core)}",
        f"  casts: {made.casts['asked']} asked for, {made.casts['inserted']} inserted; transposes: {made.transposes}; "
        f"HF32: {'allowed' if made.allow_hf32 else 'off'}",
    ]
    if made.bytes:
        sizes = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in made.bytes.items())
        lines.append(f"  MiB: {sizes}")
    if made.families:
        lines.append(f"  {'family':<20}{'nodes':>8}{'GFLOP':>12}{'GB':>10}")
        lines += [f"  {n:<20}{f.nodes:>8}{f.gflop:>12.3f}{f.gigabytes:>10.3f}" for n, f in made.families.items()]
    lines.append("  types: " + ", ".join(f"{kind} {count}" for kind, count in made.types.items()))
    return "\n".join(lines)


def _listed(items: list[str]) -> str:
    return "none" if not items else "".join(f"\n    {item}" for item in items)


# -------------------------------------------------------------------------------------------------- shapes of all nodes


@dataclass(frozen=True)
class _Use:
    """A node with what it reads and writes."""

    name: str
    kind: str
    operands: tuple[Tensor | None, ...]
    results: tuple[Tensor, ...]
    sources: tuple[tuple[str, int] | None, ...]
    freed: tuple[tuple[str, int], ...]
    constant: bool
    unknown: str = ""

    @property
    def traffic(self) -> int:
        if self.kind in VIEWS:
            return 0
        return sum(t.nbytes for t in (*self.operands, *self.results) if isinstance(t, Tensor))


def _uses(lowered: Lowered) -> Iterator[_Use]:
    """Every node in the order of execution, with fake tensors for what depends on the inputs."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    program = interpret.prepare(lowered.graph, {**kernels.meanings(), **_abstract(mode)})
    with mode:
        inputs = {source: torch.empty(v.shape, dtype=v.dtype) for (source, _), v in zip(program.inputs, lowered.inputs)}
    values: dict = {**program.constants, **inputs}
    constant = set(program.constants)
    for step in program.steps:
        node = step.node
        operands = tuple(None if source is None else values[source] for source in node.sources)
        fixed = all(source in constant for source in node.sources if source is not None)
        unknown = ""
        results: tuple = ()
        try:
            with torch.no_grad(), _PassedChecks():
                returned = step.call(list(operands))
            returned = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
            results = tuple(_shrunk(result, mode) for result in returned)
        except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
            unknown = str(error).strip().splitlines()[0]
        yield _Use(node.name, node.type, operands, results, node.sources, step.last_uses, fixed, unknown)
        if unknown:  # nothing behind it is known either
            return
        for i, result in enumerate(results):
            values[node.name, i] = result
            if fixed:
                constant.add((node.name, i))
        for source in step.last_uses:
            values.pop(source, None)


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


# ------------------------------------------------------------------------------------------------------------- figures


def _grouped(found: list[tuple[str, str, Any]]) -> list[str]:
    """One line per operator and reason, with how often and where first."""
    first: dict[tuple[str, str], Any] = {}
    counts = Counter((what, reason) for what, reason, _ in found)
    for what, reason, source in found:
        first.setdefault((what, reason), source)
    return [f"{what} x{n}: {reason}; at {first[what, reason] or 'no line'}" for (what, reason), n in counts.items()]


def _off_core(lowered: Lowered, uses: list[_Use]) -> list[str]:
    found = []
    for use in uses:
        place = engines.DECIDES.get(use.kind, 0)
        operand = use.operands[place] if len(use.operands) > place else None
        dtype = str(operand.dtype).removeprefix("torch.") if isinstance(operand, Tensor) else ""
        if reason := engines.problem(use.kind, dtype):
            found.append((use.kind, reason, lowered.sources.get(use.name, ("", None))[1]))
    return _grouped(found)


def _inputs(lowered: Lowered) -> dict[str, int]:
    """Bytes by the inputs' kind: "batch", "train_state.params" and so on; and of the outputs."""
    sizes: Counter[str] = Counter()
    for value in lowered.inputs:
        sizes[_kind(value)] += value.bytes
    return {**sizes, "outputs": sum(value.bytes for value in lowered.outputs)}


def _kind(value: Value) -> str:
    parts = value.name.split(".")
    return ".".join(parts[: 2 if len(parts) > 2 else 1])


def _memory(uses: list[_Use]) -> dict[str, int]:
    """Peak of the values between nodes; views live in what they read."""
    root: dict[tuple[str, int], tuple[str, int]] = {}
    users: Counter[tuple[str, int]] = Counter()
    size: dict[tuple[str, int], int] = {}
    live = peak = 0
    for use in uses:
        for i, result in enumerate(use.results):
            value = (use.name, i)
            view = use.kind in VIEWS
            root[value] = next((root[s] for s in use.sources if view and s in root), value)
            users[root[value]] += 1
            if not view and not use.constant and isinstance(result, Tensor):
                size[value] = result.nbytes
                live += result.nbytes
        peak = max(peak, live)
        for value in use.freed:
            if value in root:
                users[root[value]] -= 1
                if users[root[value]] == 0:
                    live -= size.pop(root[value], 0)
    working = [use for use in uses if not use.constant]
    made = {(use.name, i) for use in uses if use.constant for i in range(len(use.results))}
    folded = {
        source: operand.nbytes
        for use in working
        for source, operand in zip(use.sources, use.operands)
        if source in made and isinstance(operand, Tensor)
    }
    largest = max((use.traffic for use in working), default=0)
    return {"activations": peak, "workspace": largest, "folded": sum(folded.values())}


def _families(uses: list[_Use]) -> dict[str, Family]:
    names = {kind: family for family, kinds in FAMILIES.items() for kind in kinds}
    total: dict[str, list[float]] = {family: [0, 0.0, 0.0] for family in (*FAMILIES, "element-wise and other")}
    for use in uses:
        row = total[names.get(use.kind, "element-wise and other")]
        row[0] += 1
        row[1] += _flops(use) / 1e9
        row[2] += use.traffic / 1e9
    return {family: Family(int(n), round(f, 4), round(b, 4)) for family, (n, f, b) in total.items() if n}


def _flops(use: _Use) -> int:
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
