"""Stopping a run between two steps when it is asked to end: SIGTERM (schedulers, `timeout`, torchrun) and Ctrl-C."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """What was asked so far; the signal handler writes it."""

    requested: bool = False


@contextlib.contextmanager
def on_terminate() -> Iterator[Stop]:
    """Inside, SIGTERM and the first Ctrl-C only set `requested`, which the loop reads after each step; a second Ctrl-C
    raises KeyboardInterrupt. The handlers before are put back at the end.

        with on_terminate() as stop:
            for step in ...:
                ...
                if stop.requested:
                    save; break

    Outside the main thread, where Python allows no handlers, nothing is ever requested.
    """
    stop = Stop()

    def handler(number: int, frame: FrameType | None) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not stop.requested:
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\nbevfn: {signal.Signals(number).name}: stopping after this step\n".encode())
        stop.requested = True

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
