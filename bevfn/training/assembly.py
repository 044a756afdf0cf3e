"""What a run consists of before its first step: the train state, the compiled step, and a batch to measure or lower it with."""

import functools
from collections.abc import Callable
from functools import partial

import numpy as np

from bevfn import compile as compilation
from bevfn import tree
from bevfn.data import scene
from bevfn.data.batch import Batch, collate
from bevfn.training import train
from bevfn.training.pretrained import read_weights
from bevfn.training.tasks import Run


def initial(run: Run, *, resumed: bool = False) -> tuple[dict, dict]:
    """Parameters and statistics from the seed, then from the pretrained files, on the device.

    resumed: a checkpoint replaces every one of them, and the pretrained files are not looked at: they may be gone.
    """
    params, state = run.task.init()
    if run.config.pretrained and not resumed:
        start = run.task.start
        loaded = {str(path): read_weights(path, ema=start.averages) for path in run.config.pretrained}
        params, state, merged = start.merge(params, state, loaded)
        if run.leads:  # the recipe starts the rest from scratch; the report says what
            print(merged.text())
    return tree.to(params, run.device), tree.to(state, run.device)


def initial_state(run: Run, *, resumed: bool = False) -> train.TrainState:
    """The train state before the first step, on the device; `resumed`: see `initial`."""
    optimizer = run.task.optimizer(run.plan)
    params, state = initial(run, resumed=resumed)
    made = train.init(params, state, optimizer, precision=run.policy, ema=run.task.ema, seed=run.config.seed)
    return tree.to(made, run.device)


def pure_step(run: Run) -> Callable[[train.TrainState, Batch], tuple[train.TrainState, dict]]:
    """The step of one process and one microbatch as a pure function: what is lowered for Ascend."""
    loss = partial(run.task.loss, train=True)
    return train.make_step(loss, run.task.optimizer(run.plan), ema=run.task.ema)


def build(run: Run, *, resumed: bool = False) -> tuple[train.TrainState, Callable]:
    """(train state, compiled step(train state, microbatches) -> (train state, metrics)), old buffers donated; `resumed`: see
    `initial`."""
    made = initial_state(run, resumed=resumed)
    if run.replicas is None or not run.config.sync_statistics:  # alone, batch norm over all devices is batch norm
        return made, compiled_step(run, synchronised=False)
    return made, synchronising_step(run)


def compiled_step(run: Run, *, synchronised: bool) -> Callable:
    """The step of `build` with batch norm over all devices, or over each."""
    config, replicas = run.config, run.replicas
    loss = partial(run.task.loss, train=replicas if synchronised else True)
    if run.task.shared_normalisers:
        loss = partial(loss, replicas=replicas)
    return train.make_accumulated(
        loss,
        run.task.optimizer(run.plan),
        ema=run.task.ema,
        replicas=replicas,
        accumulate=config.accumulate,
        compiled=partial(compilation.step, backend=config.backend),
    )


def synchronising_step(run: Run) -> Callable:
    """The step of `build` that is another one from the first step of epoch --sync-after on, whatever it starts at."""
    change = run.config.sync_after * run.plan.steps_per_epoch
    done: int | None = None  # asked of the device once

    @functools.lru_cache(maxsize=1)  # the graph of before is let go
    def made(synchronised: bool) -> Callable:
        return compiled_step(run, synchronised=synchronised)

    def step(train_state: train.TrainState, batches: list[Batch]) -> tuple[train.TrainState, dict]:
        nonlocal done
        done = int(train_state.step) if done is None else done + 1
        return made(done >= change)(train_state, batches)

    return step


def example(run: Run) -> Batch:
    """One microbatch of the training split's first key frame, on the device: what a step is measured or lowered with."""
    data, reading = run.task.data, run.task.data.reading(0)
    sample = scene.load(data.training, 0, reading, np.random.default_rng(0), database=data.database)
    batch, _ = collate([sample] * run.config.batch_size, capacities=reading.capacities)
    finish = run.task.finishing(train=True)
    return (batch if finish is None else finish(batch)).to(run.device)
