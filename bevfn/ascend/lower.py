"""A step as one Ascend GE graph, through torchair's own converters, ours, and checks of what they get wrong.

    lowered = lower(step, (train_state, batch))                      # nothing is computed, no device is needed
    outputs = interpret.run(lowered.graph, lowered.arguments(train_state, batch))
    train_state, metrics = lowered.results(outputs)

The graph has static shapes only. It is the one that a device compiles: its step is traced by the same function.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from bevfn.ascend import torchair
from bevfn.ascend.fixes import converters, decompositions, refusals, rewrites
from bevfn.ascend.trace import CodeLine, Traced, Value, trace
from bevfn.kernels import ascend as kernels

NPU = 1  # placement and executor in torchair's numbering


@dataclass(frozen=True)
class Missing:
    """An operator that could not be converted."""

    op: str
    source: CodeLine | None
    reason: str

    def __str__(self) -> str:
        return f"{self.op} at {self.source or 'an unknown line'}: {self.reason}"


@dataclass(frozen=True)
class Converted:
    """The GE graph of a graph of aten operators."""

    graph: Any
    """torchair's ge_ir_pb2.GraphDef"""
    used: tuple[int, ...]
    """of the Data nodes by index, which placeholder each is; those that nobody reads are not among them"""
    places: tuple[int, ...]
    """of the aten graph's outputs, which input of NetOutput each is"""
    sources: dict[str, tuple[str, CodeLine | None]]
    missing: tuple[Missing, ...]


@dataclass(frozen=True)
class Lowered:
    """One GE graph and what its inputs and outputs are."""

    graph: Any
    """torchair's ge_ir_pb2.GraphDef; docs/ascend.md says how to read it"""
    inputs: tuple[Value, ...]
    """of the Data nodes, by index; inputs of the step that it does not use are not among them"""
    outputs: tuple[Value, ...]
    """of NetOutput, in order"""
    aten: fx.GraphModule
    """the graph that was converted"""
    seconds: float
    """to trace and convert"""
    sources: dict[str, tuple[str, CodeLine | None]]
    """{name of a GE node: (aten operator it came from, where that was written)}"""
    missing: tuple[Missing, ...]
    """operators without a converter; empty unless `lower` was not strict"""
    used: tuple[int, ...]
    """for every input its place among the tensors of the step's arguments"""
    spec: pytree.TreeSpec
    returned: tuple[int | None, ...]
    """for every leaf of `spec`, what the step returns, its place in `outputs`"""
    ops: kernels.Ops
    """what this package's own operators became"""

    def arguments(self, *arguments: Any) -> list[Tensor]:
        """The graph's inputs for a call of the step, contiguous."""
        tensors = [x for x in pytree.tree_leaves(arguments) if x is not None]
        return [tensors[i].contiguous() for i in self.used]

    def results(self, outputs: Sequence[Tensor]) -> Any:
        """What the step returns, of the graph's outputs."""
        return pytree.tree_unflatten([None if i is None else outputs[i] for i in self.returned], self.spec)


def lower(
    step: Callable,
    arguments: tuple,
    *,
    takes: tuple[str, ...] = (),
    returns: tuple[str, ...] = (),
    ops: kernels.Ops = "stock",
    strict: bool = True,
) -> Lowered:
    """Lowers `step(*arguments)`; the arguments are pytrees of CPU tensors, of which only shapes and dtypes matter.

    Args:
        takes: names of the arguments; the step's own by default.
        returns: names of what the step returns, if it returns a tuple.
        ops: what this package's own operators become, see `bevfn.kernels.ascend`.
        strict: operators without a converter, or with one that is refused, are an error; otherwise they are listed in
            `missing`, and nodes of the type "Missing" stand where there is no converter.

    Raises ValueError naming operators and lines: no converter (strict), or a graph that depends on values.
    """
    torchair.load()
    started = time.perf_counter()
    traced = aten(step, arguments, takes=takes, returns=returns, ops=ops)
    made = convert(traced.module, [value.name for value in traced.inputs], strict=strict)
    outputs = [Value("", (), torch.float32)] * len(traced.outputs)
    for i, value in enumerate(traced.outputs):
        outputs[made.places[i]] = value
    return Lowered(
        made.graph,
        inputs=tuple(traced.inputs[i] for i in made.used),
        outputs=tuple(outputs),
        aten=traced.module,
        seconds=time.perf_counter() - started,
        sources=made.sources,
        missing=made.missing,
        used=made.used,
        spec=traced.spec,
        returned=tuple(None if i is None else made.places[i] for i in traced.returned),
        ops=ops,
    )


def aten(
    step: Callable,
    arguments: tuple,
    *,
    takes: tuple[str, ...] = (),
    returns: tuple[str, ...] = (),
    ops: kernels.Ops = "stock",
) -> Traced:
    """The graph of aten operators that is converted, here and on a device; see `lower`."""
    traced = trace(step, arguments, decompositions=tables(ops), takes=takes, returns=returns)
    rewrites.apply(traced.module)
    return traced


def tables(ops: kernels.Ops = "stock") -> dict[Any, Callable]:
    """{operator: the same in operators that have converters}, for `trace`."""
    return {**decompositions.table(), **kernels.table(ops)}


HF32 = False
"""Whether float32 may be computed with HF32's 11 bits on an Ascend: fp32 and fp16's float32 parts mean float32."""


def register_converters() -> None:
    """Ours, over torchair's: once per process, after torchair is loaded (here without a device, or with one)."""
    if getattr(register_converters, "done", False):
        return
    register_converters.done = True  # type: ignore[attr-defined]
    converters.register()
    kernels.register()


def config() -> Any:
    """torchair's CompilerConfig of a train step."""
    import torchair as ta

    made = ta.CompilerConfig()
    made.experimental_config.pattern_fusion_pass = False  # rewrites for language models, which need torch_npu
    made.experimental_config.remove_noop_ops = False  # see `fixes.rewrites`
    return made


def convert(module: fx.GraphModule, names: Sequence[str], *, strict: bool = True) -> Converted:
    """The GE graph of a graph of aten operators (`aten`, or `rewrites.apply` of one that was traced with `tables`).

    Args:
        names: of its placeholders, in order; the Data nodes'. Tensors that the module holds become Const nodes.
        strict: as of `lower`

    Raises ValueError as `lower` does.
    """
    torchair.load()
    register_converters()
    concrete, sources, missing = _convert(module)
    if strict and missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"no Ascend converter for {missing[0]}{more}; `bevfn graph` lists all")
    used = tuple(info.func.fx_input_idx for info in concrete._input_info_list)
    renamed = _finish(concrete.graph._proto, [names[i] for i in used])
    return Converted(
        concrete.graph._proto,
        used=used,
        places=tuple(place for _, place in sorted(concrete._fx_outputs_mapping.items())),
        sources={renamed.get(node, node): source for node, source in sources.items()},
        missing=tuple(missing),
    )


def _convert(module: fx.GraphModule) -> tuple[Any, dict[str, tuple[str, CodeLine | None]], list[Missing]]:
    """(torchair's concrete graph, where every node came from, operators without a converter)."""
    from torchair._ge_concrete_graph.compat_ir import ge_op
    from torchair._ge_concrete_graph.fx2ge_converter import GeConcreteGraph, set_ge_outputs
    from torchair._utils.graph_transform_observer import GraphTransformObserver
    from torchair.npu_fx_compiler import _NpuGraphConverter, _optimize_fx

    sources: dict[str, tuple[str, CodeLine | None]] = {}
    missing: list[Missing] = []
    compiler_config = config()
    # Private parts of torchair, for its public door compiles for a device: everything up to its GE graph, and no further.
    fakes = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    concrete = GeConcreteGraph(compiler_config, name="step")
    concrete.graph.op_name_list = _Names()

    class Converter(_NpuGraphConverter):
        def run_node(self, node: fx.Node) -> Any:
            before, source = len(concrete.graph.op), node.meta.get("source")
            reason = refusals.reason(node)
            # torchair calls an operator that it does not know, for its shapes: on fake tensors, not on what `empty` holds.
            own = getattr(node.target, "namespace", "") == "bevfn" and fakes
            try:
                with fakes[0].fake_mode if own else contextlib.nullcontext():
                    value = super().run_node(node)
            except (
                Exception
            ) as error:  # whatever a converter raises: all that is missing is listed, not the first alone
                if node.op != "call_function":
                    raise
                reason = reason or _reason(node, error)
                value = self._get_value_pack(node.meta["val"], _missing(node.meta["val"]))
            if reason:
                missing.append(Missing(str(node.target), source, reason))
            for op in concrete.graph.op[before:]:
                sources[op.name] = (str(node.target), source)
            return value

    def _missing(meta: Any) -> Any:
        tensors = meta if isinstance(meta, (tuple, list)) else [meta]
        made = ge_op(op_type="Missing", inputs={}, outputs=[f"y{i}" for i in range(len(tensors))])
        made = list(made) if isinstance(made, (tuple, list)) else [made]
        set_ge_outputs(made, tensors)
        return made if isinstance(meta, (tuple, list)) else made[0]

    observer = GraphTransformObserver(module, fakes, compiler_config)
    context = torch._guards.TracingContext(fakes[0].fake_mode if fakes else None)
    with torch._guards.tracing(context), torch.no_grad():
        module = _optimize_fx(module, compiler_config, observer)
        concrete.save_fx_graph(module)
        Converter(module, graph=concrete, garbage_collect_values=False).run(*fakes)
        concrete.optimize_graph_without_runtime(*fakes, observer=observer, aot_gm=module)
    return concrete, sources, missing


class _Names(set):
    """The names that a graph has given: torchair looks for every new one among all of them, a tenth of all its time."""

    append = set.add


def _reason(node: fx.Node, error: Exception) -> str:
    """Why there was no conversion; torchair's own texts about operators without a converter are long and beside the point."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    known = hasattr(node.target, "_ge_converter") and "ge_converter is not" not in str(error)
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}" if known else "it has no converter"


def _finish(graph: Any, names: list[str]) -> dict[str, str]:
    """Data nodes named after what they hold, and on the device: {old name: new name}."""
    renamed: dict[str, str] = {}
    for op in graph.op:
        if op.type == "Data":
            renamed[op.name] = names[op.attr["index"].i]
            for descriptor in (*op.input_desc, *op.output_desc):
                descriptor.device_type = "NPU"
                descriptor.attr.pop("_host_tensor", None)
            op.attr.pop("_host_tensor", None)
    for op in graph.op:
        op.name = renamed.get(op.name, op.name)
        for i, name in enumerate(op.input):
            producer, _, index = name.rpartition(":")
            if producer in renamed:
                op.input[i] = f"{renamed[producer]}:{index}"
    # The step was traced on CPU tensors, which torchair takes for inputs that stay on the host.
    graph.attr["_input_placements"].list.i[:] = [NPU] * len(names)
    graph.attr["_executor_type"].i = NPU
    return renamed
