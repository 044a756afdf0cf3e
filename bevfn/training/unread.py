"""Steps that are made, or that the device still makes, and whose metrics the host has not read.

A device makes steps while the host hands it the next ones, until the host asks for a number. So the metrics of several
steps stay there and leave together (`train.read`, one copy); what the loaders counted is gathered with them.
"""

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass

from bevfn import distributed
from bevfn.data import loader
from bevfn.data.batch import Batch
from bevfn.metrics import added
from bevfn.names import sentence
from bevfn.training import finite, train
from bevfn.training.tasks import Run


@dataclass(frozen=True)
class Made:
    """A step, and what the host knows of it."""

    done: int
    """steps made, this one included"""
    metrics: train.Metrics
    tokens: list[list[str]]
    """of the samples of this process, by microbatch"""
    counts: dict[str, float]
    """what this process' loader counted"""
    waited: float
    """s that this process waited for its samples"""


class Unread:
    """The steps since the last reading; holds the batches of the latest one, for the question why its loss is not finite."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._made: list[Made] = []
        self._latest: list[Batch] = []
        self._skipped = 0  # steps in a row
        self.start_clock()

    def start_clock(self) -> None:
        """The time of the steps that follow counts from now."""
        self._began = time.perf_counter()

    def add(self, done: int, metrics: train.Metrics, loaded: list[loader.Loaded], batches: list[Batch]) -> None:
        """A step that was just begun; names the damaged samples that its loader replaced."""
        counts: dict[str, float] = {}
        for item in loaded:
            for problem in item.problems:
                print(f"warning: skipped a damaged sample: {sentence(problem)}", flush=True)
            counts = added(counts, item.counts)
        waited = sum(item.waited for item in loaded)
        self._made.append(Made(done, metrics, [item.tokens for item in loaded], counts, waited))
        self._latest = batches

    def read(self, train_state: train.TrainState) -> Iterator[tuple[int, dict[str, float], float]]:
        """(steps done, metrics and counters, s) of each step since the last reading, whose time they share equally.

        train_state: as the latest step returned it. Raises ValueError where a step's loss or gradients are not finite
        (`finite.check_step`), which it says of the others before. All processes read at the same steps.
        """
        made, self._made = self._made, []
        values = train.read([step.metrics for step in made])
        seconds = (time.perf_counter() - self._began) / max(1, len(made))
        everywhere = distributed.gather([step.counts for step in made], self.run.replicas) if made else []
        for i, step in enumerate(made):
            counts = functools.reduce(added, (counts[i] for counts in everywhere))
            found = values[i] | counts | {"seconds/waited": step.waited}
            batches = self._latest if step is made[-1] else None
            self._skipped = finite.check_step(
                self.run, train_state, found, step.tokens, step.done, self._skipped, batches
            )
            yield step.done, found, seconds
