"""A flow as torch.export's program, without tracing it again: what torch's own writers of files take."""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from bevfn.ascend.trace import placeholders, results
from bevfn.export.flow import Flow


def exported(flow: Flow) -> ExportedProgram:
    """The flow in torch.export's form: a copy of its graph, whose constants are placeholders in front."""
    graph = fx.Graph()
    renamed: dict[fx.Node, fx.Node] = {}
    held = {}
    for node in [node for node in flow.module.graph.nodes if node.op == "get_attr"]:
        name = str(node.target)
        if name not in held:
            held[name] = graph.placeholder(name)
            held[name].meta = {"val": node.meta["val"]}
        renamed[node] = held[name]
    for node, name in zip(placeholders(flow.module), flow.inputs):
        renamed[node] = graph.placeholder(name.replace(".", "_"))
        renamed[node].meta = dict(node.meta)
    ends = results(flow.module)
    copied: Any = graph.graph_copy(flow.module.graph, renamed)
    graph.output(tuple(copied))
    module = fx.GraphModule(flow.module, graph)
    constants = [
        InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True) for name, node in held.items()
    ]
    given = [
        InputSpec(InputKind.USER_INPUT, TensorArgument(renamed[node].name), None) for node in placeholders(flow.module)
    ]
    made = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(renamed[node].name), None) for node in ends]
    examples = tuple(flow.inputs.values())
    called = torch.export.ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=pytree.tree_flatten((examples, {}))[1],
        out_spec=pytree.tree_flatten(tuple(ends))[1],
    )
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=ExportGraphSignature([*constants, *given], made),
        state_dict={name: getattr(flow.module, name) for name in held},
        range_constraints={},
        module_call_graph=[torch.export.ModuleCallEntry("", called)],
        example_inputs=(examples, {}),
    )
