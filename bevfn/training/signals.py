"""Stopping a run between two steps when it is asked to end: SIGTERM (schedulers, `timeout`, torchrun) and Ctrl-C.

A run that ends so exits with 128 + the signal's number, as a shell reports a process that the signal killed: 143 after
SIGTERM, 130 after Ctrl-C. So `train && next` goes on only with a model that is done.
"""

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

    number: int = 0
    """of the first signal, 0: none"""

    @property
    def requested(self) -> bool:
        return self.number != 0


class Stopped(SystemExit):
    """Ends the process whose run was asked to stop, once that is saved; where no handler of SystemExit is, with `code`."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


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
            stop.number = number

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
