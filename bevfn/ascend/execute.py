"""The lowered step against the eager one: both run from the same state, and every number is compared.

    comparison = execute(step, lowered, train_state, batch, steps=5)
    print(comparison.text())

The graph runs in the interpreter (`interpret`), from the meaning of each GE type; nothing of the eager step is used.

Errors are relative: L2 of the difference over L2 of eager's value, plus 1 % of the distance that all parameters moved
for leaves of the train state. Without it a bias that starts at 0, and whose gradient is rounding because a batch norm
behind it removes the shift, has an error of 1 whatever is compared.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bevfn import tree
from bevfn.ascend import interpret
from bevfn.ascend.lower import Lowered
from bevfn.kernels import ascend as kernels


@dataclass(frozen=True)
class Comparison:
    """Relative errors after `steps` steps."""

    steps: int
    metrics: dict[str, float]
    """By metric, the largest of all steps."""
    leaves: dict[str, float]
    """By path in the train state, after the last step."""
    skipped: int
    """Steps whose gradients were not finite, the same ones in both."""
    seconds: float
    """Of one step in the interpreter, mean."""

    @property
    def worst_metric(self) -> tuple[str, float]:
        return max(self.metrics.items(), key=lambda item: item[1])

    @property
    def worst_leaf(self) -> tuple[str, float]:
        return max(self.leaves.items(), key=lambda item: item[1])

    def text(self) -> str:
        """For the terminal."""
        (metric, metric_error), (leaf, leaf_error) = self.worst_metric, self.worst_leaf
        total = self.metrics.get("loss/total", float("nan"))
        return (
            f"interpreted against eager, {self.steps} steps ({self.skipped} skipped), {self.seconds:.1f} s a step: "
            f"loss {total:.1e}, worst metric {metric_error:.1e} ({metric}), worst of {len(self.leaves)} updated leaves "
            f"{leaf_error:.1e} ({leaf})"
        )


def execute(step: Callable, lowered: Lowered, train_state: Any, batch: Any, *, steps: int) -> Comparison:
    """Runs `step` eagerly and `lowered` in the interpreter for `steps` steps on one batch."""
    program = interpret.prepare(lowered.graph, kernels.meanings())
    eager = graph = train_state
    metrics: dict[str, float] = {}
    seconds, skipped = 0.0, 0
    for _ in range(steps):
        with torch.no_grad():
            eager, expected = step(eager, batch)
            started = time.perf_counter()
            graph, found = lowered.results(interpret.run(program, lowered.arguments(graph, batch)))
        seconds += time.perf_counter() - started
        skipped += int(expected.get("skipped", 0))
        for name, value in expected.items():
            metrics[name] = max(metrics.get(name, 0.0), error(found[name], value))
    theirs, before = tree.flatten(graph), tree.flatten(train_state)
    ours = tree.flatten(eager)
    moved = sum(float((ours[k] - v).double().square().sum()) for k, v in before.items() if k.startswith("params.")) ** 0.5
    leaves = {path: error(theirs[path], leaf, 0.01 * moved) for path, leaf in ours.items()}
    return Comparison(steps, metrics, leaves, skipped, seconds / steps)


def error(found: Tensor, expected: Tensor, scale: float = 1e-30) -> float:
    """Relative L2 error, of `scale` besides; 0 where both have the same bits, infinities included; 1 for unequal integers."""
    if torch.equal(found, expected):
        return 0.0
    if not expected.is_floating_point():
        return 1.0
    a, b = found.double(), expected.double()
    return float((a - b).norm() / (b.norm() + scale))
