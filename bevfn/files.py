"""Writing files so that a reader never finds half of one."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


class NotWritten(OSError):
    """A file or folder that could not be written, as one sentence: the disk is full, or not ours to write to."""

    def __str__(self) -> str:
        return (
            f"{self.filename} could not be written ({self.strerror}); make room there or choose another folder (what was "
            "there before is intact)"
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError inside into NotWritten of `path`."""
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        raise NotWritten(error.errno, error.strerror or str(error), str(path)) from None


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` beside `path`, then renames; creates missing folders.

    Raises NotWritten if the disk does not take it; after any error `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")  # nodes share file systems
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # of a folder that is read-only, or no folder
                temporary.unlink(missing_ok=True)
