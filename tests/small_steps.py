"""A few train steps of a small model, and how far two runs' states are apart.

Optimizers here have eps = 1, which makes AdamW's update proportional to the gradient. With 1e-8 its first steps are lr x
sign(gradient), and parameters whose gradient is rounding only (shifts that a batch norm removes) would walk at random.
"""

from functools import partial
from types import ModuleType
from typing import Any

from bevfn import compile as compilation
from bevfn import tree
from bevfn.data.batch import Batch
from bevfn.precision import Policy, Precision
from bevfn.training import optim, train


def run(
    family: ModuleType,
    model: Any,
    batch: Batch,
    optimizer: optim.Config,
    precision: Precision,
    backend: compilation.Backend,
    steps: int,
) -> tuple[list[dict[str, float]], train.TrainState]:
    """(metrics of every step, the last train state) of a model of `family`, from seed 0."""
    policy = Policy.of(precision)
    params, state = family.init(model, seed=0)
    train_state = train.init(params, state, optimizer, precision=policy)
    if policy.scales_loss:  # the usual 2**16 overflows for its first steps, which would then compare nothing
        train_state.loss_scale.scale.fill_(2.0**6)
    loss = partial(family.loss, config=model, policy=policy)
    step = compilation.step(train.make_step(loss, optimizer), backend=backend)
    history = []
    for _ in range(steps):
        train_state, metrics = step(train_state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return history, train_state


def compare_leaves(start: dict, ours: Any, theirs: Any, tolerance: float, median: float | None = None) -> None:
    """Every updated leaf, relative to its size (at least 1 % of the distance that all parameters moved).

    median: tolerance of the median leaf; a tenth of the worst's if None.
    start: the parameters before the first step. Only one of the two runs may have a loss scale.
    """
    a, b, before = tree.flatten(ours), tree.flatten(theirs), tree.flatten(start)
    assert a.keys() == {name for name in b if name in a or not name.startswith("loss_scale.")}
    moved = sum(float((a[f"params.{k}"] - v).double().square().sum()) for k, v in before.items()) ** 0.5
    assert moved > 0
    errors = {
        name: float((a[name].double() - b[name].double()).norm()) / (float(a[name].double().norm()) + 0.01 * moved)
        for name in a
    }
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= tolerance, (worst, errors[worst])
    assert sorted(errors.values())[len(errors) // 2] <= (0.1 * tolerance if median is None else median)
