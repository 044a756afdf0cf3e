"""Pickles of plain data: containers, numbers, text and numpy arrays. Every other name is refused, so nothing in them runs."""

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bevfn import host
from bevfn.names import printable, sentence

MEMORY = (2**28, 64)  # bytes that a file may take: so many, and so many times its own


class _Refused(Exception):
    """Names what a pickle asked for."""


def _latin1(text: str, encoding: str) -> bytes:
    """Stands for _codecs.encode, with which pickle's protocol 2 (mmengine's) spells bytes."""
    if encoding != "latin1":
        raise _Refused(f"_codecs.encode with {encoding!r}")
    return text.encode("latin1")


def _frombuffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray:
    """Stands for numpy's function of that name, with which pickle's protocol 5 spells arrays."""
    return np.frombuffer(bytes(buffer), dtype=dtype).reshape(shape, order=order)


_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset, bytearray)},
    # numpy's own functions, under the names that numpy 1 and numpy 2 write
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0] for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): np.float64(0).__reduce__()[0] for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise _Refused(f"{module}.{name}")
        return _PLAIN[module, name]


def read(path: Path) -> Any:
    """What the pickle holds. Raises ValueError, one sentence with the file, for one that asks for anything but plain data, that
    is damaged, or that would take more memory than a file of its size can need.
    """
    raw = path.read_bytes()
    try:
        # A length that a pickle declares is not yet there, so memory is what tells an honest one. From bytes, not from the
        # file, of which a read of the declared length would be asked.
        with host.bounded_memory(MEMORY[0] + MEMORY[1] * len(raw)):
            return _Unpickler(io.BytesIO(raw)).load()
    except _Refused as refused:
        raise ValueError(
            f"{path} asks for {printable(refused)}; an info file holds plain data and numpy arrays, and bevfn runs nothing "
            "else from a pickle: make the file again with create_data.py, or give the data set root instead."
        ) from refused
    except Exception as error:  # a damaged pickle ends in nearly any exception
        raise ValueError(
            f"{path} is no complete pickle ({type(error).__name__}: {sentence(error)}); copy it again."
        ) from error
