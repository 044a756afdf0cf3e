"""What is in a lowered graph: what is missing, what leaves the AI Core, what it moves and computes."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from bevfn.ascend import interpret, placement
from bevfn.ascend.lower import HF32, Lowered
from bevfn.ascend.trace import Value
from bevfn.ascend.uses import FAMILIES, VIEWS, Use, flops, used_by


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
    tables: str
    """what the places come from: our facts, or an installed CANN's folder"""
    places: dict[str, int]
    """nodes that are not computed from constants, by the unit that computes them (`placement`)"""
    layouts: int
    """nodes of the AI Core whose kernel takes another layout only, by an installed table"""
    off_core: list[str]
    """AI CPU nodes, by type and dtypes, with the reason and one line that they come from"""
    no_kernel: list[str]
    """likewise, that no unit computes"""
    unlisted: list[str]
    """likewise, whose kernels are not known"""
    cast_kernels: list[str]
    """likewise, that the AI Core computes in other dtypes, with casts that GE inserts"""
    casts: dict[str, int]
    """nodes: those the step asks for, those that converters insert, those of both to the dtype that there is already; folded
    ones left out"""
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


def report(
    name: str, lowered: Lowered, tables: placement.Tables | None = None, uses: list[Use] | None = None
) -> Report:
    """The figures of `lowered`; where its nodes run by `tables`, an installed CANN's (`opp.read`), or by our own.

    uses: what `used_by` gives, if it is there already. If operators are missing, or types that `interpret` does not know
    are in the graph, shapes are not known: bytes, FLOPs and places are left out.
    """
    graph, kinds = lowered.graph, Counter(op.type for op in lowered.graph.op)
    unknown = [
        f"{op.type} {op.name}: {list(descriptor.shape.dim)}"
        for op in graph.op
        for descriptor in op.output_desc
        if any(size < 0 for size in descriptor.shape.dim)
    ]
    if uses is None and not lowered.missing:
        try:
            uses = list(used_by(lowered))
        except (interpret.Unsupported, interpret.Invalid) as error:
            unknown.append(f"all, because the graph cannot be interpreted: {error}")
    uses = uses or []
    unknown += [f"{use.kind} {use.name}: {use.unknown}" for use in uses if use.unknown]
    constant = {use.name for use in uses if use.constant}
    working = [use for use in uses if not use.constant]  # what the device does each step; GE computes the rest once
    tables = tables or placement.own_tables()
    placed = [(use, where) for use, where in zip(uses, places(lowered, uses, tables)) if not use.constant]
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
        tables=tables.source,
        places=dict(Counter(where.place for _, where in placed).most_common()),
        layouts=sum(where.layout for _, where in placed),
        off_core=_where(lowered, placed, "AI CPU"),
        no_kernel=_where(lowered, placed, "none"),
        unlisted=_where(lowered, placed, "unknown"),
        cast_kernels=_where(lowered, placed, "AI Core with a cast"),
        casts={"asked": asked, "inserted": len(casts) - asked, "idle": sum(map(_idle, working))},
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
        f"  kernels by {made.tables}: {', '.join(f'{n} {where}' for where, n in made.places.items()) or 'not known'}"
        + (f"; {made.layouts} in another layout" if made.layouts else ""),
        f"  without a kernel: {_listed(made.no_kernel)}",
        f"  off the AI Core: {_listed(made.off_core)}",
        f"  kernels not known: {_listed(made.unlisted)}",
        f"  on the AI Core behind a cast: {_listed(made.cast_kernels)}",
        f"  casts: {made.casts['asked']} asked for, {made.casts['inserted']} inserted, {made.casts['idle']} to the dtype that there is; transposes: {made.transposes}; "
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


def _idle(use: Use) -> bool:
    """Whether it is a cast of a dtype to itself."""
    return use.kind == "Cast" and bool(use.results) and use.operands[0].dtype == use.results[0].dtype  # type: ignore[union-attr]


def _listed(items: list[str]) -> str:
    return "none" if not items else "".join(f"\n    {item}" for item in items)


# ------------------------------------------------------------------------------------------------------------- figures


def _grouped(found: list[tuple[str, str, Any]]) -> list[str]:
    """One line per operator and reason, with how often and where first."""
    first: dict[tuple[str, str], Any] = {}
    counts = Counter((what, reason) for what, reason, _ in found)
    for what, reason, source in found:
        first.setdefault((what, reason), source)
    return [f"{what} x{n}: {reason}; at {first[what, reason] or 'no line'}" for (what, reason), n in counts.items()]


def places(lowered: Lowered, uses: list[Use], tables: placement.Tables) -> Iterator[placement.Placed]:
    """Where each node runs."""
    layouts = {op.name: [d.layout or "ND" for d in op.input_desc] for op in lowered.graph.op}
    fixed = {op.name for op in lowered.graph.op if op.type.startswith("Const")}
    known: dict[tuple, placement.Placed] = {}  # few of the nodes differ in this
    for use in uses:
        if use.constant:
            fixed.add(use.name)
        operands = tuple(
            placement.Tensor(_dtype(x), layout, source is not None and source[0] in fixed)
            if isinstance(x, Tensor)
            else None
            for x, source, layout in zip(use.operands, use.sources, layouts[use.name])
        )
        key = (
            use.kind,
            operands,
            tuple(placement.Tensor(_dtype(x)) if isinstance(x, Tensor) else None for x in use.results),
        )
        if key not in known:
            known[key] = placement.place(tables, *key)
        yield known[key]


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _where(lowered: Lowered, placed: list[tuple[Use, placement.Placed]], place: placement.Place) -> list[str]:
    return _grouped(
        [
            (use.kind, where.reason or ", ".join(where.casts), lowered.sources.get(use.name, ("", None))[1])
            for use, where in placed
            if where.place == place
        ]
    )


def _inputs(lowered: Lowered) -> dict[str, int]:
    """Bytes by the inputs' kind: "batch", "train_state.params" and so on; and of the outputs."""
    sizes: Counter[str] = Counter()
    for value in lowered.inputs:
        sizes[_kind(value)] += value.bytes
    return {**sizes, "outputs": sum(value.bytes for value in lowered.outputs)}


def _kind(value: Value) -> str:
    parts = value.name.split(".")
    return ".".join(parts[: 2 if len(parts) > 2 else 1])


def _memory(uses: list[Use]) -> dict[str, int]:
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


def _families(uses: list[Use]) -> dict[str, Family]:
    names = {kind: family for family, kinds in FAMILIES.items() for kind in kinds}
    total: dict[str, list[float]] = {family: [0, 0.0, 0.0] for family in (*FAMILIES, "element-wise and other")}
    for use in uses:
        row = total[names.get(use.kind, "element-wise and other")]
        row[0] += 1
        row[1] += flops(use) / 1e9
        row[2] += use.traffic / 1e9
    return {family: Family(int(n), round(f, 4), round(b, 4)) for family, (n, f, b) in total.items() if n}
