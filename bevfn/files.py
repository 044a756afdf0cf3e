"""Writing files so that a reader never finds half of one, and the JSON in them: strict, both ways."""

import contextlib
import json
import math
import os
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

CHUNK = 2**22  # bytes


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


def check_writable(folder: Path, flag: str = "--out") -> None:
    """Raises ValueError, one sentence, unless files can be written to `folder`, or it can be made; changes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"cannot make the output folder {folder}: {there} is no folder; choose another {flag}")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write to the output folder {folder}: {error.strerror}; choose another {flag}"
        ) from None


def check_json(file: Path | None) -> None:
    """The same for the file of a flag --json, if there is one, before what goes into it is computed."""
    if file is not None and file.is_dir():
        raise ValueError(f"--json {file} is a folder; name a file")
    if file is not None:
        check_writable(file.parent, "--json")


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


def write_whole(file: BinaryIO, content: bytes) -> None:
    """Writes to an unbuffered file, which takes what fits; the rest then meets the error."""
    while content:
        content = content[file.write(content) :]


def check_new_folder(folder: Path, flag: str = "--out") -> None:
    """Raises ValueError, one sentence, unless a folder is not there or empty, and can be made; changes nothing."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"the output folder {folder} exists and is not empty; choose another {flag}, or empty it")
    check_writable(folder, flag)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside, to be filled inside the context, which then becomes `folder`; after an error nothing is left of it,
    nor of the folders above it that were missing."""
    folder = folder.absolute()
    made = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
    missing = [above for above in made.parents if not above.exists()]  # innermost first
    try:
        with writing(folder):
            made.mkdir(parents=True)
        yield made
        with writing(folder):
            os.replace(made, folder)  # over an empty one too
    finally:
        shutil.rmtree(made, ignore_errors=True)
        for above in missing:
            with contextlib.suppress(OSError):  # it is not empty: `folder` is there, or others wrote too
                above.rmdir()


def to_json(value: Any, *, indent: int | None = None) -> bytes:
    """`value` as JSON that every reader takes: numbers that are not finite, which JSON lacks, become "nan", "inf", "-inf".

    Python's float() reads those again. What JSON cannot say raises TypeError.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False).encode()
    except (ValueError, TypeError):  # most files need no copy
        return json.dumps(_strict(value), indent=indent, allow_nan=False).encode()


def as_read(value: Any) -> Any:
    """`value` as it comes back from a JSON file: tuples as lists, and what JSON cannot say, such as a Path, as its text."""
    return read_json(json.dumps(_strict(value), default=str, allow_nan=False).encode())


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value


def read_json(text: bytes, *, finite: bool = True) -> Any:
    """What strict JSON says; raises ValueError, without a file's name, for anything else, however it is broken.

    finite: no NaN and no number beyond float64, which others' writers put into JSON.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite) if finite else json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no number that fits")
    return value


def checksum(path: Path) -> tuple[int, int]:
    """(bytes, CRC-32) of a file; 2.4 GB/s, which its disk is not."""
    size = crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc
