"""A flow as an ONNX file: stock operators (default domain, opset 18), fixed shapes, everything in one file.

torch.onnx translates operator by operator, with our translations where its own are wrong. The flow is its graph as it is:
`torch.onnx.export` would trace it twice more, and look for patterns in it for longer than all else takes.

Source: torch 2.13's torch/onnx/_internal/exporter, of which private functions are called here and nowhere else.
"""

import contextlib
import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import fx
from torch.onnx._internal.exporter import _core, _decomp, _fx_passes, _registration

from bevfn.export import translations
from bevfn.export.flow import PROTOBUF, Flow
from bevfn.export.program import exported
from bevfn.files import writing
from bevfn.kernels import ascend as kernels

OPSET = 18


def table() -> dict[Any, Callable]:
    """{operator: the same in operators that are translated}, for `flow.make`: this package's as for Ascend (static shapes,
    additions by index in float32), torch's as torch.onnx takes them apart."""
    own = {operator: function for operator, function in _taken_apart().items() if operator not in translations.TABLE}
    return {**own, **translations.DECOMPOSITIONS, **kernels.table()}


@cache
def _torchs() -> _registration.ONNXRegistry:
    with _quiet():
        return _registration.ONNXRegistry.from_torchlib(opset_version=OPSET)


@cache
def _taken_apart() -> dict[Any, Callable]:
    """{operator that torch.onnx does not translate: the same in others}."""
    return _decomp.create_onnx_friendly_decomposition_table(set(_decomp.get_onnx_implemented_overloads(_torchs())))


def write(flow: Flow, path: Path) -> tuple[str, ...]:
    """Writes the file, whose outputs are the flow's; boundaries are values inside, by their names.

    Returns the boundaries that are there (of those from which nothing follows none is). Raises ValueError, one sentence, that
    names an operator without translation, and for a file beyond 2 GB.
    """
    model = translated(flow)
    save(model, path)
    there = {value.name for node in model.graph for value in node.outputs}
    return tuple(name for name in flow.boundaries if name in there)


def translated(flow: Flow) -> ir.Model:
    """The model whose inputs and outputs are the flow's. Raises ValueError, one sentence, that names an operator without
    translation."""
    with _quiet(), torch.no_grad():
        model = _translated(flow)
        _tidy(model)
    names = (*flow.inputs, *flow.outputs, *flow.boundaries)
    for value, name in zip((*model.graph.inputs, *model.graph.outputs), names, strict=True):
        value.name = name
    model.graph.outputs[len(flow.outputs) :] = []  # deleted they would still count as outputs (onnx-ir 1.1)
    common.RemoveUnusedNodesPass()(model)
    return model


def save(model: ir.Model, path: Path) -> None:
    """Writes a model. Raises ValueError, one sentence, for a file beyond 2 GB."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > PROTOBUF:
        raise ValueError(
            f"the weights take {size / 2**30:.1f} GB, more than the 2 GB of an ONNX file; export with --precision fp16, or "
            "--to aoti"
        )
    with writing(path):
        ir.save(model, path)


def _registry() -> _registration.ONNXRegistry:
    """torch.onnx's translations, ours before them."""
    registry = copy.copy(_torchs())
    registry.functions = {name: list(found) for name, found in registry.functions.items()}
    for operator, function in translations.TABLE.items():
        registry.register_op(operator, function)
    return registry


def _translated(flow: Flow) -> ir.Model:
    registry = _registry()
    check(flow.module, registry)
    program = exported(flow)
    _fx_passes.insert_type_promotion_nodes(program.graph_module)
    try:
        return _core._exported_program_to_onnx_program(program, registry=registry).model
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(_refused(program.graph, error)) from error


def _refused(graph: fx.Graph, error: BaseException) -> str:
    """What torch.onnx refused, with the layer and line of the node that it names, and the reason, which is the innermost error's."""
    named = re.search(r"node %(\w+)", str(error))
    node = next((node for node in graph.nodes if named is not None and node.name == named[1]), None)
    while error.__cause__ is not None:
        error = error.__cause__
    what, where = ("the graph", None) if node is None else (node.target, node.meta.get("source"))
    return (
        f"ONNX has no translation of {what} with these arguments ({str(error).partition(chr(10))[0]}), at "
        f"{where or 'an unknown line'}; write one in bevfn/export/translations.py"
    )


def check(module: fx.GraphModule, registry: _registration.ONNXRegistry) -> None:
    """Raises ValueError, naming operator, layer and line, unless there is a translation of every operator, be it not of all
    arguments."""
    for node in module.graph.nodes:
        operator = node.target
        if isinstance(operator, torch._ops.OpOverload) and not registry.is_registered(operator):
            raise ValueError(
                f"ONNX has no translation of {operator}, at {node.meta.get('source') or 'an unknown line'}; write one in "
                "bevfn/export/translations.py"
            )


def _tidy(model: ir.Model) -> None:
    """Shapes and numbers computed once, equal nodes once; nothing of this machine's files stays."""
    passes: tuple[Callable[[ir.Model], Any], ...] = (
        common.InlinePass(),
        optimizer.fold_constants,
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
    )
    for apply in passes:
        apply(model)
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx says of its own parts (torchvision's operators, deprecated names)."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
