"""How a command ends: what a user can mend is one sentence and an exit code, never a traceback.

0    done
1    `bevfn data check` found a problem, `bevfn parity` or `bevfn export` a boundary that differs
2    refused: a file, flag or machine is not what it has to be, in one sentence on standard error
130  Ctrl-C, once or twice, 143 SIGTERM (of a run: see training/signals.py)
141  nobody reads standard output any more, as by `| head`; nothing is said
"""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from bevfn import memory
from bevfn.names import WORD, printable, sentence

REFUSED, INTERRUPTED, UNHEARD, TERMINATED = 2, 130, 141, 143


@contextlib.contextmanager
def one_sentence(*also: type[Exception]) -> Iterator[None]:
    """Context manager: ends the process after Ctrl-C or an exception that a user can mend inside: ValueError, OSError, those
    of `also`, and too little memory, however it is said.

    RuntimeError is in `also` or not: it is torch's word for a bug, whose traceback is needed where much is computed.
    """
    mendable: tuple[type[Exception], ...] = (ValueError, OSError, *also)
    try:
        yield
        if sys.stdout is not None:  # as of a command that is started with it closed
            sys.stdout.flush()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError) or not _heard():  # rich's consoles exit so, with 1
            sys.exit(UNHEARD)
        raise
    except KeyboardInterrupt:  # in a run: the second one, see training/signals.py
        if threading.current_thread() is threading.main_thread():  # another while Python ends would be a traceback
            signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        print("bevfn: stopped by Ctrl-C; what was written before is whole", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        why = memory.missing(error)
        if why is None and not isinstance(error, mendable):
            raise
        if isinstance(error, BrokenPipeError) and not _heard():
            sys.exit(UNHEARD)
        print(f"bevfn: {sentence(why or said(error))}", file=sys.stderr)  # on one line, whatever names are in it
        sys.exit(REFUSED)


@contextlib.contextmanager
def tidy_on_terminate() -> Iterator[None]:
    """Context manager: SIGTERM inside is a SystemExit, so that what is half written is taken away before the process ends.

    Only the first: `timeout` sends two, and the second would end the tidying. Outside the main thread, where Python allows
    no handlers, and where SIGTERM is already somebody's, nothing changes.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    stopped = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"bevfn: stopped by SIGTERM; what was written before is whole\n")
        sys.exit(TERMINATED)

    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if stopped:  # whatever became of the SystemExit: an import of compiled code makes an ImportError of it
            sys.exit(TERMINATED)


def _heard() -> bool:
    """Whether standard output is still read; what is left of it is dropped where it is not, as by `bevfn ... | head`."""
    try:
        sys.stdout.flush()
        out = select.poll()
        out.register(sys.stdout.fileno(), 0)
        heard = not any(event & select.POLLERR for _, event in out.poll(0))  # of a pipe: its reader is gone
    except BrokenPipeError:
        heard = False
    except (OSError, ValueError, AttributeError):  # no file, as in a notebook; closed; no poll on this system
        return True
    if not heard:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
    return heard


def said(error: Exception) -> str:
    """What an exception says; of the system's own about a file, its name and what is wrong, without a number."""
    if isinstance(error, OSError) and type(error).__str__ is OSError.__str__ and error.filename is not None:
        return f"{printable(error.filename, WORD)}: {error.strerror}"
    return str(error)
