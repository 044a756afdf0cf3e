"""--profile: what some steps spend their time on, as a trace that https://ui.perfetto.dev opens.

The phases of every step are ranges in it: read (wait for the samples), move (copy them to the device), step (the whole
train step, as far as the host hands it to the device) and report (metrics, terminal, files). Each process has the same
phases; the one that leads traces its own.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bevfn.files import writing
from bevfn.training.tasks import Run, say

TRACE = "trace.json.gz"
BEFORE = 3  # steps that are not traced: the first compiles, the others warm caches up, the last of them the profiler


def phase(name: str) -> contextlib.AbstractContextManager[Any]:
    """Context manager: a range of this name, in a trace if there is one."""
    return torch.profiler.record_function(name)


@contextlib.contextmanager
def traced(run: Run) -> Iterator[Callable[[], None]]:
    """Context manager that gives what is to be called after every step; the trace of steps BEFORE + 1 to BEFORE + --profile
    that this process makes is RUN/trace.json.gz. Raises NotWritten if the disk does not take it."""
    if not run.config.profile or not run.leads:
        yield lambda: None
        return
    path, written = run.config.run_dir / TRACE, []

    def write(profiler: torch.profiler.profile) -> None:
        temporary = path.with_name(f".{os.getpid()}.{TRACE}")
        with writing(path):
            profiler.export_chrome_trace(str(temporary))
            os.replace(temporary, path)
        written.append(path)
        say(run, f"trace of {run.config.profile} steps: {path}, for https://ui.perfetto.dev")

    schedule = torch.profiler.schedule(skip_first=BEFORE - 1, wait=0, warmup=1, active=run.config.profile, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler.step
    if not written:
        say(run, f"warning: no trace, since --profile begins after {BEFORE} steps and the run made no more")
