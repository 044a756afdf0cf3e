"""What the ops of this package become in an Ascend GE graph.

Most become aten operators while the step is traced (`kernels/<op>/ascend.py`): static shapes, and dtypes for which the
AI Core has kernels (docs/ascend.md). What cannot stays an operator and gets a converter to a GE type of its own.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from bevfn.kernels.batch_norm import ascend as batch_norm
from bevfn.kernels.deform_attn import ascend as deform_attn
from bevfn.kernels.deform_conv import ascend as deform_conv
from bevfn.kernels.linear_assignment import ascend as linear_assignment
from bevfn.kernels.neighbours import ascend as neighbours
from bevfn.kernels.sparse_conv import ascend as sparse_conv
from bevfn.kernels.voxel_pool import ascend as voxel_pool
from bevfn.kernels.voxelize import ascend as voxelize
from bevfn.kernels.wait_for import ascend as wait_for

Ops = Literal["stock", "drivingsdk"]


def table(ops: Ops = "stock") -> dict[torch._ops.OpOverload, Callable]:
    """{operator: the same in aten operators}, for `make_fx`.

    Args:
        ops: "stock" uses nothing but what CANN brings; "drivingsdk" also uses operators of that package (docs/ascend.md
            says which, and which condition the installed package must meet).
    """
    if ops not in get_args(Ops):
        raise ValueError(f"ops = {ops!r} is not known; choose one of {', '.join(get_args(Ops))}")
    return {
        **batch_norm.decompositions(),
        **voxelize.DECOMPOSITIONS,
        **neighbours.DECOMPOSITIONS,
        **sparse_conv.DECOMPOSITIONS,
        **deform_attn.DECOMPOSITIONS,
        **deform_conv.DECOMPOSITIONS,
        **(voxel_pool.DRIVINGSDK if ops == "drivingsdk" else voxel_pool.DECOMPOSITIONS),
        torch.ops.aten.detach_.default: lambda x: x,  # torch.tensor calls it; inside a decomposition it is traced
    }


def register() -> None:
    """Converters of the operators that stay; call it once, after torchair is loaded."""
    batch_norm.register()
    linear_assignment.register()
    voxel_pool.register()
    wait_for.register()


def meanings() -> dict[str, Callable[..., Any]]:
    """{custom GE type: what it computes, on a CPU}, for `interpret.prepare(graph, extra=...)`."""
    return {**linear_assignment.MEANINGS, **voxel_pool.MEANINGS}
