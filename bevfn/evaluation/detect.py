"""A model over every key frame of a split, on one process or many."""

import contextlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from bevfn import compile as compilation
from bevfn import distributed
from bevfn.data import loader, scene
from bevfn.data.batch import Batch, Sample
from bevfn.data.index import Index
from bevfn.data.reading import Reading
from bevfn.distributed import Replicas
from bevfn.evaluation.results import Detections

_PARTS = ("boxes", "scores", "labels")


def detect(
    predict: Callable[[dict, dict, Batch], dict[str, torch.Tensor]],
    params: dict,
    state: dict,
    index: Index,
    reading: Reading,
    *,
    batch_size: int = 1,
    workers: int = 0,
    backend: str = "eager",
    device: str = "cpu",
    replicas: Replicas | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Detections]:
    """Detections of all key frames by token, on every replica.

    predict(params, state, batch) -> "boxes" [B Q 9] (bottom centre; augmented base), "scores", "labels", "valid"
    [B Q]. reading: how key frames are read. Key frames are shared out over the
    replicas; what pads the last batch appears once.
    """
    rank, count = (replicas.rank, replicas.count) if replicas is not None else (0, 1)
    compiled = compilation.function(predict, backend=backend)
    order = np.arange(len(index))
    batches = loader.steps_per_epoch(len(order), batch_size, count, 1)
    stream = loader.batches(
        partial(_load, index, reading), order, loader.Config(batch_size=batch_size, workers=workers),
        seed=0, epoch=0, capacities=reading.capacities, rank=rank, replicas=count,
    )  # fmt: skip
    found: dict[str, np.ndarray] = {}
    with contextlib.closing(stream):
        for done, loaded in enumerate(stream, start=1):
            with torch.no_grad():
                outputs = compiled(params, state, loaded.batch.to(device))
            host = {name: outputs[name].cpu().numpy() for name in (*_PARTS, "valid")}
            for row, token in enumerate(loaded.tokens):
                keep = host["valid"][row]
                for part in _PARTS:
                    found.setdefault(f"{token}/{part}", host[part][row][keep])
            progress(done, batches)
    union = distributed.gather_arrays(found, replicas)
    return {frame_token: Detections(*(union[f"{frame_token}/{p}"] for p in _PARTS)) for frame_token in index.positions}


def _load(index: Index, reading: Reading, place: int, generator: np.random.Generator) -> Sample:
    """The loader's `load` once the first two are bound."""
    return scene.load(index, place, reading, generator)
