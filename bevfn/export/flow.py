"""A trained detector as one static graph of aten operators, from what a vehicle has to boxes, its weights as constants.

    flow = make(detector, batch, table=...)  # nothing is computed but what follows from the weights alone
    outputs = flow(*flow.inputs.values())    # what the detector predicts, then its boundaries

A batch of one. Nothing is augmented on a vehicle, so the augmentation is the identity and no input. Transforms that a matrix
inversion makes are inputs, as in `Batch`: their rounding must not depend on the runtime.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, fx

from bevfn import tree
from bevfn.ascend.trace import Traced, placeholders, results, trace
from bevfn.data.batch import Batch
from bevfn.detector import Detector

Entry = Literal["points", "voxels"]
PROTOBUF = 2**31 - 1  # bytes of one message at most, which an ONNX file is, and an .air
LEAST = 1 << 16  # bytes of a constant that may be larger than what it follows from
VOXELIZE = torch.ops.bevfn.voxelize.default
VOXELS = ("voxel_features", "voxel_coords", "voxel_count", "voxels_found")  # results of kernels.voxelize
READ_ON_HOST = ("boxes", "labels", "boxes_valid", "depth", "base_aug", "undo_base_aug")  # of a Batch: never inputs


@dataclass(frozen=True)
class Flow:
    """The graph and what its inputs and outputs are."""

    module: fx.GraphModule
    """tensors in the order of `inputs` -> tensors in the order of `outputs`, then of `boundaries`; constants are its buffers"""
    inputs: dict[str, Tensor]
    """by name, as of the batch that it was made with"""
    outputs: tuple[str, ...]
    """what is detected, and counts of what did not fit a capacity ("overflow/*")"""
    boundaries: tuple[str, ...]
    """what the model's parts hand on, by the paths of `apply`'s outputs, in the order in which they are computed"""

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Outputs and boundaries by name."""
        return dict(zip((*self.outputs, *self.boundaries), self.module(*inputs), strict=True))


def make(
    detector: Detector,
    batch: Batch,
    *,
    entry: Entry = "points",
    table: dict[Any, Callable],
    bits: bool = False,
    decode: Callable[[dict], dict[str, Tensor]] | None = None,
    begins: Mapping[str, Tensor] = MappingProxyType({}),
) -> Flow:
    """The graph of a detector for batches of this one's shapes.

    Args:
        batch: of one sample, not augmented.
        entry: where it begins: at points, or at the voxels of them (`kernels.voxelize`).
        table: {operator: the same in others}, of the file's kind.
        bits: whether integers are sorted as the bits of floats where the model says so: of Ascend's AI Core.
        decode: `apply`'s outputs -> the graph's; by default the detections.
        begins: boundaries that are inputs in the place of all that they follow from, with values of them.

    Raises ValueError, one sentence, for a model that detects nothing, and for voxels of one that makes none.
    """
    task = detector.task
    if task.apply is None or task.decode is None:
        raise ValueError(f"{detector.config.model} detects nothing; export a detector that was trained from it")
    apply, decode = task.apply, decode or task.decode
    identity = {"base_aug": torch.eye(4)[None], "undo_base_aug": torch.eye(3)[None]}

    def step(weights: tuple[dict, dict], given: dict[str, Tensor]) -> tuple[dict, dict]:
        outputs, _ = apply(*weights, Batch(batch.base, **identity, **given))
        return decode(outputs), tree.flatten(outputs)

    given = {f.name: getattr(batch, f.name) for f in fields(Batch) if f.name not in ("base", *READ_ON_HOST)}
    given = {name: value for name, value in given.items() if value is not None}
    weights = (detector.params, detector.state)
    kept = {operator: function for operator, function in table.items() if entry == "points" or operator != VOXELIZE}
    with torch.no_grad():
        traced = trace(
            step, (weights, given), decompositions=kept, takes=("weights", "given"), returns=("outputs", "boundaries")
        )
        taken = placeholders(traced.module)
        _fold(traced.module, dict(zip(taken, tree.leaves(weights))))
        inputs = dict(zip(taken[-len(given) :], given.items()))
        if entry == "voxels":
            inputs |= _from_voxels(traced.module, inputs, detector.config.model)
    simplified(traced.module, bits=bits)
    inputs |= _from_boundaries(traced, begins)
    return _named(traced, inputs)


def simplified(module: fx.GraphModule, *, bits: bool = False) -> None:
    """The same graph without what says nothing in a file: names of a tensor for a gradient, and (unless `bits`) casts of bits
    around a sort."""
    nodes: list[Any] = list(module.graph.nodes)
    for node in nodes:
        if node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    for node in nodes if not bits else ():
        if node.target is torch.ops.aten.sort.stable and node.args[0].target is torch.ops.aten.view.dtype:
            _sort_integers(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _sort_integers(sort: Any) -> None:
    """Integers that are sorted as the bits of positive floats, since Ascend's AI Core sorts floats alone, are sorted
    themselves: the same order, and ONNX has no cast of bits."""
    bits = sort.args[0].args[0]
    sort.args = (bits, *sort.args[1:])
    sort.meta = {**sort.meta, "val": (bits.meta["val"], sort.meta["val"][1])}
    for part in [part for part in sort.users if part.args[1] == 0]:
        part.meta = {**part.meta, "val": bits.meta["val"]}
        for back in [user for user in part.users if user.target is torch.ops.aten.view.dtype]:
            back.replace_all_uses_with(part)
            back.graph.erase_node(back)


def _fold(module: fx.GraphModule, weights: dict[fx.Node, Tensor]) -> None:
    """What follows from weights and numbers alone becomes a constant, unless that is larger than what it follows from."""
    known: dict[fx.Node, Any] = dict(weights)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = getattr(module, str(node.target))
        if node.op != "call_function" or not all(parent in known for parent in node.all_input_nodes):
            continue
        operator, args, kwargs = _call(node, known.__getitem__)
        value = operator(*args, **kwargs)
        room = max(LEAST, sum(_bytes(known[parent]) for parent in node.all_input_nodes))
        if not isinstance(value, Tensor) or _bytes(value) <= room:
            known[node] = value
    for node, value in known.items():
        if node.op != "get_attr" and isinstance(value, Tensor) and any(user not in known for user in node.users):
            _constant(module, node, value)
    module.graph.eliminate_dead_code()
    for node in weights:
        module.graph.erase_node(node)


def _call(node: fx.Node, value: Callable[[fx.Node], Any]) -> tuple[Any, Any, Any]:
    """(operator, arguments, keyword arguments) of a node with values for nodes."""
    return node.target, fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)


def _bytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.itemsize for leaf in tree.leaves(value))


def _constant(module: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """A buffer in the place of a node."""
    name = f"constant_{node.name}"
    module.register_buffer(name, value.detach().contiguous().clone())
    with module.graph.inserting_before(node):
        read = module.graph.get_attr(name)
    read.meta = {"val": node.meta["val"], "source": node.meta.get("source")}
    node.replace_all_uses_with(read)


def _from_voxels(
    module: fx.GraphModule, inputs: dict[fx.Node, tuple[str, Tensor]], model: str
) -> dict[fx.Node, tuple[str, Tensor]]:
    """Cuts the graph behind `voxelize`, whose results become inputs: these, with their values."""
    graph = module.graph
    made = [node for node in graph.nodes if node.target is VOXELIZE]
    if not made:
        raise ValueError(f"{model} makes no voxels; leave out --input voxels")
    (node,) = made
    operator, args, _ = _call(node, lambda parent: inputs[parent][1])
    values = operator(*args)
    begins, first = {}, next(iter(graph.nodes))
    users: list[Any] = list(node.users)
    for part in sorted(users, key=lambda part: part.args[1]):
        index = part.args[1]
        with graph.inserting_before(first):
            begin = graph.placeholder(VOXELS[index])
        begin.meta = dict(part.meta)
        begins[begin] = (VOXELS[index], values[index])
        part.replace_all_uses_with(begin)
        graph.erase_node(part)
    graph.erase_node(node)
    return begins


def _from_boundaries(traced: Traced, begins: Mapping[str, Tensor]) -> dict[fx.Node, tuple[str, Tensor]]:
    """Boundaries as inputs: these, with their values."""
    ends = dict(zip((value.name for value in traced.outputs), results(traced.module)))
    made = {}
    for name, given in begins.items():
        node = _original(ends[f"boundaries.{name}"])
        with traced.module.graph.inserting_before(next(iter(traced.module.graph.nodes))):
            begin = traced.module.graph.placeholder(name.replace(".", "_"))
        begin.meta = dict(node.meta)
        node.replace_all_uses_with(begin)
        made[begin] = (name, given)
    return made


def _named(traced: Traced, inputs: dict[fx.Node, tuple[str, Tensor]]) -> Flow:
    """The graph with the inputs that are read, its boundaries in the order in which they are computed."""
    module, graph = traced.module, traced.module.graph
    ends = dict(zip((value.name for value in traced.outputs), results(module)))
    outputs, boundaries = (
        {name.removeprefix(kind): node for name, node in ends.items() if name.startswith(kind)}
        for kind in ("outputs.", "boundaries.")
    )
    place = {node: i for i, node in enumerate(graph.nodes)}
    read = _ancestors(outputs.values())
    computed = {name: node for name, node in boundaries.items() if _original(node) in read}
    computed = dict(sorted(computed.items(), key=lambda item: place[item[1]]))
    graph.output_node().args = ([*outputs.values(), *computed.values()],)
    graph.eliminate_dead_code()
    for node in set(inputs) - {node for node in inputs if node.users}:
        graph.erase_node(node)
    graph.lint()
    module.recompile()
    given = dict(inputs[node] for node in placeholders(module))
    return Flow(module, given, tuple(outputs), tuple(computed))


def _ancestors(ends: Iterable[fx.Node]) -> set[fx.Node]:
    """What is computed for these nodes, and they."""
    found, rest = set[fx.Node](), list(ends)
    while rest:
        node = rest.pop()
        if node not in found and node.op == "call_function":
            found.add(node)
            rest += node.all_input_nodes
    return found


def _original(node: Any) -> Any:
    """What a node is a copy of, or itself."""
    while node.target is torch.ops.aten.clone.default:
        node = node.args[0]
    return node
