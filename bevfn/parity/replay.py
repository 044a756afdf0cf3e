"""One golden case from its manifest to its table: `replay`. What differs between models is in their maps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bevfn import tree, upstream
from bevfn.data.batch import Batch
from bevfn.parity import awml, bevdepth, bevfusion, bevnext, compare, golden
from bevfn.parity.compare import EVAL_TOLERANCE, TRAIN_TOLERANCE, Table
from bevfn.parity.golden import Case
from bevfn.upstream import checkpoints, recognise


class Map(Protocol):
    """What a family's map (`parity/<family>.py`) holds: stored names, and what only this family compares."""

    ZERO_GRADIENT: tuple[str, ...]
    """upstream keys of gradients that are zero in exact arithmetic, beside those that the case names"""
    ABSOLUTE: dict[str, float]
    """loss terms of which this absolute error is allowed"""

    def config_for(self, case: Case, published: Any) -> Any:
        """The configuration to compare; it may have other capacities than the published one."""

    def batch_of(self, case: Case, device: str, *, train: bool) -> Batch:
        """The stored inputs as a batch, for evaluation or for the training step."""

    def places(self, case: Case, table: Table, batch: Batch, config: Any) -> dict[str, Any]:
        """Compares what is made of the inputs alone; arguments that `apply` gets beside them."""

    def paths(self, case: Case, *, train: bool) -> dict[str, str]:
        """{stored name without its phase: path in outputs} of all that has a place and an order."""

    def loss(self, case: Case, outputs: dict, batch: Batch, config: Any) -> tuple[Tensor, dict[str, Tensor], dict]:
        """(total, {stored name: term}, assigned targets)."""

    def evaluated(self, case: Case, table: Table, outputs: dict, batch: Batch, config: Any) -> None:
        """Compares what else a case stores of the evaluation: discrete choices, detections."""

    def trained(self, case: Case, table: Table, outputs: dict, targets: dict, batch: Batch, config: Any) -> None:
        """Compares what else a case stores of the training step: discrete choices, targets."""


MAPS: dict[str, Map] = {
    "awml": awml,
    "bevdepth": bevdepth,
    "bevfusion": bevfusion,
    "bevnext": bevnext,
    "matrixvt": bevdepth,
}
"""By the beginning of the models' names."""


def replay(case: Case, table: Table, *, only: str | None, device: str) -> None:
    """Adds every comparison of the case to the table; `only` is "eval", "train" or None for both.

    Raises ValueError if its checkpoint, told by keys and shapes, is none of a model that bevfn has.
    """
    source = golden.source(case.manifest)
    if source.model is None or source.model.partition("-")[0] not in MAPS:
        raise ValueError(
            f"{case.folder}/manifest.json is a case of {source.what}, which bevfn does not have yet; it has "
            f"{', '.join(upstream.CHECKPOINTS)}"
        )
    print(f"{'boundary':<44} {'error':>10} {'tolerance':>10}")
    family, maps = upstream.CHECKPOINTS[source.model].family, MAPS[source.model.partition("-")[0]]
    weights = golden.fill_case(case.folder)
    inside = {key.removeprefix(source.prefix): leaf for key, leaf in weights.items()}
    config = maps.config_for(case, checkpoints.fitted(source.model, inside))
    params, state, _ = upstream.import_state(weights, source.model)
    initial, statistics = family.init(config, seed=0)
    params, state, _ = upstream.load_into(initial, statistics, {str(case.folder): (params, state)})
    params, state = tree.to(params, device), tree.to(state, device)
    extra = maps.places(case, table, maps.batch_of(case, device, train=False), config)
    if only != "train":
        batch = maps.batch_of(case, device, train=False)
        with torch.no_grad():
            outputs, _ = family.apply(params, state, batch, config=config, train=False, **extra)
        compare.overflow(table, outputs)
        compare.dense(case, table, "eval", maps.paths(case, train=False), outputs, EVAL_TOLERANCE)
        maps.evaluated(case, table, outputs, batch, config)
        del outputs  # gigabytes
    if only != "eval":
        made = _Made(source, family, maps, config, params, state, extra)
        _train(case, table, made, device)
        failed = any(not line.ok and line.name in table.ours for line in table.lines)
        if failed and not case.measured_training:
            print(
                "the case has no noise floor of its training step: the step once more, each parameter moved by half an ulp"
            )
            other = Table(table.case, silent=True)
            _train(case, other, replace(made, params=_moved(params)), device)
            table.allow_rounding(other)


@dataclass(frozen=True)
class _Made:
    """What a training step is made of; `extra`: see `Map.places`."""

    source: recognise.Recognised
    family: Any
    maps: Map
    config: Any
    params: dict
    state: dict
    extra: dict


def _train(case: Case, table: Table, made: _Made, device: str) -> None:
    """Adds the comparisons of one training step."""
    family, maps, config, source = made.family, made.maps, made.config, made.source
    batch = maps.batch_of(case, device, train=True)

    def total_loss(params: dict) -> tuple[Tensor, tuple]:
        outputs, new = family.apply(params, made.state, batch, config=config, train=True, **made.extra)
        total, terms, targets = maps.loss(case, outputs, batch, config)
        return total, (outputs, new, terms, targets)

    gradients, total, (outputs, new, terms, targets) = _gradients(total_loss, made.params)
    compare.overflow(table, outputs)
    compare.dense(case, table, "train", maps.paths(case, train=True), outputs, TRAIN_TOLERANCE)
    terms = tree.map(lambda term: term.detach(), {"total": total, **terms})
    compare.losses(case, table, "train", terms, maps.ABSOLUTE)
    assert source.model is not None
    exported = upstream.export_state(  # under upstream's names
        gradients, new, source.model, {}, naming=source.naming, prefix=source.prefix
    )
    compare.gradients(case, table, exported, maps.ZERO_GRADIENT)
    compare.statistics(case, table, exported)
    maps.trained(case, table, outputs, targets, batch, config)


def _moved(params: dict) -> dict:
    """The parameters, each times 1 + 2^-24 n with n normal: what rounding them once more may do."""
    generator = torch.Generator().manual_seed(0)

    def move(leaf: Tensor) -> Tensor:
        drawn = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
        return (leaf.double() * (1 + 2.0**-24 * drawn)).to(leaf.dtype)

    return tree.map(move, params)


def _gradients(loss: Callable[[dict], tuple[Tensor, tuple]], params: dict) -> tuple[dict, Tensor, tuple]:
    """(gradients, loss, what else it returns) at once, the gradient by torch.autograd: torch.func's keeps the graph of its own
    derivative, which is most of the memory of a published size."""
    params = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
    total, rest = loss(params)
    leaves = tree.flatten(params)
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if slope is None else slope for (name, leaf), slope in zip(leaves.items(), found)
    }
    return tree.unflatten(gradients, params), total.detach(), rest
