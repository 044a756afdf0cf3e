"""Checkpoint files: foreign .pth, read without ever running what they pickle, and what an import writes.

An imported file is one .safetensors: our leaves as `params.<path>` and `state.<path>`, the tensors that only an exact
export needs as `upstream.<key>`, and in the metadata the model, the source file, its layout, and a checksum.
"""

import io
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bevfn import catalogue, tree
from bevfn.files import to_json, write_atomically
from bevfn.upstream import checkpoints, torch_file
from bevfn.upstream.convert import Account, nest
from bevfn.upstream.entries import Naming
from bevfn.upstream.recognise import SparseLayout

_FORMAT = "bevfn import 2"
_UNSEALED = "bevfn import 1"  # of files without a checksum
_METADATA = ("model", "source", "sparse", "naming", "prefix")


@dataclass(frozen=True)
class Imported:
    """An imported model as read from its file."""

    params: dict
    state: dict
    carried: dict[str, Tensor]  # upstream key: tensor kept for an exact export
    model: str
    source: str  # name of the published file
    sparse: SparseLayout
    naming: Naming
    prefix: str


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """{upstream key: tensor} of a .safetensors file, or of a torch file's `state_dict`, `model` or top level.

    Raises ValueError if the file is absent, damaged, holds pickled objects besides tensors, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint file.")
    found = _read_safetensors(path)[0] if path.suffix == ".safetensors" else _read_torch(path)
    for key in found:
        if not key.isprintable():
            raise ValueError(f"{path}: the state dict has an entry named {key[:60]!r}; give it another name.")
    return found


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata)"""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OverflowError, RuntimeError) as error:  # RuntimeError: of torch, for a shape
        why = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a complete safetensors file ({why}): copy or download it again.") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with torch_file.opened(path) as (content, fetch):
            return {key: fetch(stored) for key, stored in _state_dict(content).items()}
    except torch_file.Refused as refused:
        raise ValueError(
            f"{path} holds a pickled {refused} besides tensors, which bevfn never loads because unpickling runs the file's "
            f"code; if you trust its origin, re-save its tensors alone in a throw-away environment: python -c "
            f"\"import torch; c = torch.load('{path}', map_location='cpu', weights_only=False); "
            f"torch.save({{'state_dict': dict(c.get('state_dict', c))}}, '{path.with_suffix('')}_tensors.pth')\"."
        ) from refused
    except torch_file.Unread as what:
        raise ValueError(f"{path} {what}.") from None
    except _NoStateDict as what:
        raise ValueError(f"{path}{what}") from None
    except Exception as error:  # a damaged pickle or zip ends in nearly any exception
        with open(path, "rb") as file:
            start = file.read(8)
        if start and not start.startswith((b"PK", b"\x80")):  # neither a zip archive nor a pickle
            raise ValueError(f"{path} is not a torch checkpoint: it begins with {start!r}.") from error
        line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not a complete torch checkpoint ({line}): copy or download it again.") from error


class _NoStateDict(Exception):
    """Ends a sentence that begins with the file."""


def _state_dict(content: Any) -> dict[str, torch_file.Stored]:
    for place in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(place), dict):
            content = content[place]
            break
    if not isinstance(content, dict) or not content:
        raise _NoStateDict(" holds no state dict: not in `state_dict`, not in `model`, not at its top level.")
    for key, leaf in content.items():
        if not isinstance(key, str):
            raise _NoStateDict(f": an entry of the state dict is named {key!r}, which is no text.")
        if not isinstance(leaf, torch_file.Stored):
            raise _NoStateDict(f": entry {key[:60]!r} of the state dict is a {type(leaf).__name__}, not a tensor.")
    return content


def write_imported(path: Path, params: dict, state: dict, report: Account, *, source: str) -> None:
    """Writes an imported model, atomically; the metadata holds what `convert.export_state` asks for, and a checksum."""
    tensors = {f"params.{name}": leaf for name, leaf in tree.flatten(params).items()}
    tensors |= {f"state.{name}": leaf for name, leaf in tree.flatten(state).items()}
    tensors |= {f"upstream.{key}": leaf for key, leaf in report.carried.items()}
    metadata = {"format": _FORMAT, "model": report.model, "source": source, "sparse": report.sparse}
    metadata |= {"naming": report.naming, "prefix": report.prefix}
    metadata["crc32"] = _checksum(tensors, metadata)
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def read_imported(path: Path) -> Imported:
    """Reads what `write_imported` wrote; raises ValueError if the file is absent, damaged or (NotImported) something else.

    Damage is found by a checksum, which files that an earlier bevfn imported do not have.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint file.")
    try:
        with open(path, "rb") as file:
            foreign = file.read(9)[8:] != b"{"
        tensors, metadata = ({}, {}) if foreign else _read_safetensors(path)
        if metadata.get("format") not in (_FORMAT, _UNSEALED):
            raise NotImported(f"{path} was not written by `bevfn checkpoint import`: import the published file first.")
        checksum = metadata.pop("crc32", None)
        if metadata["format"] == _FORMAT and checksum != _checksum(tensors, metadata):
            raise ValueError("its checksum is another")
        return _imported(tensors, metadata)
    except (NotImported, OSError):
        raise
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is damaged ({error}): copy it, or import the published file, again.") from None


class NotImported(ValueError):
    """The file is none of `write_imported`."""


def _imported(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Imported:
    if missing := [name for name in _METADATA if name not in metadata]:
        raise ValueError(f"its metadata lacks {', '.join(missing)}")
    model = catalogue.FORMER.get(metadata["model"], metadata["model"])
    known = {"model": checkpoints.CHECKPOINTS, "sparse": get_args(SparseLayout), "naming": get_args(Naming)}
    for name, choices in known.items():
        if (value := model if name == "model" else metadata[name]) not in choices:
            raise ValueError(f"its {name} is {value[:60]!r}, none of {', '.join(choices)}")
    if odd := [name for name in tensors if not name.isprintable()]:
        raise ValueError(f"it holds a leaf named {odd[0][:60]!r}")
    parts: dict[str, dict[str, Tensor]] = {"params": {}, "state": {}, "upstream": {}}
    for name, leaf in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts or not rest:
            raise ValueError(f"it holds {name[:60]!r}, which is neither of params, state nor upstream")
        parts[part][rest] = leaf
    return Imported(
        nest(parts["params"]),
        nest(parts["state"]),
        parts["upstream"],
        model,
        metadata["source"],
        cast(SparseLayout, metadata["sparse"]),
        cast(Naming, metadata["naming"]),
        metadata["prefix"],
    )


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of everything that an imported file says besides."""
    crc = zlib.crc32(to_json(sorted(metadata.items())))
    for name in sorted(tensors):
        leaf = tensors[name].contiguous()
        crc = zlib.crc32(f"{name} {tree.describe(leaf)}".encode(), crc)
        crc = zlib.crc32(leaf.reshape(-1).view(torch.uint8).numpy().data, crc)
    return str(crc)


def write_state_dict(path: Path, upstream: Mapping[str, Tensor], *, sparse: SparseLayout) -> None:
    """Writes an upstream state dict as .safetensors or, any other suffix, as mmengine writes .pth; atomically."""
    path = Path(path)
    if path.suffix == ".safetensors":
        write_atomically(path, safetensors.torch.save(dict(upstream)))
        return
    state_dict = OrderedDict(upstream)
    if sparse == "spconv2":
        # Upstream's loader permutes sparse kernels unless the module's recorded version is 2.
        modules = {key.rpartition(".")[0] for key in upstream if "pts_middle_encoder." in key}
        state_dict._metadata = OrderedDict({module: {"version": 2} for module in sorted(modules)})  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    torch.save({"meta": {}, "state_dict": state_dict}, buffer)
    write_atomically(path, buffer.getvalue())
