"""torch's .pth files, without torch.load: only tensors are made of them, and none that the file does not hold.

A .pth is a pickle with the tensors' bytes beside it: in a zip since torch 1.6, one after the other before. The pickle is read here as
far as a state dict needs it: containers, numbers, text, and tensors as places in the file, whose bytes are read when they are
asked for. So nothing that it names is ever called, an optimizer's state costs no memory, a declared size makes none, and the
zip's CRC of everything that is used is checked.

Source: the format as torch/serialization.py writes it, the opcodes as in Python's pickletools.
"""

import contextlib
import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of files before torch 1.6
AGAIN = "save its state dict alone, under names that are text, with torch.save"
MOST_OPERATIONS = 5_000_000  # of one pickle, seconds and 500 MB at most; the published detectors have about 20,000
DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
ORDERED, PARAMETER = "collections.OrderedDict", "torch._utils._rebuild_parameter"
TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
# What stands beside the weights in training checkpoints of torch, Lightning and mmengine. It is read over.
LOGGED = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *("numpy.ndarray", "numpy.dtype", "collections.defaultdict", "collections.Counter", "_codecs.encode", "torch.Size"),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "bytearray")),
    *("torch.device", "torch.float32", "torch.float16", "torch.bfloat16", "torch.float64", "torch.int64", "torch.bool"),
)


class Refused(Exception):
    """Names what a pickle asks for besides tensors."""


class Unread(Exception):
    """Says what a whole file holds that is not read, as the end of a sentence that begins with the file."""


@dataclass(frozen=True)
class Storage:
    """Numbers in the file."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class Stored:
    """A tensor in the file: a view of a storage, in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """Stands for an object of a training log."""


@dataclass(frozen=True)
class _Callable:
    """Stands for one of the few functions that a state dict's pickle calls."""

    name: str


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Callable[[Stored], Tensor]]]:
    """Context manager: (what the file pickles, with a Stored for each tensor; what reads such a tensor).

    Raises Refused for a pickle of anything but tensors and a training log, Unread for one in a form that is not read, and any
    other Exception for a damaged file, also from the reader.
    """
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
        file.seek(0)
        content, read = _zip(file, path.stat().st_size) if zipped else _sequence(file, path.stat().st_size)
        storages: dict[Storage, Tensor] = {}

        def fetch(stored: Stored) -> Tensor:
            if stored.storage not in storages:  # tied weights share one
                storages[stored.storage] = _numbers(stored.storage, read(stored.storage))
            return _view(stored, storages[stored.storage])

        yield content, fetch


# ------------------------------------------------------------------------------------------------------ the two forms


def _zip(file: BinaryIO, size: int) -> tuple[Any, Callable[[Storage], bytes]]:
    archive = zipfile.ZipFile(file)
    entries = archive.infolist()
    # torch compresses nothing, so that whatever its records unpack to is in the file once.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its records are compressed, as torch writes none")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its records say that they are longer than the file")
    pickles = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} records data.pkl")
    root = pickles[0].removesuffix("/data.pkl")
    order = f"{root}/byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise ValueError("its numbers are big-endian")
    content = unpickle(io.BytesIO(archive.read(pickles[0])))
    return content, lambda storage: archive.read(f"{root}/data/{storage.key}")  # which checks the CRC


def _sequence(file: BinaryIO, size: int) -> tuple[Any, Callable[[Storage], bytes]]:
    """Five pickles, the last the storages' keys, then these storages with their lengths before them."""
    if unpickle(file) != MAGIC or unpickle(file) != PROTOCOL:
        raise ValueError("it does not begin with torch's magic number")
    if not unpickle(file).get("little_endian"):
        raise ValueError("its numbers are big-endian")
    storages: dict[str, Storage] = {}
    content = unpickle(file, storages)
    places: dict[str, int] = {}
    for key in unpickle(file):
        count, place = int.from_bytes(file.read(8), "little"), file.tell()
        end = place + count * storages[key].dtype.itemsize
        if count != storages[key].count or end > size:
            raise ValueError(f"storage {key} says that it has {count} numbers")
        places[key] = place
        file.seek(end)

    def read(storage: Storage) -> bytes:
        file.seek(places[storage.key])
        return file.read(storage.count * storage.dtype.itemsize)

    return content, read


def _numbers(storage: Storage, raw: bytes) -> Tensor:
    if len(raw) != storage.count * storage.dtype.itemsize:
        raise ValueError(f"storage {storage.key} has {len(raw)} bytes for {storage.count} numbers")
    return torch.frombuffer(bytearray(raw), dtype=storage.dtype) if raw else torch.empty(0, dtype=storage.dtype)


def _view(stored: Stored, numbers: Tensor) -> Tensor:
    size, stride, offset = stored.size, stored.stride, stored.offset
    whole = all(type(n) is int and 0 <= n < 2**62 for n in (*size, *stride, offset))
    if not whole or len(size) != len(stride) or len(size) > 16:
        raise ValueError("a tensor's shape is none")
    # It repeats its numbers as often as a shape says that may be of any size.
    if 0 < len(numbers) < math.prod(size) and any(n > 1 and not step for n, step in zip(size, stride)):
        raise Unread(
            f"has a tensor of {list(size)} that repeats {len(numbers)} numbers (stride 0, as torch.Tensor.expand makes it); "
            "save it again behind .contiguous()"
        )
    if math.prod(size) > len(numbers):
        raise ValueError(f"a tensor of {list(size)} is stored as {len(numbers)} numbers")
    if math.prod(size) and offset + sum((n - 1) * step for n, step in zip(size, stride)) >= len(numbers):
        raise ValueError(f"a tensor of {list(size)} lies beyond its storage")
    return torch.as_strided(numbers, size, stride, offset)


# ---------------------------------------------------------------------------------------------------------- the pickle

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_ARGUMENTS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINSTRING"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": Inert}
_LAST = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def unpickle(file: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """What the next pickle of a file says, in the opcodes that torch.save writes, of any protocol from 2; `storages` gets those
    that it names.

    Raises Refused for what is no plain data, tensor or log, Unread for other opcodes, ValueError, LookupError or TypeError for
    a damaged one.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    said = False  # protocol 2 and later ones say so first
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count == MOST_OPERATIONS:
            raise ValueError(f"its pickle has more than {MOST_OPERATIONS} operations")
        match opcode.name:
            case "STOP":
                return stack.pop()
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _ARGUMENTS:
                stack.append(argument)
            case name if name in _LAST:
                stack[-_LAST[name] :] = [tuple(stack[-_LAST[name] :])]
            case name if name in _EMPTY:
                stack.append(_EMPTY[name]())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(_above(stack, marks)))
            case "APPEND":
                _extend(stack, [stack.pop()])
            case "APPENDS" | "ADDITEMS":
                _extend(stack, _above(stack, marks))
            case "FROZENSET":
                _above(stack, marks)
                stack.append(Inert())
            case "SETITEM":
                _fill(stack, [stack.pop(-2), stack.pop()])
            case "SETITEMS":
                _fill(stack, _above(stack, marks))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_global(str(argument).replace(" ", ".")))
            case "STACK_GLOBAL":
                stack[-2:] = [_global(".".join(stack[-2:]))]
            case "BINPERSID":
                stack.append(_storage(stack.pop(), storages))
            case "REDUCE" | "NEWOBJ":
                stack[-2:] = [_made(*stack[-2:])]
            case "BUILD":
                stack.pop()  # attributes, such as the versions of modules
            case "PROTO" | "FRAME":
                said = True
            case name:
                whose = "which torch.save does not write" if said else "of protocol 0 or 1, which is not read"
                raise Unread(f"has the operation {name} in its pickle, {whose}; {AGAIN}")
    raise ValueError("its pickle has no end")


def _above(stack: list[Any], marks: list[int]) -> list[Any]:
    """Takes what was put on the stack since the last mark."""
    mark = marks.pop()
    taken = stack[mark:]
    del stack[mark:]
    return taken


def _extend(stack: list[Any], items: list[Any]) -> None:
    if not isinstance(stack[-1], list | Inert):
        raise TypeError(f"a {type(stack[-1]).__name__} where a list belongs")
    if isinstance(stack[-1], list):
        stack[-1].extend(items)


def _fill(stack: list[Any], items: list[Any]) -> None:
    target = stack[-1]
    if not isinstance(target, dict | Inert):
        raise TypeError(f"a {type(target).__name__} where a dict belongs")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # To hash nested tuples, or many whole numbers that were chosen for it, can take for ever.
        if not (isinstance(key, str | float | None) or (isinstance(key, int) and key.bit_length() < 61)):
            raise Unread(
                f"has a dict with a {type(key).__name__} for a name, where bevfn reads text and numbers; {AGAIN}"
            )
        if isinstance(target, dict):
            target[key] = value


def _global(name: str) -> Any:
    kind = name.removeprefix("torch.").removesuffix("Storage")
    if name == f"torch.{kind}Storage" and kind in DTYPES:
        return DTYPES[kind]
    if name in (ORDERED, PARAMETER, *TENSORS):
        return _Callable(name)
    if name in LOGGED:
        return Inert()
    raise Refused(name)


def _storage(place: Any, storages: dict[str, Storage] | None) -> Storage:
    """A persistent id: ("storage", type, key, device, count), and in old files a view, which is always None."""
    kind, dtype, key, _, count, *rest = place
    if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str or type(count) is not int:
        raise Refused(f"reference to a {_shown(kind)}")
    found = Storage(key, dtype, count)
    known = found if storages is None else storages.setdefault(key, found)
    if count < 0 or any(view is not None for view in rest) or known != found:
        raise ValueError(f"storage {_shown(key)} has {count} numbers")
    return found


def _made(what: Any, arguments: Any) -> Any:
    """What a call of one of the known functions makes."""
    if isinstance(what, Inert):
        return what
    if not isinstance(what, _Callable) or not isinstance(arguments, tuple):
        raise TypeError(f"a call of a {type(what).__name__}")
    if what.name == ORDERED:
        made: list[Any] = [{}]
        for pair in arguments[0] if arguments else ():
            _fill(made, list(pair))
        return made[0]
    if what.name == PARAMETER:
        return arguments[0]
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, Storage):
        raise TypeError(f"a tensor of a {type(storage).__name__}")
    return Stored(storage, offset, tuple(size), tuple(stride))


def _shown(value: Any) -> str:
    return value[:60] if isinstance(value, str) else type(value).__name__
