"""One epoch of padded batches, read ahead by worker processes, that any process can enter at any step.

    for loaded in batches(load, order, Config(batch_size=4, workers=8), seed=0, epoch=3, capacities=capacities):
        train_state, metrics = step(train_state, loaded.batch)

Everything random is a function of (seed, epoch, position in the epoch's order) and nothing is carried from sample to
sample. So the batches are the same with any number of workers, a resumed run asks for `start_step`, and torchdata's
StatefulDataLoader, which saves what its workers have done so far, has nothing to save.

Workers are forked by default: the data set's index is then shared, not copied, and they start in milliseconds. What
makes a fork of a process with threads dangerous is kept out of them: they compute on one thread (no OpenMP, no BLAS
pool), touch no device and print nothing.
"""

import contextlib
import multiprocessing.util
import os
import shutil
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from bevfn import host, tree
from bevfn.data.batch import Batch, Capacities, Sample, checked, collate
from bevfn.data.sampling import generator

DAMAGED = (ValueError, OSError, EOFError)  # what a load raises for a broken file; anything else is a bug, never skipped
TRIES = 20  # samples in a row that may be damaged
SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Config:
    """How one process reads its part of every batch."""

    batch_size: int
    """samples in a batch, per process"""
    workers: int = 0
    """processes that read ahead; 0: the training process reads, between its steps"""
    on_damaged: Literal["stop", "skip"] = "stop"
    """skip: the next sample of the order takes a damaged one's place, is counted (bad/samples) and named"""
    prefetch: int = 2
    """batches that each worker keeps ready"""
    start: Literal["fork", "forkserver", "spawn"] = "fork"
    """how workers start; all but fork pickle `load`, index included, for every worker"""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("workers", 0), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"loader.Config.{name} is {getattr(self, name)} but must be at least {least}.")


class Load(Protocol):
    """Reads one sample; `scene.load` is one once its index, reading and database are bound."""

    def __call__(self, place: int, /, *, generator: np.random.Generator) -> Sample:
        """The sample at a place in the data set; a damaged file is a ValueError (or OSError) of one sentence that names it."""


@dataclass(frozen=True)
class Loaded:
    """One batch and what is known about it on the host."""

    batch: Batch
    """On the CPU."""
    counts: dict[str, int]
    """`collate`'s, and `bad/samples`: damaged samples that others replaced."""
    tokens: list[str]
    """Of the B samples, in the batch's order."""
    problems: list[str]
    """One sentence per damaged sample, naming its file."""
    waited: float = 0.0
    """s that the caller waited for it."""


def steps_per_epoch(
    length: int, batch_size: int, replicas: int = 1, accumulate: int = 1, *, drop_last: bool = False
) -> int:
    """Optimizer steps until each of `length` samples was seen; the last one is filled up by wrapping around.

    drop_last: an incomplete last one is left out instead, unless it is the only one. Incomplete is judged as torch's
    DistributedSampler and DataLoader do: samples are first filled up to a multiple of the microbatches of a step.
    """
    parts = replicas * accumulate
    if drop_last:
        return max(1, -(-length // parts) // batch_size)
    return -(-length // (batch_size * parts))


def batches(
    load: Load,
    order: np.ndarray,
    config: Config,
    *,
    seed: int,
    epoch: int,
    capacities: Capacities,
    rank: int = 0,
    replicas: int = 1,
    accumulate: int = 1,
    start_step: int = 0,
    wrap: bool = True,
    finish: Callable[[Batch], Batch] | None = None,
) -> Generator[Loaded, None, None]:
    """This process' microbatches of one epoch, from step `start_step` on: `accumulate` of them per step.

    order: [n] int, the places of the epoch's samples. With B = batch_size * replicas * accumulate, step s has the positions
    [s*B, (s+1)*B), of which microbatch rank * accumulate + a takes its part: R processes and A accumulations with the
    same R * A see the same microbatches. Positions behind the end wrap around (as mmengine's DefaultSampler), or without
    `wrap` repeat the last sample, whose token the caller then sees again. `finish` adds to a batch what can be computed of it
    beforehand, in the worker that read it.

    Closing the iterator ends the workers. Raises ValueError for arguments that do not fit; while iterating, ValueError
    with a damaged sample's own sentence (on_damaged "stop", or TRIES in a row), ChildProcessError if a worker was killed.
    """
    if len(order) == 0:
        raise ValueError("The epoch's order has no samples; check the split and the filters of the data set.")
    if not 0 <= rank < replicas:
        raise ValueError(f"Rank {rank} is not one of {replicas} replicas, which are numbered from 0.")
    if accumulate < 1 or start_step < 0:
        raise ValueError(f"accumulate {accumulate} must be at least 1 and start_step {start_step} at least 0.")
    steps = range(start_step, steps_per_epoch(len(order), config.batch_size, replicas, accumulate))
    parts = [rank * accumulate + a for a in range(accumulate)]
    starts = [(step * replicas * accumulate + part) * config.batch_size for step in steps for part in parts]
    return _iterate(_Epoch(load, order, config, seed, epoch, capacities, wrap, finish), starts)


def _iterate(epoch: "_Epoch", starts: list[int]) -> Generator[Loaded, None, None]:
    made = _read_ahead if epoch.config.workers and starts else _read_now
    with contextlib.closing(made(epoch, starts)) as items:
        while True:
            began = time.perf_counter()
            item = next(items, None)
            if item is None:
                return
            if isinstance(item, _Damaged):
                raise ValueError(item.sentence) from RuntimeError(item.trace)
            yield replace(item, waited=time.perf_counter() - began)


# ------------------------------------------------------------------------------------------------- making one batch


class _Damaged(NamedTuple):
    """In place of a batch, since an exception from a worker would arrive wrapped."""

    sentence: str
    trace: str


@dataclass(frozen=True)
class _Epoch(torch.utils.data.Dataset):
    """[position of its first sample] -> the microbatch; the arguments of `batches`."""

    load: Load
    order: np.ndarray
    config: Config
    seed: int
    epoch: int
    capacities: Capacities
    wrap: bool
    finish: Callable[[Batch], Batch] | None

    def __getitem__(self, start: int) -> "Loaded | _Damaged":
        samples: list[Sample] = []
        problems: list[str] = []
        try:
            for position in range(start, start + self.config.batch_size):
                samples.append(self._sample(position, problems, samples[0] if samples else None))
            batch, counts = collate(samples, capacities=self.capacities)
            batch = batch if self.finish is None else self.finish(batch)
        except DAMAGED as error:
            return _Damaged(_sentence(error), traceback.format_exc())
        return Loaded(batch, {**counts, "bad/samples": len(problems)}, [s.token for s in samples], problems)

    def _sample(self, position: int, problems: list[str], like: Sample | None) -> Sample:
        """The sample at `position`, or the next that is whole and goes into a batch with `like`, drawn with this position's
        generator."""
        n = len(self.order)
        position = position if self.wrap else min(position, n - 1)
        tries = min(TRIES, n)
        for index in self.order[np.arange(position, position + tries) % n]:
            try:
                drawn = generator(self.seed, self.epoch, position)
                return checked(self.load(int(index), generator=drawn), like)
            except DAMAGED as error:
                if self.config.on_damaged == "stop":
                    raise
                problems.append(_sentence(error))
        raise ValueError(
            f"{tries} samples in a row are damaged; check the data set's root; the last one: {problems[-1]}"
        )


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} could not be read: {error.strerror}"
    return str(error) or type(error).__name__


# --------------------------------------------------------------------------------------------------------- workers


def _read_now(epoch: _Epoch, starts: list[int]) -> Generator["Loaded | _Damaged", None, None]:
    yield from map(epoch.__getitem__, starts)


def _read_ahead(epoch: _Epoch, starts: list[int]) -> Generator["Loaded | _Damaged", None, None]:
    with warnings.catch_warnings():  # of more workers than cores: that is the caller's choice
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = torch.utils.data.DataLoader(
            _Sent(epoch),
            batch_size=None,  # an item is a whole microbatch
            sampler=starts,
            collate_fn=_unchanged,
            num_workers=min(epoch.config.workers, len(starts)),
            prefetch_factor=epoch.config.prefetch,
            multiprocessing_context=epoch.config.start,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # of seeds that nothing here uses; not torch's global one
        )
        with _one_sentence_for_a_killed_worker():
            iterator: Any = iter(loader)
    # At exit torch leaves its workers to multiprocessing, which sends SIGTERM once, and waits for ever: they ignore it.
    at_exit = multiprocessing.util.Finalize(None, _kill, (iterator._workers,), exitpriority=1)
    try:
        with _signals_of_workers(iterator), _one_sentence_for_a_killed_worker():
            for item in iterator:
                yield _received(item)
    finally:
        at_exit.cancel()


@dataclass(frozen=True)
class _Sent(torch.utils.data.Dataset):
    """Microbatches as they travel: tensors in shared memory (4 ms for 34 MB), or arrays through a pipe (70 ms) where
    /dev/shm is too small, as in a container by default (64 MB), and writing there would kill the worker."""

    epoch: _Epoch

    def __getitem__(self, start: int) -> "Loaded | _Damaged":
        item = self.epoch[start]
        if isinstance(item, _Damaged) or _shared_memory_fits(item.batch, self.epoch.config.workers):
            return item
        return replace(item, batch=tree.map(torch.Tensor.numpy, item.batch))


def _received(item: "Loaded | _Damaged") -> "Loaded | _Damaged":
    return item if isinstance(item, _Damaged) else replace(item, batch=tree.map(torch.as_tensor, item.batch))


def _shared_memory_fits(batch: Batch, workers: int) -> bool:
    """Whether there is room for a batch of every worker at the same time, twice."""
    if not os.path.isdir(SHARED_MEMORY):
        return True  # macOS has another mechanism
    return shutil.disk_usage(SHARED_MEMORY).free > 2 * workers * sum(leaf.nbytes for leaf in tree.leaves(batch))


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        worker.kill()


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    """Runs in a new worker; DataLoader has set torch to one thread."""
    threadpool_limits(1)
    # `timeout` too signals every process of the group, but when to stop is the training process' decision. It ends
    # workers through their queues; the second SIGTERM is multiprocessing's, for one that hangs.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    host.start_worker()


@contextlib.contextmanager
def _signals_of_workers(iterator: Any) -> Iterator[None]:
    """Until the workers are ended at its end, what torch's SIGCHLD handler raises, wherever the training process happens
    to be when a worker is killed, is one sentence."""
    handler: Any = signal.getsignal(signal.SIGCHLD)

    def translated(number: int, frame: FrameType | None) -> None:
        with _one_sentence_for_a_killed_worker():
            handler(number, frame)

    ours = callable(handler) and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGCHLD, translated)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        iterator._shutdown_workers()  # now, not when the last traceback that knows the iterator is gone
        if ours:
            signal.signal(signal.SIGCHLD, handler)


@contextlib.contextmanager
def _one_sentence_for_a_killed_worker() -> Iterator[None]:
    try:
        yield
    except ChildProcessError:
        raise
    except (RuntimeError, OSError, EOFError) as error:  # of torch, or of a queue whose other end is gone
        what = (str(error) or type(error).__name__).splitlines()[0].strip().rstrip(".")
        if isinstance(error, RuntimeError) and not what.startswith("DataLoader worker"):
            raise
        raise ChildProcessError(
            f"A process that reads samples ended ({what}); if memory is short, lower the loader's workers, prefetch or "
            "batch_size."
        ) from None
