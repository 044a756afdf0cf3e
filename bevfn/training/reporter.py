"""What a training run says: progress in the terminal, every step's metrics in JSON lines and its loggers, speed and memory.

Counters (`overflow/...` did not fit a capacity, `bad/...` broken data, `empty/...` nothing to learn from, `missing/...`
not in the data) are metrics like others. A sentence warns the first time that one is not zero, and the last line has
their sums.
"""

import contextlib
import datetime
import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from bevfn import choices, waiting
from bevfn.files import to_json, write_atomically, write_whole, writing
from bevfn.metrics import COUNTERS, METRICS_FILE, meaning
from bevfn.names import sentence
from bevfn.training import loggers
from bevfn.training.board import TensorBoard
from bevfn.training.speed import Work

WORST = "eval/worst key frame"
WIDE = 100  # columns of a terminal in which there is room for a bar


class Reporter:
    """Context manager; holds the run folder's open files and the recent step times.

    with Reporter(Path("runs/demo"), total_steps=300) as reporter:
        reporter.log(1, {"loss": 3.2, "overflow/points": 0}, seconds=0.8)

    In a terminal one live line shows step, step time, remaining time, samples/s, losses, MFU and memory, of which narrow ones
    cut off what comes behind the remaining time, losses last; otherwise a plain line every `every` steps, after `waiting.EVERY_S` seconds,
    and the first and the last. A run folder that already has metrics is continued: what it has of the steps that come again
    counts no longer, nor what it has behind them (`read_metrics`, and TensorBoard with `start_step`). Speed and memory depend on
    the clock and are for the loggers: the file has each step's seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        *,
        start_step: int = 0,
        every: int = 10,
        shown: tuple[str, ...] = ("loss", "lr", "grad_norm"),
        console: Console | None = None,
        config: Mapping[str, Any] | None = None,
        others: tuple[choices.Logger, ...] = (),
        work: Work | None = None,
    ) -> None:
        """config: the run's flags, as plain JSON values, for TensorBoard and the `others`. `shown`: metrics whose name contains
        one of these appear in the terminal (besides counters that are not 0). `start_step`: steps done when a resumed run goes
        on. work: what a step computes; without it there is no speed. It may be set anew.

        Raises ValueError if total_steps or every is below 1, or if run_dir is a file.
        """
        self.run_dir = Path(run_dir)
        if total_steps < 1 or every < 1:
            raise ValueError(f"Reporter got total_steps {total_steps} and every {every}; both must be at least 1.")
        if self.run_dir.exists() and not self.run_dir.is_dir():
            raise ValueError(
                f"{self.run_dir} is a file, so no run folder can be made there; choose another run folder."
            )
        self.total_steps = total_steps
        self.start_step = start_step
        self.every = every
        self.shown = shown
        self.console = console or Console()
        self.config = config or {}
        self.others = others
        self.work = work
        self._loggers: dict[str, loggers.Logger] = {}
        self._seconds: deque[float] = deque(maxlen=20)  # recent steps, without the one that compiles
        self._logged = 0
        self._spoke = time.monotonic()
        self._progress: Progress | None = None
        self._warned: set[str] = set()
        self._totals: dict[str, float] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Reporter":
        self.run_dir.mkdir(parents=True, exist_ok=True)
        _drop_half_line(self.run_dir / METRICS_FILE)
        with contextlib.ExitStack() as stack:
            # Unbuffered: what a full disk refused must not be tried again, and fail again, when it is closed.
            self._jsonl = stack.enter_context(open(self.run_dir / METRICS_FILE, "ab", buffering=0))
            self._board = TensorBoard(self.run_dir, self.config, self.start_step)
            stack.callback(self._board.close)
            self._loggers = loggers.opened(self.others, self.run_dir, self.config, self.start_step)
            stack.callback(lambda: self._to_others(lambda logger: logger.close()))
            if self.console.is_terminal:
                whole = Column(no_wrap=True, min_width=1)
                self._progress = Progress(
                    MofNCompleteColumn(table_column=whole),
                    *([BarColumn(bar_width=20)] if self.console.width >= WIDE else []),
                    TextColumn("{task.fields[pace]}", markup=False, table_column=replace(whole)),
                    TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
                    console=self.console,
                    refresh_per_second=2,  # the cores are for training
                    expand=True,
                )
                stack.enter_context(self._progress)
                self._task = self._progress.add_task("", total=self.total_steps, pace="")
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()
        self._finish()

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Context manager: what goes on inside is said, if it takes its time, and for how long."""
        live = self._progress
        if live is None:
            if self._logged == 0:
                self._say(what)
            with waiting.told(what, self._say):
                yield
            return
        with waiting.told(what, lambda text: live.update(self._task, description=text), every=1.0):
            yield

    def _say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)
        self._spoke = time.monotonic()

    def log(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Reports one step. step: steps done, 1..total_steps; metrics: numbers or 0-d tensors; seconds: its wall time.

        The line is in the file when this returns. Values that are not finite are written as "nan", "inf", "-inf".
        Raises NotWritten if the disk is full.
        """
        values = {name: float(value) for name, value in metrics.items()}
        line = to_json({"step": step, "seconds": round(seconds, 6), **values}) + b"\n"
        with writing(self.run_dir / METRICS_FILE):
            write_whole(self._jsonl, line)
        speeds = self.work.speeds(seconds) if self.work is not None else {}
        memory = {f"memory/{where}_gib": size / 2**30 for where, size in peak_memory().items()}
        self._scalars(step, {**values, "seconds": seconds, **speeds, **memory})
        self._warn(step, values)

        self._logged += 1
        if self._logged == 1:
            self.console.print(Text(f"first step: {seconds:.2f} s"))
        else:
            self._seconds.append(seconds)
        pace = self._pace(step, seconds)
        shown = [f"{name} {value:.4g}" for name, value in values.items() if self._is_shown(name, value)]
        samples, share = self._speed(seconds)
        narrow = self._progress is not None and self.console.width < WIDE  # there the losses come first
        told = [*shown, *samples] if narrow else [*samples, *shown]
        terms = "  ".join([*told, *share, f"{list(memory.values())[-1]:.3g} GiB"])
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=terms, pace=pace)
        elif (
            self._logged == 1
            or step % self.every == 0
            or step == self.total_steps
            or time.monotonic() - self._spoke > waiting.EVERY_S
        ):
            self._say(f"step {step}/{self.total_steps}  {pace}  {terms}")

    def evaluated(self, step: int, scores: Mapping[str, float], picture: Path | None) -> None:
        """Reports an evaluation after so many steps to the loggers, as "eval/<name>"; picture: a PNG of its worst key frame."""
        self._scalars(step, {f"eval/{name}": value for name, value in scores.items()})
        if picture is not None:
            png = picture.read_bytes()
            self._board.image(step, WORST, png)
            self._to_others(lambda logger: logger.image(step, WORST, png))

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._board.scalars(step, values)
        self._to_others(lambda logger: logger.scalars(step, values))

    def _to_others(self, report: Callable[[loggers.Logger], None]) -> None:
        """To the loggers besides TensorBoard; one that fails is left out from then on, since no service should end a run."""
        for name, logger in list(self._loggers.items()):
            try:
                report(logger)
            except Exception as error:  # whatever a service raises
                del self._loggers[name]
                text = sentence(f"warning: {name} is left out from here on ({type(error).__name__}: {error}).")
                self.console.print(Text(text, style="yellow"), soft_wrap=True)

    def _pace(self, step: int, seconds: float) -> str:
        if not self._seconds:  # the first step's time says nothing about the others
            return f"{seconds:.3g} s/step"
        usual = statistics.median(self._seconds)
        remaining = datetime.timedelta(seconds=round(usual * max(0, self.total_steps - step)))
        return f"{usual:.3g} s/step  ETA {remaining}"

    def _speed(self, seconds: float) -> tuple[list[str], list[str]]:
        """Samples/s and MFU of recent steps, as far as they are known."""
        speeds = {} if self.work is None else self.work.speeds(statistics.median(self._seconds or [seconds]))
        told = (("speed/samples_per_second", "{:.3g} samples/s"), ("speed/mfu", "MFU {:.0%}"))
        samples, share = ([form.format(speeds[name])] if name in speeds else [] for name, form in told)
        return samples, share

    def _is_shown(self, name: str, value: float) -> bool:
        return value != 0 if name.startswith(COUNTERS) else any(part in name for part in self.shown)

    def _warn(self, step: int, values: dict[str, float]) -> None:
        """One sentence the first time a counter is not zero, or another metric not finite."""
        for name, value in values.items():
            if name.startswith(COUNTERS):
                self._totals[name] = self._totals.get(name, 0.0) + (value if math.isfinite(value) else 0.0)
                sentence = f"warning: {name} at step {step}: {value:g} {meaning(name)}." if value else ""
            else:
                fine = math.isfinite(value) or (name == "grad_norm" and _scale_is_sought(values))
                sentence = "" if fine else f"warning: {name} is {value} at step {step}."
            if sentence and name not in self._warned:
                self._warned.add(name)
                self.console.print(Text(sentence, style="yellow"), soft_wrap=True)

    def _finish(self) -> None:
        lost = ", ".join(f"{name} {total:g}" for name, total in self._totals.items() if total)
        if lost:
            self.console.print(Text(f"warning: in all {self._logged} steps: {lost}.", style="yellow"), soft_wrap=True)
        memory = ", ".join(f"{where} {size / 2**30:.2f} GiB" for where, size in peak_memory().items())
        self.console.print(Text(f"peak memory: {memory}; metrics in {self.run_dir / METRICS_FILE}"), soft_wrap=True)


def _scale_is_sought(values: dict[str, float]) -> bool:
    """Whether fp16's step was skipped for a loss scale that was too high, as its first ones are: the scale is halved, and
    training/finite.py says where that does not help."""
    return bool(values.get("skipped")) and "loss_scale" in values


def _drop_half_line(path: Path) -> None:
    """Cuts off what a killed run left behind its last complete line."""
    if path.is_file():
        written = path.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        if len(whole) < len(written):
            write_atomically(path, whole)


def peak_memory() -> dict[str, int]:
    """Bytes so far: `host`, the largest resident set of this process; `device`, the largest sum of tensors there."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and device.type in ("cuda", "npu"):
        peak["device"] = torch.accelerator.max_memory_allocated()
    return peak
