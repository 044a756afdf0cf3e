"""What a run's numbers depend on besides its config, as short texts that a checkpoint keeps: its data, and this code."""

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import astuple, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

import bevfn
from bevfn.data.index import Index, Packed

SOURCES = (".py", ".cpp", ".h", ".cu")
DIGITS = 16  # of a SHA-256: 64 bits tell accidents apart


def data(index: Index, items: np.ndarray) -> str:
    """Of the key frames (files, poses, boxes; not what the files hold), and of which ones an epoch reads: hex digits.

    Where the data set lies makes no difference.
    """
    digest = hashlib.sha256(np.asarray(items, dtype=np.int64).tobytes())
    frames: Any = index.frames
    for part in _parts(dict(sorted(frames.columns.items())) if isinstance(frames, Packed) else list(frames)):
        digest.update(part)
    return digest.hexdigest()[:DIGITS]


def _parts(value: Any) -> Iterator[bytes]:
    """The bytes of arrays and the text of everything else, in order, with what they are."""
    if isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _parts(astuple(value))
    elif isinstance(value, dict):
        yield from _parts([*value.items()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode() + b"\0"


@functools.cache
def code() -> str:
    """bevfn's version and a fingerprint of its sources, kernels and experiments included."""
    digest = hashlib.sha256()
    root = Path(bevfn.__file__).parent
    for file in sorted(_sources(root)):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return f"{bevfn.__version__} {digest.hexdigest()[:DIGITS]}"


def _sources(root: Path) -> Iterable[Path]:
    for folder, _, names in os.walk(root, followlinks=True):  # kernels/ and experiments/ are links in a checkout
        yield from (Path(folder) / name for name in names if name.endswith(SOURCES))
