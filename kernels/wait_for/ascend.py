"""`wait_for` for Ascend: Identity behind a control edge from the cue.

It costs nothing. Where GE takes the Identity out it hands its control edge on to what reads it (`GraphUtils::IsolateNode`),
and its search for common subexpressions compares control edges too (`CommonSubexpressionEliminationPass`). Not run on a
device. Source: gitee ascend/graphengine, ge/graph/passes.
"""

from typing import Any

import torch


def register() -> None:
    """The converter to Identity."""
    import torchair
    from torchair._ge_concrete_graph import ge_apis as ge

    @torchair.register_fx_node_ge_converter(torch.ops.bevfn.wait_for.default)
    def convert(x: Any, cue: Any, meta_outputs: Any = None) -> Any:
        return ge.Identity(x, dependencies=[cue])
