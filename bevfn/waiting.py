"""No long silence: while something takes its time, a line now and then says what it is and for how long."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

EVERY_S = 15.0


def _print(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def told(
    what: str | Callable[[], str], say: Callable[[str], Any] = _print, *, every: float | None = None
) -> Iterator[None]:
    """Context manager: `say` gets "WHAT: 30 s so far" every so many seconds (EVERY_S) that the block takes; of a short one
    nothing. what: a text, or a function that tells it anew."""
    ended, began, pause = threading.Event(), time.monotonic(), EVERY_S if every is None else every

    def tell() -> None:
        while not ended.wait(pause):
            say(f"{what() if callable(what) else what}: {time.monotonic() - began:.0f} s so far")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


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
