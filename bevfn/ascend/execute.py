"""The lowered step against the eager one: both run from the same state, and every number is compared.

    comparison = execute(step, lowered, train_state, batch, steps=5)
    print(comparison.text())

The graph runs in the interpreter (`interpret`), from the meaning of each GE type; nothing of the eager step is used.

Two comparisons: every step from eager's state (what the graph computes), and the graph going on from its own state (how
far the two drift apart: a query or a match that flips by rounding moves everything behind it).

Errors are relative: L2 of the difference over L2 of eager's value plus 1e-3 for metrics (an IoU may be 0), and plus 1 %
of the distance that all parameters moved for leaves of the train state. Without it a bias that starts at 0, and whose
gradient is rounding because a batch norm behind it removes the shift, has an error of 1 whatever is compared.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bevfn import tree
from bevfn.ascend import interpret
from bevfn.ascend.lower import Lowered
from bevfn.kernels import ascend as kernels


@dataclass(frozen=True)
class Comparison:
    """Largest relative errors of `steps` steps."""

    steps: int
    metrics: dict[str, float]
    """By metric, each step from eager's state."""
    leaves: dict[str, float]
    """By path in the train state, each step from eager's state."""
    drift: dict[str, float]
    """By metric, the graph going on from its own state."""
    skipped: int
    """Steps whose gradients were not finite."""
    seconds: float
    """Of one step in the interpreter, mean."""

    def to_json(self) -> dict:
        """Plain data."""
        return {**asdict(self), "worst": {name: worst(getattr(self, name)) for name in ("metrics", "leaves", "drift")}}

    def text(self) -> str:
        """For the terminal."""
        (metric, metric_error), (leaf, leaf_error) = worst(self.metrics), worst(self.leaves)
        drifted, drift = worst(self.drift)
        return (
            f"interpreted against eager, {self.steps} steps ({self.skipped} skipped), {self.seconds:.1f} s a step\n"
            f"  each from eager's state: loss {self.metrics.get('loss/total', float('nan')):.1e}, worst metric "
            f"{metric_error:.1e} ({metric}), worst of {len(self.leaves)} updated leaves {leaf_error:.1e} ({leaf})\n"
            f"  from its own state: loss {self.drift.get('loss/total', float('nan')):.1e}, worst metric {drift:.1e} ({drifted})"
        )


def worst(errors: dict[str, float]) -> tuple[str, float]:
    """The largest of them."""
    return max(errors.items(), key=lambda item: item[1])


def execute(
    step: Callable,
    lowered: Lowered,
    train_state: Any,
    batch: Any,
    *,
    steps: int,
    device: interpret.Device = "published",
) -> Comparison:
    """Runs `step` eagerly and `lowered` in the interpreter, as `device` computes, for `steps` steps on one batch."""
    program = interpret.prepare(lowered.graph, kernels.meanings(), device=device)
    eager = own = train_state
    metrics: dict[str, float] = {}
    leaves: dict[str, float] = {}
    drift: dict[str, float] = {}
    seconds, skipped = 0.0, 0

    def interpreted(state: Any) -> tuple[Any, dict[str, Tensor]]:
        return lowered.results(interpret.run(program, lowered.arguments(state, batch)))

    for _ in range(steps):
        with torch.no_grad():
            after, expected = step(eager, batch)
            started = time.perf_counter()
            forced, found = interpreted(eager)  # from eager's state: the error of one step
            seconds += time.perf_counter() - started
            # From its own: what the errors add up to; the first step's is the same.
            own, drifted = (forced, found) if own is eager else interpreted(own)
        skipped += int(expected.get("skipped", 0))
        _keep_larger(metrics, {name: error(found[name], value, 1e-3) for name, value in expected.items()})
        _keep_larger(drift, {name: error(drifted[name], value, 1e-3) for name, value in expected.items()})
        _keep_larger(leaves, _leaf_errors(eager, after, forced))
        eager = after
    return Comparison(steps, metrics, leaves, drift, skipped, seconds / steps)


def _keep_larger(kept: dict[str, float], new: dict[str, float]) -> None:
    kept.update({name: max(kept.get(name, 0.0), value) for name, value in new.items()})


def _leaf_errors(before: Any, expected: Any, found: Any) -> dict[str, float]:
    start, ours, theirs = (tree.flatten(state) for state in (before, expected, found))
    moved = (
        sum(float((ours[k] - v).double().square().sum()) for k, v in start.items() if k.startswith("params.")) ** 0.5
    )
    return {path: error(theirs[path], leaf, 0.01 * moved) for path, leaf in ours.items()}


def error(found: Tensor, expected: Tensor, scale: float = 1e-30) -> float:
    """Relative L2 error, of `scale` besides; 0 where both have the same bits, infinities included; 1 for unequal integers."""
    if torch.equal(found, expected):
        return 0.0
    if not expected.is_floating_point():
        return 1.0
    a, b = found.double(), expected.double()
    return float((a - b).norm() / (b.norm() + scale))
