"""An index that is built once: kept in a file beside the data, and made again when what it was made of changes."""

import contextlib
import io
import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bevfn.data import building
from bevfn.data.index import Packed, pack
from bevfn.files import write_atomically

Header = dict[str, Any]  # what a cached file must have been made of


def places(root: Path, cache: Path | None = None) -> list[Path]:
    """Folders where the file of a root may be: `cache`, else root/.bevfn, else a folder of `$BEVFN_CACHE` (~/.cache/bevfn)."""
    return [Path(cache)] if cache is not None else [root / ".bevfn", building.home(root)]


def stats(files: dict[str, Path]) -> dict[str, list[int]]:
    """Size and mtime [ns] of those of the files that are there."""
    return {name: [(s := path.stat()).st_size, s.st_mtime_ns] for name, path in files.items() if path.is_file()}


def get(folders: list[Path], name: str, header: Header, build: Callable[[], Packed], *, keep: bool = True) -> Packed:
    """The stored frames if they belong to the header, else those that `build` makes, which are kept in the first folder that
    takes them. Processes that ask at once wait for the one that builds. keep: False writes nothing."""
    packed = read(folders, name, header)
    if packed is None and not keep:
        return build()
    if packed is None:
        with _only_one(folders, f"{name}.lock"):
            packed = read(folders, name, header)  # another process may have been faster
            if packed is None:
                packed = build()
                _store(folders, name, header, packed)
    return packed


def read(folders: list[Path], name: str, header: Header) -> Packed | None:
    """The stored columns if one of the folders has them and they belong to the header."""
    for place in folders:
        try:
            with np.load(place / name, allow_pickle=False) as file:
                if json.loads(str(file["header"])) == header:
                    return Packed({key: file[key] for key in pack(()).columns})
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            warnings.warn(f"{place / name} is damaged ({error}); the index is built again.", stacklevel=4)
    return None


def _store(folders: list[Path], name: str, header: Header, packed: Packed) -> None:
    """Writes the columns to the first folder that takes them; without any, the next run builds again."""
    buffer = io.BytesIO()
    np.savez(buffer, header=np.array(json.dumps(header)), **packed.columns)
    reasons = []
    for place in folders:
        try:
            return write_atomically(place / name, buffer.getvalue())
        except OSError as error:
            reasons.append(f"{place}: {error.strerror or error}")
    warnings.warn(f"the index cannot be kept ({'; '.join(reasons)}), so the next run builds it again.", stacklevel=4)


@contextlib.contextmanager
def _only_one(folders: list[Path], name: str) -> Iterator[None]:
    """Holds a lock that other processes wait for; none where no folder can be written or locked (then all build)."""
    with contextlib.ExitStack() as stack:
        for place in folders:
            with contextlib.suppress(OSError, ImportError):
                import fcntl  # not on Windows

                place.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(place / name, "w"))
                fcntl.flock(file, fcntl.LOCK_EX)  # the system drops it when the process ends, however it ends
                break
        yield
