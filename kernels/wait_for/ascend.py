"""`wait_for` for Ascend: Identity behind a control edge from the cue, which costs nothing.

GE merges nodes of equal type, operands, attributes and control edges. Where it takes the Identity out, it hands the edge
on to what reads it. Not run on a device. Source: hicann/ge, CommonSubexpressionEliminationPass (`GetCseKey`), IdentityPass
and `GraphUtils::IsolateNode`.
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
