"""The train step: one pure function from (train state, batch) to (train state, metrics), top to bottom.

    step = make_step(loss_fn, optimizer)
    train_state, metrics = step(train_state, batch)        # eager, or through `compile.step` one static graph

Forward, loss, backward, unscaling, finite check, clipping, schedule, AdamW, EMA and loss scale are all in it; a skipped
fp16 step is a `where`, not a branch. Between backward and clipping the gradient is one flat vector, averaged over
replicas (`distributed.Replicas`) and microbatches (`make_accumulated`).

Gradients are `torch.func.vjp`'s. `torch.autograd.grad` traced by Dynamo (`trace_autograd_ops`) compiles no
faster: 40 convolutions with batch norm (120 leaves), inductor, one core: 34.0 s of CPU and 22.7 s in g++ against 34.5 s
and 22.1 s, steps of 8.3 and 8.0 ms.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bevfn import precision, rng, tree
from bevfn.distributed import Replicas
from bevfn.layers import batch_norm
from bevfn.metrics import SUMMED
from bevfn.training import optim

LOSS = "loss/"  # the loss and its terms, which must be finite


@tree.register
@dataclass
class TrainState:
    """Everything that a run carries from step to step; a pytree."""

    params: dict  # float32 leaves
    state: dict  # batch-norm statistics
    optimizer: optim.State
    loss_scale: precision.LossScale | None  # fp16 only
    ema: dict | None  # {"params", "state"} averaged
    step: Tensor  # int64 [], steps made, skipped ones too
    key: Tensor  # int64 [], see rng; the step's key is folded from it


def init(
    params: dict,
    state: dict,
    optimizer: optim.Config,
    *,
    precision: precision.Policy,
    ema: optim.Ema | None = None,
    seed: int = 0,
) -> TrainState:
    """The state before the first step, on the parameters' device. No leaf shares memory with another."""
    device = tree.leaves(params)[0].device
    averaged = tree.map(torch.clone, {"params": params, "state": state}) if ema is not None else None
    scale = tree.to(_init_loss_scale(precision), device)
    step, key = torch.zeros((), dtype=torch.int64, device=device), rng.key(seed).to(device)
    return TrainState(params, state, optim.init(optimizer, params), scale, averaged, step, key)


def _init_loss_scale(policy: precision.Policy) -> precision.LossScale | None:
    return precision.init_loss_scale() if policy.scales_loss else None


@partial(tree.register, static=("names",))
@dataclass
class Metrics:
    """A step's metrics as one tensor, so that they leave the device in one copy; a pytree."""

    values: Tensor  # float32 [n]; counts are exact to 2^24
    names: tuple[str, ...]


def pack(metrics: dict[str, Tensor]) -> Metrics:
    """Metrics of one step, 0-d tensors of any dtype, as one tensor."""
    return Metrics(torch.stack([value.float() for value in metrics.values()]), tuple(metrics))


def read(made: Sequence[Metrics]) -> list[dict[str, float]]:
    """The metrics of several steps on the host: one copy, which waits for the steps."""
    if not made:
        return []
    values = iter(torch.cat([metrics.values for metrics in made]).tolist())
    return [{name: next(values) for name in metrics.names} for metrics in made]


Loss = Callable[[dict, dict, Any, Tensor], tuple[Tensor, tuple[dict, dict]]]
Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Tensor]]]


def make_step(
    loss_fn: Loss,
    optimizer: optim.Config,
    *,
    ema: optim.Ema | None = None,
    replicas: Replicas | None = None,
) -> Step:
    """The step for `loss_fn(params, state, batch, key) -> (loss, (new state, metrics))`.

    Metrics are the loss function's and "grad_norm" (before clipping), "lr", "beta1", "skipped" (1: the gradients, or a
    metric "loss/...", were not finite, and nothing was updated), and with fp16 "loss_scale"; all 0-d tensors on the
    device. In fp32 and bf16 that is skipped too, but never expected: the host should stop (`bad_losses` and
    `bad_gradient` name it).

    With `replicas` every replica gives its own batch and gets the same new state, bit for bit: gradients, batch-norm
    statistics and metrics are averaged over the replicas (counts, see `metrics.SUMMED`, added up), and randomness differs.
    Whether batch norm and loss normalisers see the other replicas is the loss function's business.
    """

    def step(old: TrainState, batch: Any) -> tuple[TrainState, dict[str, Tensor]]:
        microbatch = replicas.rank if replicas is not None and replicas.count > 1 else None
        made = _differentiate(loss_fn, optimizer, old, batch, microbatch)
        return _update(optimizer, ema, old, *(made if replicas is None else _average(*made, 1, replicas)))

    return step


def make_accumulated(
    loss_fn: Loss,
    optimizer: optim.Config,
    *,
    accumulate: int,
    ema: optim.Ema | None = None,
    replicas: Replicas | None = None,
    compiled: Callable[[Callable], Callable] = lambda step: step,
) -> Callable[[TrainState, Iterable[Any]], tuple[TrainState, Metrics]]:
    """`make_step` for the host, of a train state and the `accumulate` microbatches that make one step's batch; its metrics are
    packed in the graph (`read` unpacks them).

    Of the mean of their gradients, statistics and metrics: R replicas with A microbatches each make the same step
    for equal R A (replica r's a-th is microbatch r A + a). Each one's batch norm starts from the step's old statistics.

    Two graphs, `compiled` by a function such as `partial(compile.step, backend="inductor")`: one adds a microbatch, one
    updates; a single microbatch is `make_step`'s one graph. Raises ValueError for another number of microbatches.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate {accumulate} must be at least 1 microbatch per step")
    alone = make_step(loss_fn, optimizer, ema=ema, replicas=replicas)
    first = accumulate * (replicas.rank if replicas is not None else 0)

    def make(old: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        new, metrics = alone(old, batch)
        return new, pack(metrics)

    def add(sums: Sums, inputs: tuple[TrainState, Any]) -> tuple[Sums, dict]:
        old, batch = inputs
        gradient, state, metrics = _differentiate(loss_fn, optimizer, old, batch, sums.count + first)
        state = tree.map(torch.add, sums.state, state)
        return Sums(sums.gradient + gradient, state, sums.count + 1), metrics

    def finish(old: TrainState, inputs: tuple[Sums, list[dict]]) -> tuple[TrainState, Metrics]:
        sums, parts = inputs
        metrics = {name: torch.stack([part[name].float() for part in parts]).sum() for name in parts[0]}
        averaged = _average(sums.gradient, sums.state, metrics, accumulate, replicas)
        new, metrics = _update(optimizer, ema, old, *averaged)
        return new, pack(metrics)

    whole, add_microbatch, finish_step = compiled(make), compiled(add), compiled(finish)

    def step(train_state: TrainState, batches: Iterable[Any]) -> tuple[TrainState, Metrics]:
        batches = list(batches)
        if len(batches) != accumulate:
            raise ValueError(f"the step got {len(batches)} microbatches, it accumulates {accumulate}")
        if accumulate == 1:
            return whole(train_state, batches[0])
        sums, parts = _no_sums(train_state), []
        for batch in batches:
            sums, metrics = add_microbatch(sums, (train_state, batch))
            parts.append(metrics)
        return finish_step(train_state, (sums, parts))

    return step


@tree.register
@dataclass
class Sums:
    """What the microbatches of an unfinished step have added up to; a pytree."""

    gradient: Tensor  # float32 [n], unscaled
    state: dict  # new batch-norm statistics
    count: Tensor  # int64 [], microbatches


def _no_sums(train_state: TrainState) -> Sums:
    zeros = tree.map(torch.zeros_like, train_state.state)
    return Sums(torch.zeros_like(train_state.optimizer.m), zeros, torch.zeros_like(train_state.step))


def _differentiate(
    loss_fn: Loss, optimizer: optim.Config, old: TrainState, batch: Any, microbatch: int | Tensor | None
) -> tuple[Tensor, dict, dict]:
    """(gradient [n] float32, unscaled; new batch-norm statistics; metrics) of one batch.

    microbatch: its number among those of the step, for its own random numbers; None if it is alone.
    """
    layout = optim.layout(optimizer, old.params)
    key = rng.fold(old.key, old.step)
    key = key if microbatch is None else rng.fold(key, microbatch)
    scale = old.loss_scale.scale if old.loss_scale is not None else None
    loss_fn = _holding(loss_fn, optimizer)

    def scaled_loss(leaves: list[Tensor]) -> tuple[Tensor, tuple[dict, dict]]:
        loss, aux = loss_fn(optim.insert(old.params, layout, leaves), old.state, batch, key)
        return (loss if scale is None else loss * scale), aux

    leaves = optim.select(old.params, layout)
    made: Any = torch.func.vjp(scaled_loss, leaves, has_aux=True)
    loss, pull, (state, metrics) = made
    # grad_and_value keeps the backward pass as well, for a second derivative: an eager ResNet-50 step took 2.2 times the
    # memory. Here the caller's grad mode says whether there can be one.
    (gradients,) = pull(torch.ones_like(loss), retain_graph=torch.is_grad_enabled())
    gradient = optim.join(gradients)
    return (gradient if scale is None else gradient / scale), state, metrics


def held(optimizer: optim.Config, params: dict, state: dict) -> set[str]:
    """Dotted paths of the batch norms of which no parameter is trained."""
    if not any(group.frozen for group in optimizer.groups):
        return set()
    frozen = set(tree.flatten(params)) - set(optim.layout(optimizer, params).names)
    norms = {path.rpartition(".")[0] for path in tree.flatten(state)}
    return {norm for norm in norms if {f"{norm}.weight", f"{norm}.bias"} <= frozen}


def _holding(loss_fn: Loss, optimizer: optim.Config) -> Loss:
    """`loss_fn` whose batch norms that are not trained normalise by their running statistics, and keep them."""
    if not any(group.frozen for group in optimizer.groups):
        return loss_fn

    def holding(params: dict, state: dict, batch: Any, key: Tensor) -> tuple[Tensor, tuple[dict, dict]]:
        kept = batch_norm.hold(state, held(optimizer, params, state))
        loss, (new, metrics) = loss_fn(params, kept, batch, key)
        return loss, (tree.unflatten(tree.flatten(new), state), metrics)  # as dicts again

    return holding


def _average(
    gradient: Tensor, state: dict, metrics: dict, accumulate: int, replicas: Replicas | None
) -> tuple[Tensor, dict, dict]:
    """Means over the step's microbatches (counts: sums) of what was summed over `accumulate` of them here.

    Two collectives: the flat gradient, and everything small.
    """
    names, count = list(metrics), accumulate * (replicas.count if replicas is not None else 1)
    small = [*tree.leaves(state), *(metrics[name].float() for name in names)]
    if replicas is not None:
        gradient = replicas.sum(gradient)
        small = optim.split(replicas.sum(optim.join(small)), small)
    statistics, values = small[: len(small) - len(names)], small[len(small) - len(names) :]
    state = tree.unflatten({k: v / count for k, v in zip(tree.flatten(state), statistics)}, state)
    divisors = [1 if name.startswith(SUMMED) else count for name in names]
    return gradient / count, state, {name: v / divisor for name, v, divisor in zip(names, values, divisors)}


def _update(
    optimizer: optim.Config, ema: optim.Ema | None, old: TrainState, gradient: Tensor, state: dict, metrics: dict
) -> tuple[TrainState, dict[str, Tensor]]:
    """Everything after the gradient of the whole batch is known."""
    layout = optim.layout(optimizer, old.params)
    leaves = optim.select(old.params, layout)
    gradient, norm = optim.clip(gradient, optimizer.clip_norm)
    # Of sums: one bad element makes them bad. A loss that is NaN can have gradients that are not (of sign, of clamp).
    terms = [value for name, value in metrics.items() if name.startswith(LOSS)]
    finite = torch.isfinite(torch.stack([norm, *terms]).sum())
    vector, moments = optim.update(optimizer, layout, old.optimizer, optim.join(leaves), gradient, old.step, finite)
    params = optim.insert(old.params, layout, optim.split(vector, leaves))
    state = _statistics(held(optimizer, old.params, old.state), state, old.state)
    scale, averaged = _next_loss_scale(old.loss_scale, finite), _next_ema(ema, old, params, state)
    new = TrainState(params, state, moments, scale, averaged, old.step + 1, old.key.clone())
    schedules = {"lr": optimizer.lr.at(old.step), "beta1": optimizer.beta1.at(old.step)}
    metrics = metrics | {"grad_norm": norm, **schedules, "skipped": (~finite).float()}
    return new, metrics if old.loss_scale is None else metrics | {"loss_scale": old.loss_scale.scale.clone()}


def _statistics(held: set[str], new: dict, old: dict) -> dict:
    """The new statistics, of batch norms that are not held, where they are finite."""
    # An overflowing forward of fp16 updates the statistics upstream, and may leave infinities there for good.
    finite = tree.map(lambda new, before: torch.where(torch.isfinite(new), new, before), new, old)
    if not held:
        return finite
    # Means over microbatches are rounded: what is held is taken from before.
    before = {path: leaf for path, leaf in tree.flatten(old).items() if path.rpartition(".")[0] in held}
    return tree.unflatten(tree.flatten(finite) | before, old)


def _next_loss_scale(old: precision.LossScale | None, finite: Tensor) -> precision.LossScale | None:
    return None if old is None else precision.update_loss_scale(old, finite)


def _next_ema(ema: optim.Ema | None, old: TrainState, params: dict, state: dict) -> dict | None:
    if ema is None:
        return None
    keep = ema.keep(old.step)
    return tree.map(lambda mean, new: keep * mean + (1 - keep) * new, old.ema, {"params": params, "state": state})


def first_nonfinite(values: Any) -> str | None:
    """Dotted path of the first leaf with a NaN or infinity, None if there is none; for the host."""
    for path, leaf in tree.flatten(values).items():
        if not _finite(leaf):
            return path
    return None


@dataclass(frozen=True)
class BadLoss:
    """A sample whose loss is not finite."""

    microbatch: int
    """of this replica's in the step"""
    sample: int
    """its row in the microbatch"""
    terms: tuple[str, ...]
    """metrics "loss/..." that are not finite"""


def bad_losses(
    loss_fn: Loss, optimizer: optim.Config, train_state: TrainState, batches: Iterable[Any]
) -> list[BadLoss]:
    """The samples of a skipped step whose own loss is not finite, found by repeating its forward pass sample by sample
    in eager mode, without a loss scale, on the host. `loss_fn` must not be synchronised over replicas.

    train_state: as the skipped step returned it; batches: its microbatches, of this replica. Empty if every sample's
    loss is finite when it is alone.
    """
    key, loss_fn = rng.fold(train_state.key, train_state.step - 1), _holding(loss_fn, optimizer)
    found = []
    with torch.no_grad():
        for a, batch in enumerate(batches):
            for i in range(len(tree.leaves(batch)[0])):
                sample = tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)
                _, (_, metrics) = loss_fn(train_state.params, train_state.state, sample, key)
                terms = tuple(name for name, value in metrics.items() if name.startswith(LOSS) and not _finite(value))
                found += [BadLoss(a, i, terms)] if terms else []
    return found


def _finite(leaf: Tensor) -> bool:
    return not leaf.is_floating_point() or bool(torch.isfinite(leaf).all())


def bad_gradient(
    loss_fn: Loss,
    optimizer: optim.Config,
    train_state: TrainState,
    batches: Iterable[Any],
    replicas: Replicas | None = None,
) -> str | None:
    """What is not finite in a step that was skipped, found by repeating its backward pass in eager mode, on the host.

    Args:
        train_state: as the skipped step returned it; batches: its microbatches, of this replica.

    Returns:
        "batch.points", "params.head.out.weight", or "the gradient of head.out.weight (and of 211 other parameters)": of
        the bad ones the one nearest to the loss, where backward met it first, as parameters are in forward order. None
        if all is finite here: ask the other replicas. With a synchronised loss all replicas must call this.
    """
    before = replace(train_state, step=train_state.step - 1, loss_scale=None)
    batches = list(batches)
    first = len(batches) * (replicas.rank if replicas is not None else 0)
    alone = len(batches) * (replicas.count if replicas is not None else 1) == 1
    bad: list[str] = []
    for a, batch in enumerate(batches):
        gradient, _, _ = _differentiate(loss_fn, optimizer, before, batch, None if alone else first + a)
        layout = optim.layout(optimizer, before.params)
        named = optim.named(gradient, layout, before.params)
        bad = bad or [name for name in tree.flatten(before.params) if name in named and not _finite(named[name])]
    if path := first_nonfinite({"batch": batches[0] if len(batches) == 1 else batches, "params": before.params}):
        return path
    others = f" (and of {len(bad) - 1} other parameters)" if len(bad) > 1 else ""
    return f"the gradient of {bad[-1]}{others}" if bad else None
