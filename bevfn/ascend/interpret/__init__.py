"""Executes a GE graph (torchair's GraphDef) on the CPU, node by node, from the published meaning of each GE type.

Nothing comes from the aten operator a node was made from, so what a converter does wrong shows. What is not known is
`Unsupported`, what contradicts prototype or descriptors is `Invalid`; memory nobody wrote is poison, undefined order is
made to differ from torch's, a device's private bits are opaque. Half precision is computed in float32 and rounded once
where the device's units do so. Results do not depend on the host beyond the rounding of torch's float32 kernels.

Source: CANN's operator repositories on GitHub, hicann/ops-nn, ops-math, ops-cv (prototypes with their comments);
torchair's ge_ir.proto; prototypes in torchair's builders.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from bevfn.ascend.interpret import (
    a2,
    activation,
    conv,
    elementwise,
    foreach,
    gather_scatter,
    loss,
    matmul,
    norm,
    pool,
    reduce,
    resize,
    shape,
    sort,
)
from bevfn.ascend.interpret.node import Invalid, Node, Unsupported
from bevfn.ascend.interpret.program import Program, Watch, execute
from bevfn.ascend.interpret.program import prepare as _prepare

__all__ = ["FUNCTIONS", "REFUSED", "Device", "Invalid", "Node", "Program", "Unsupported", "Watch", "prepare", "run"]

Device = Literal["published", "a2", "a2-hf32"]
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **elementwise.OPS,
    **activation.OPS,
    **shape.OPS,
    **gather_scatter.OPS,
    **reduce.OPS,
    **sort.OPS,
    **matmul.OPS,
    **conv.OPS,
    **pool.OPS,
    **norm.OPS,
    **loss.OPS,
    **resize.OPS,
    **foreach.OPS,
}

_RANDOM = "random numbers cannot be compared with eager's, and their seed is baked into the graph; make them an input"
REFUSED = {
    "StatelessBernoulli": _RANDOM,
    "StatelessBernoulliV2": _RANDOM,
    "StatelessRandomUniformV2": _RANDOM,
    "StatelessRandomNormalV2": _RANDOM,
    "StatelessDropOutGenMask": _RANDOM,
    "DropOutGenMask": _RANDOM,
    "DropOutDoMask": _RANDOM,
    "RefData": "inputs that the graph writes are not known; lower the step as a pure function",
    "Assign": "inputs that the graph writes are not known; lower the step as a pure function",
}


def prepare(
    graph: Any, extra: Mapping[str, Callable[..., Any]] | None = None, *, device: Device = "published"
) -> Program:
    """A program that `run` executes any number of times.

    graph: torchair's GraphDef. extra: meaning of custom types, functions as `node` describes them. device: "a2" computes as
    an Atlas A2's kernels do where that differs from the published meaning (`interpret.a2`), "a2-hf32" with convolutions of
    float32 in HF32 besides, which bevfn switches off (`lower.HF32`). Raises Unsupported or Invalid,
    naming the node, for the first node that cannot be executed.
    """
    kernels = {"published": {}, "a2": a2.OPS, "a2-hf32": {**a2.OPS, **a2.HF32_OPS}}[device]
    return _prepare(graph, {**FUNCTIONS, **kernels, **(extra or {})}, REFUSED)


def run(graph: Any, inputs: Sequence[Tensor], watch: Watch | None = None) -> list[Tensor]:
    """The outputs of a GE graph, in the order of its NetOutput, for the inputs in the order of its Data nodes.

    graph: a GraphDef, or a Program that `prepare` made of it. inputs: CPU tensors of the dtypes and shapes the graph
    states; never written. watch(node, results): called after every node, to look for the first NaN, say.
    Raises Unsupported or Invalid, naming node, type and operands.
    """
    return execute(graph if isinstance(graph, Program) else prepare(graph), inputs, watch)
