"""`linear_assignment` for Ascend: an operator of its own on the chip's AI CPU, `cann/`.

Augmenting paths are sequential and branch on every number: nothing for the AI Core, and no stock type solves it. The AI
CPU shares the device's memory and is part of the graph, so the step stays one graph without a copy to the host.
"""

from typing import Any

import torch
from torch import Tensor

TYPE = "BevfnLinearAssignment"


def register() -> None:
    """The converter to BevfnLinearAssignment; on a device its package must be installed (cann/README.md)."""
    import torchair
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair.ge import DataType

    @torchair.register_fx_node_ge_converter(torch.ops.bevfn.linear_assignment.default)
    def convert(cost: Any, valid: Any, meta_outputs: Any = None) -> Any:
        if cost.dtype not in (DataType.DT_FLOAT, DataType.DT_DOUBLE):
            cost = ge.Cast(cost, dst_type=DataType.DT_FLOAT)
        return torchair.ge.custom_op(TYPE, inputs={"cost": cost, "valid": valid}, attrs={}, outputs=["match"])


def meaning(cost: Tensor, valid: Tensor) -> Tensor:
    """cost [B Q G] float32 or float64, valid [B G] bool -> match [B G] int64: the CPU kernel, whose core `cann/` builds."""
    if cost.dtype not in (torch.float32, torch.float64) or valid.dtype != torch.bool:
        raise ValueError(f"{TYPE}: cost is float32 or float64 and valid bool, got {cost.dtype} and {valid.dtype}")
    return torch.ops.bevfn.linear_assignment(cost, valid)


MEANINGS: dict[str, Any] = {TYPE: meaning}
