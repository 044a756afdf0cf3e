"""What is made of a data set once: where it lies, of what it was made, and that one process at a time makes it. Its jobs
(`host.unordered`) write their own files atomically, so a stopped build goes on where it was."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bevfn.data.index import Index
from bevfn.files import writing
from bevfn.kernels.cache import cache_dir
from bevfn.names import printable


def home(root: Path) -> Path:
    """The folder for what is made of a data set whose root cannot be written: in `$BEVFN_CACHE` or `~/.cache/bevfn`."""
    return cache_dir() / "data" / hashlib.sha256(str(Path(root).resolve()).encode()).hexdigest()[:16]


def place(root: Path, name: str) -> Path:
    """ROOT/name, or, where there is none and the root cannot be written, `name` in the root's `home`."""
    inside = Path(root) / name
    return inside if inside.exists() or os.access(root, os.W_OK) else home(root) / name


@dataclass(frozen=True)
class Origin:
    """Which key frames something was made of, kept beside it."""

    version: str
    split: str
    frames: int
    files: str
    """Digest of their tokens and of the names of the files that were read."""
    numbers: str
    """Digest of calibration, poses, boxes: of whatever else decides what was made."""

    def __post_init__(self) -> None:
        texts = (self.version, self.split, self.files, self.numbers)
        if type(self.frames) is not int or not all(isinstance(text, str) for text in texts):
            raise TypeError("it does not say what it was made of")

    @classmethod
    def of(cls, index: Index, files: tuple[str, ...], numbers: tuple[str, ...]) -> Self:
        """That of an index, by these columns of its packed frames."""
        joined = ("".join(index.digests[name] for name in names).encode() for names in (files, numbers))
        return cls(index.version, index.split, len(index), *(hashlib.sha256(text).hexdigest()[:16] for text in joined))

    def check(self, what: Path, index: Index, now: Self) -> None:
        """Raises ValueError where an index, of which `now` is the origin, is not what `what` was made of.

        An info file tells the same numbers rounded otherwise, so that only its files are compared.
        """
        if self.files == now.files and (self.numbers == now.numbers or not (len(index) and index[0].scene)):
            return
        other = "calibrations, poses or boxes" if self.files == now.files else "key frames"
        raise ValueError(
            f"{what} was made of other {other} ({self}) than the {now.frames:,} of {index.root} ({now.version}, split "
            f"'{now.split}'); delete it, or make it again with `bevfn data prepare`"
        )

    def __str__(self) -> str:
        return f"{self.frames:,} key frames of {printable(self.version)}, split '{printable(self.split)}'"


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Makes the folder, and holds a lock on it that the system lets go of when its process ends, however it ends.

    Raises ValueError if another process holds it, NotWritten if the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(out / ".lock", "w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{out}: another build is writing here; wait for it or choose another folder.") from error
        yield
