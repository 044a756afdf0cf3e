"""No long silence: while something takes its time, a line now and then says what it is and for how long.

Blocks may lie inside each other: the innermost alone speaks, and where the one around it does.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

EVERY_S = 15.0
SHORT_S = 2.0
"""A block that has taken less says nothing, however long ago the last line was."""
Say = Callable[[str], Any]
_open: list[tuple[object, Say]] = []
"""Blocks that have begun and not ended: (which, where it speaks), the innermost last."""
_last: list[float] = []
"""When the last line was told, or the command began: several short blocks one after another are a long silence too."""


@contextlib.contextmanager
def from_here() -> Iterator[None]:
    """Context manager: inside, a command has been silent since it began."""
    _last[:] = [time.monotonic()]
    try:
        yield
    finally:
        _last.clear()


def _print(text: str) -> None:
    print(text, flush=True)


def aside(text: str) -> None:
    """For `say` of a command whose standard output is a report."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def told(what: str | Callable[[], str], say: Say | None = None, *, every: float | None = None) -> Iterator[None]:
    """Context manager: `say` gets "WHAT: 30 s so far" every so many seconds (EVERY_S) that the block takes; of a short one
    nothing. what: a text, or a function that tells it anew. say: by default that of the block around it, or print."""
    began, pause = time.monotonic(), EVERY_S if every is None else every
    with _opened(say) as (me, to):
        ended = threading.Event()

        def due() -> float:
            """Seconds until a line is."""
            return max((*_last, began)[0] + pause, began + min(SHORT_S, pause)) - time.monotonic()

        def tell() -> None:
            wait = due()
            while not ended.wait(max(wait, 0.0)):
                wait = pause
                if _open[-1][0] is me:
                    try:
                        to(f"{what() if callable(what) else what}: {time.monotonic() - began:.0f} s so far")
                    except BrokenPipeError:  # nobody listens: what the command itself says next ends it (exits.py)
                        return
                    _last[:] = [time.monotonic() for _ in _last]

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@contextlib.contextmanager
def _opened(say: Say | None) -> Iterator[tuple[object, Say]]:
    me = object(), say or (_open[-1][1] if _open else _print)
    _open.append(me)
    try:
        yield me
    finally:
        _open.remove(me)


@contextlib.contextmanager
def counted(
    what: str, total: int, unit: str = "key frames", *, done: int = 0, quiet: bool = False
) -> Iterator[Callable[[int], None]]:
    """Context manager: gives an `advance(count)` for so many of a unit, of which some were done before: a bar in a terminal (on
    standard error), elsewhere what `told` tells; quiet: neither."""
    if quiet:
        yield lambda more: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, seen = Console(stderr=True), [done]
    if not console.is_terminal:

        def count(more: int) -> None:
            seen[0] += more

        with told(lambda: f"{what}, {seen[0]:,} of {total:,} {unit}"):
            yield count
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _opened(None), Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda more: bar.advance(task, more)


@contextlib.contextmanager
def batches(what: str, frames: int, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Context manager: gives a `progress(done, total)` for the batches of so many key frames, of which `told` tells."""
    seen = [0, 0]

    def progress(done: int, total: int) -> None:
        seen[:] = done, total

    def now() -> str:
        return (
            f"{what}, {frames} key frames, {seen[0]} of {seen[1]} batches"
            if seen[1]
            else f"{what}, {frames} key frames, the first"
        )

    with contextlib.nullcontext() if quiet else told(now):
        yield progress
