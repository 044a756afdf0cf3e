"""A model over every key frame of a split, on one process or many."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from bevfn import compile as compilation
from bevfn import distributed
from bevfn.data import loader, scene
from bevfn.data.batch import Batch
from bevfn.data.index import Index
from bevfn.data.reading import Reading
from bevfn.distributed import Replicas
from bevfn.evaluation.results import Detections
from bevfn.metrics import COUNTERS, OF_LABELS, added, warnings
from bevfn.names import printable

_PARTS = ("boxes", "scores", "labels")


def detect(*arguments: Any, **settings: Any) -> tuple[dict[str, Detections], dict[str, float]]:
    """Detections of all key frames by token, and counts, as of `collect`, whose arguments are these.

    predict(params, state, batch) -> "boxes" [B Q 9] (bottom centre; augmented base), "scores", "labels", "valid"
    [B Q], and counters, 0-d.
    """
    found, counts = collect(*arguments, **settings, pick=_valid)
    return {token: Detections(*(rows[part] for part in _PARTS)) for token, rows in found.items()}, counts


def _valid(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {part: row[part][row["valid"]] for part in _PARTS}


def collect(
    predict: Callable[[dict, dict, Batch], dict[str, torch.Tensor]],
    params: dict,
    state: dict,
    index: Index,
    reading: Reading,
    *,
    pick: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict,
    batch_size: int = 1,
    workers: int = 0,
    backend: str = "eager",
    device: str = "cpu",
    replicas: Replicas | None = None,
    finish: Callable[[Batch], Batch] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, float]]:
    """What is predicted of all key frames, {token: {name: array}} in the index' order, and what training counts too: "points",
    those that the model got, and `metrics.COUNTERS` but for `metrics.OF_LABELS`; both on every replica.

    predict(params, state, batch) -> {name: [B ...]}, and counters, 0-d. reading: how key frames are read. pick: what is kept
    of a key frame's rows. finish: see `loader.batches`. Key frames are shared out over the replicas; what pads the last batch appears once, but counts
    again. warn: gets a sentence as soon as a counter is not zero.
    """
    rank, count = (replicas.rank, replicas.count) if replicas is not None else (0, 1)
    compiled = compilation.function(predict, backend=backend)
    order = np.arange(len(index))
    batches = loader.steps_per_epoch(len(order), batch_size, count, 1)
    stream = loader.batches(
        partial(scene.load, index, reading=reading),
        order,
        loader.Config(batch_size=batch_size, workers=workers),
        seed=0,
        epoch=0,
        capacities=reading.capacities,
        rank=rank,
        replicas=count,
        finish=finish,
    )
    found: dict[str, np.ndarray] = {}
    names: dict[str, None] = {}
    counts: dict[str, float] = {}
    with contextlib.closing(stream):
        for done, loaded in enumerate(stream, start=1):
            with torch.no_grad():
                outputs = compiled(params, state, loaded.batch.to(device))
            host = {name: value.cpu().numpy() for name, value in outputs.items() if value.dim()}
            for row, token in enumerate(loaded.tokens):
                kept = pick({name: value[row] for name, value in host.items()})
                names |= dict.fromkeys(kept)
                for name, value in kept.items():
                    found.setdefault(f"{token}/{name}", value)
            now = _counted(loaded, outputs)
            for sentence in warnings({name: count for name, count in now.items() if not counts.get(name)}):
                warn(f"warning: key frame {printable(loaded.tokens[0])}: {sentence}")
            counts = added(counts, now)
            progress(done, batches)
    union = distributed.gather_arrays(found, replicas)
    rows = {token: {name: union[f"{token}/{name}"] for name in names} for token in index.positions}
    return rows, functools.reduce(added, distributed.gather(counts, replicas))


def _counted(loaded: loader.Loaded, outputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The counters of a batch: the loader's, but of what is learned, and the model's."""
    valid = loaded.batch.points_valid
    points = {} if valid is None else {"points": int(valid.sum())}
    read = {name: count for name, count in loaded.counts.items() if name not in OF_LABELS}
    return points | read | {n: int(v) for n, v in outputs.items() if n.startswith(COUNTERS)}
