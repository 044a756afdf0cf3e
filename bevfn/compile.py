"""A step under a compiler: one graph, cheap guards, the old state's buffers reused.

Inductor compiles C++ with -ffp-contract=off, so fused geometry rounds as eager does (see `geometry`).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch._dynamo.utils import counters

Backend = Literal["inductor", "aot_eager", "eager"]
LATER = {"torchair": "`bevfn graph`", "npugraph-ex": "`bevfn graph`"}  # issue ASCEND


def step(step_fn: Callable, *, backend: str = "inductor", donate: bool = True) -> Callable:
    """step_fn(train_state, batch) -> (train_state, metrics) as one compiled graph of the same signature.

    The graph takes a flat list of tensors: guards on a thousand dict entries would cost as much as a small step.
    With `donate` the new state is written into the old one's buffers at the graph's end, so that a step does not hold
    two copies of the training state: the state passed in is the state that comes out, and its old values are gone.
    """
    check_backend(backend)

    def flat(leaves: list[torch.Tensor], spec: pytree.TreeSpec, kept: int) -> tuple[list[torch.Tensor], dict]:
        new, metrics = step_fn(*pytree.tree_unflatten(leaves, spec))
        new_leaves = pytree.tree_leaves(new)
        if len(new_leaves) != kept:
            raise ValueError(f"the step returned a train state of {len(new_leaves)} leaves for one of {kept}")
        if not donate:
            return new_leaves, metrics
        for old, leaf in zip(leaves, new_leaves):
            old.copy_(leaf)
        return [], metrics

    run = _compiled(flat, backend)

    def compiled(train_state: Any, batch: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        kept, state_spec = pytree.tree_flatten(train_state)
        leaves, spec = pytree.tree_flatten((train_state, batch))
        with torch.no_grad():
            new, metrics = run(leaves, spec, len(kept))
        return (train_state if donate else pytree.tree_unflatten(new, state_spec)), metrics

    return compiled


def function(f: Callable, *, backend: str = "inductor") -> Callable:
    """f(*pytrees) as one compiled graph, without gradients."""
    check_backend(backend)

    def flat(leaves: list[torch.Tensor], spec: pytree.TreeSpec) -> Any:
        return f(*pytree.tree_unflatten(leaves, spec))

    run = _compiled(flat, backend)

    def compiled(*arguments: Any) -> Any:
        with torch.no_grad():
            return run(*pytree.tree_flatten(arguments))

    return compiled


def check_backend(backend: str) -> None:
    """Raises ValueError unless `backend` can run here."""
    if backend in LATER:
        raise ValueError(
            f"backend {backend!r} needs an Ascend NPU, which bevfn does not drive yet; offline: {LATER[backend]}"
        )
    if backend not in ("inductor", "aot_eager", "eager"):
        raise ValueError(f"backend {backend!r} is unknown; choose inductor, aot_eager or eager")


def _compiled(flat: Callable, backend: str) -> Callable:
    return flat if backend == "eager" else torch.compile(flat, fullgraph=True, dynamic=False, backend=backend)


def graph_counts() -> dict[str, int]:
    """What Dynamo has done in this process since `torch._dynamo.reset()`: graphs compiled and graph breaks."""
    return {
        "graphs": counters["stats"].get("unique_graphs", 0),
        "breaks": sum(counters["graph_break"].values()),
    }
