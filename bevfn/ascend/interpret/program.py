"""A GE graph prepared once and executed node by node, with every result checked against its descriptor.

Nodes run in the graph's own order, made topological; what the outputs do not need does not run (GE prunes it too).
A value is dropped after its last use. Source: torchair's ge_ir.proto.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bevfn.ascend.interpret import node as nodes
from bevfn.ascend.interpret.node import Described, Invalid, Node, Opaque, Output, Unsupported, Value

Watch = Callable[[Node, tuple[Value, ...]], None]
_KNOWN_HERE = {"Data", "Const", "Constant", "NetOutput"}


@dataclass(frozen=True)
class Step:
    node: Node
    call: Callable[[list[Value | None]], Any]
    last_uses: tuple[Output, ...]  # values that nobody reads after this step, its own results included


@dataclass(frozen=True)
class Program:
    inputs: tuple[tuple[Output, Described], ...]  # in the order of the graph's inputs
    constants: Mapping[Output, Tensor]
    steps: tuple[Step, ...]
    outputs: tuple[tuple[Output, Described], ...]


def prepare(graph: Any, functions: Mapping[str, Callable[..., Any]], refused: Mapping[str, str]) -> Program:
    """The program of a GraphDef.

    functions: meaning of each GE type; refused: types that cannot be executed, with the reason. Raises Unsupported or
    Invalid for the first node, in the graph's order, that cannot be bound to its type's function.
    """
    ops = {op.name: op for op in graph.op}
    all_nodes = {name: _about(op, nodes.read, op) for name, op in ops.items()}
    ends = [node for node in all_nodes.values() if node.type == "NetOutput"]
    if len(ends) != 1:
        raise Invalid(f"a GE graph has one NetOutput, this one has {len(ends)}")
    order = list(_needed(ends[0], all_nodes))
    _known(order, functions, refused)
    work = [node for node in order if node.type not in _KNOWN_HERE]
    _check_writes(work, order, all_nodes)
    calls = {node.name: _about(node, nodes.bind, ops[node.name], functions[node.type]) for node in work}
    kept = {source for source in ends[0].sources if source}
    last_uses = _last_uses(work, kept)
    described = [_about(ends[0], nodes.described, desc) for desc in ops[ends[0].name].input_desc]
    return Program(
        inputs=_inputs(ops.values(), all_nodes),
        constants={(n.name, 0): _about(n, nodes.constant, ops[n.name]) for n in order if n.type.startswith("Const")},
        steps=tuple(Step(node, calls[node.name], last_uses[node.name]) for node in work),
        outputs=tuple((source, desc) for source, desc in zip(ends[0].sources, described) if source),
    )


def execute(program: Program, inputs: Sequence[Tensor], watch: Watch | None = None) -> list[Tensor]:
    """The graph's outputs, as new tensors; `inputs` are not written. See `interpret.run`."""
    values: dict[Output, Value] = dict(program.constants)
    values.update(_checked_inputs(program, inputs))
    borrowed = {_address(value) for value in values.values()} - {None}
    with torch.no_grad():
        for step in program.steps:
            operands = [None if source is None else values[source] for source in step.node.sources]
            for position in step.node.written:
                _check_alone(step, position, values, borrowed)
            results = _call(step, operands)
            if watch is not None:
                watch(step.node, results)
            values.update({(step.node.name, i): result for i, result in enumerate(results)})
            for source in step.last_uses:  # a full-size step's values do not fit the memory side by side
                values.pop(source, None)
    return [_output(values[source], described, borrowed) for source, described in program.outputs]


# ------------------------------------------------------------------------------------------------------ preparation


def _about(what: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), its errors prefixed with the node they are about."""
    try:
        return function(*arguments)
    except (Unsupported, Invalid) as error:
        text = str(error)
        where = f"GE node {what.name} ({what.type})"
        raise type(error)(text if text.startswith(where) else f"{where}: {text}") from None


def _needed(end: Node, all_nodes: Mapping[str, Node]) -> Iterator[Node]:
    """The nodes that `end` needs, itself included, each after what it needs, otherwise in the graph's order."""
    needed, stack = {end.name}, [end]
    while stack:
        for name in stack.pop().after:
            if name not in all_nodes:
                raise Invalid(f"the GE graph has no node {name!r}, which another one reads")
            if name not in needed:
                needed.add(name)
                stack.append(all_nodes[name])
    # Depth first with a stack of its own: graphs are deeper than Python's recursion limit.
    done: set[str] = set()
    for root in all_nodes.values():
        if root.name not in needed:
            continue
        path = [root]
        entered: set[str] = set()
        while path:
            missing = [name for name in path[-1].after if name not in done]
            if path[-1].name in done or not missing:
                current = path.pop()
                if current.name not in done:
                    done.add(current.name)
                    yield current
            elif path[-1].name in entered:
                raise Invalid(f"the GE graph has a cycle through {path[-1].name!r}")
            else:
                entered.add(path[-1].name)
                path.extend(all_nodes[name] for name in reversed(missing))


def _known(order: list[Node], functions: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    unknown = [node for node in order if node.type not in functions and node.type not in _KNOWN_HERE]
    if not unknown:
        return
    first = unknown[0]
    counts = Counter(node.type for node in unknown[1:])
    more = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    reason = refused.get(first.type, "the type is not known")
    raise Unsupported(f"{first}: {reason}" + (f"; neither can {more} be executed" if more else ""))


def _check_writes(work: list[Node], order: list[Node], all_nodes: Mapping[str, Node]) -> None:
    """Raises Invalid where a node writes into a value that another node reads, or that is not the graph's own."""
    readers: dict[Output, list[Node]] = {}
    for node in order:
        for source in node.sources:
            if source:
                readers.setdefault(source, []).append(node)
    for node in work:
        for position in node.written:
            source = node.sources[position]
            if source is None:
                continue
            others = [reader.name for reader in readers[source] if reader is not node]
            reader_twice = sum(other == source for other in node.sources) > 1
            if others or reader_twice or all_nodes[source[0]].type in _KNOWN_HERE:
                also = f"{others[0]} reads it too" if others else "it is not the node's own to write"
                raise Invalid(
                    f"{node}: writes in place into {source[0]}, and {also}; without a TensorMove the result is undefined"
                )


def _last_uses(work: list[Node], kept: set[Output]) -> dict[str, tuple[Output, ...]]:
    last: dict[Output, str] = {}
    for node in work:
        last.update({(node.name, i): node.name for i in range(len(node.outputs))})
        last.update({source: node.name for source in node.sources if source})
    uses: dict[str, list[Output]] = {node.name: [] for node in work}
    for source, name in last.items():
        if source not in kept:
            uses[name].append(source)
    return {name: tuple(sources) for name, sources in uses.items()}


def _inputs(ops: Any, all_nodes: Mapping[str, Node]) -> tuple[tuple[Output, Described], ...]:
    data = sorted((op.attr["index"].i, op.name) for op in ops if op.type == "Data")
    if [index for index, _ in data] != list(range(len(data))):
        raise Invalid(f"the graph's inputs are not numbered 0 to {len(data) - 1}: {data}")
    return tuple(((name, 0), all_nodes[name].outputs[0]) for _, name in data)


# -------------------------------------------------------------------------------------------------------- execution


def _checked_inputs(program: Program, inputs: Sequence[Tensor]) -> dict[Output, Value]:
    if len(inputs) != len(program.inputs):
        raise Invalid(f"the graph has {len(program.inputs)} inputs, got {len(inputs)} tensors")
    values: dict[Output, Value] = {}
    for (source, described), tensor in zip(program.inputs, inputs):
        problem = described.problem(tensor)
        if problem:
            raise Invalid(f"input {len(values)} of the graph ({source[0]}): {problem}")
        values[source] = tensor.detach().contiguous()
    return values


def _call(step: Step, operands: list[Value | None]) -> tuple[Value, ...]:
    """The node's results: contiguous, as on the device, but broadcasts stay views of stride 0."""
    node = step.node
    try:
        returned = step.call(operands)
    except (Unsupported, Invalid) as error:
        raise type(error)(f"{node}: {error}; operands: {_shown(node, operands)}") from None
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise Invalid(f"{node}: {first_line}; operands: {_shown(node, operands)}") from error
    results = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
    if len(results) != len(node.outputs):
        raise Invalid(f"{node}: {len(results)} results, but {len(node.outputs)} output descriptors")
    for result, described in zip(results, node.outputs):
        problem = described.problem(result)
        if problem:
            raise Invalid(f"{node}: output {problem}; operands: {_shown(node, operands)}")
    return tuple(
        result.contiguous() if isinstance(result, Tensor) and 0 not in result.stride() else result for result in results
    )


def _shown(node: Node, operands: list[Value | None]) -> str:
    return ", ".join(f"{name} {nodes.show(value)}" for name, value in zip(node.operands, operands)) or "none"


def _check_alone(step: Step, position: int, values: Mapping[Output, Value], borrowed: set[int | None]) -> None:
    """Raises Invalid if an operand written in place shares its memory with an input or a value still to be read."""
    written = step.node.sources[position]
    if written is None:
        return
    address = _address(values[written])
    if address is None:
        return
    own = {written, *step.last_uses} - {source for source in step.node.sources if source and source != written}
    others = [source[0] for source, value in values.items() if source not in own and _address(value) == address]
    if others or address in borrowed:
        also = others[0] if others else "an input or a constant of the graph"
        raise Invalid(
            f"{step.node}: writes in place into memory shared with {also}; without a TensorMove the result is undefined"
        )


def _address(value: Value) -> int | None:
    """Where a value's memory begins; None if it has none."""
    return (value.untyped_storage().data_ptr() or None) if isinstance(value, Tensor) else None


def _output(value: Value, described: Described, borrowed: set[int | None]) -> Tensor:
    if isinstance(value, Opaque):
        raise Invalid(f"output {described.name} of the graph is {value}")
    problem = described.problem(value)
    if problem:
        raise Invalid(f"output of the graph: {problem}")
    borrows = _address(value) in borrowed
    return value.clone(memory_format=torch.contiguous_format) if borrows else value.contiguous()
