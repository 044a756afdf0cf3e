"""Checkpoint files: foreign .pth, read without ever running what they pickle, and what an import writes.

An imported file is one .safetensors: our leaves as `params.<path>` and `state.<path>`, the tensors that only an exact
export needs as `upstream.<key>`, and in the metadata the model, the source file and its layout.
"""

import io
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bevfn import tree
from bevfn.files import write_atomically
from bevfn.upstream import models
from bevfn.upstream.convert import Report, nest
from bevfn.upstream.entries import Naming
from bevfn.upstream.recognise import SparseLayout


class _Inert:
    """Stands for an object of a checkpoint's training log: takes any arguments and state, keeps and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# mmengine stores its running averages beside the weights. torch's safe unpickler refuses them; these names, and no
# others, are read as `_Inert`, so numpy's and mmengine's own reconstruction code never runs.
_TRAINING_LOG = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
)


_FORMAT = "bevfn import 1"


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
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for place in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(place), Mapping):
            content = content[place]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no state dict: not in `state_dict`, not in `model`, not at its top level.")
    for key, leaf in content.items():
        if not isinstance(key, str) or not isinstance(leaf, Tensor):
            raise ValueError(f"{path}: entry {key!r} of the state dict is a {type(leaf).__name__}, not a tensor.")
        if leaf.layout != torch.strided or leaf.is_quantized:
            raise ValueError(f"{path}: {key} is a sparse or quantized tensor; store it as a plain dense one.")
    return {key: leaf.detach() for key, leaf in content.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): copy or download it again.") from error


def _read_torch(path: Path) -> Any:
    stand_ins: list[Any] = [(_Inert, name) for name in _TRAINING_LOG]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")  # about pickle protocols, of files that are then refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        with open(path, "rb") as file:
            start = file.read(8)
        if not named and not start.startswith((b"PK", b"\x80")):  # neither a zip archive nor a pickle
            raise ValueError(f"{path} is not a torch checkpoint: it begins with {start!r}.") from error
        what = f"a pickled {named.group(1)}" if named else "pickled objects"
        raise ValueError(
            f"{path} holds {what} besides tensors, which bevfn never loads because unpickling runs the file's code; "
            f"if you trust its origin, re-save its tensors alone in a throw-away environment: python -c "
            f"\"import torch; c = torch.load('{path}', map_location='cpu', weights_only=False); "
            f"torch.save({{'state_dict': dict(c.get('state_dict', c))}}, '{path.with_suffix('')}_tensors.pth')\"."
        ) from error
    except Exception as error:  # torch reports a damaged file as one of RuntimeError, EOFError, KeyError, ...
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is not a complete torch checkpoint ({line}): copy or download it again.") from error


def write_imported(path: Path, params: dict, state: dict, report: Report, *, source: str) -> None:
    """Writes an imported model, atomically; the metadata holds what `convert.export_state` asks for."""
    tensors = {f"params.{name}": leaf for name, leaf in tree.flatten(params).items()}
    tensors |= {f"state.{name}": leaf for name, leaf in tree.flatten(state).items()}
    tensors |= {f"upstream.{key}": leaf for key, leaf in report.carried.items()}
    metadata = {"format": _FORMAT, "model": report.model, "source": source, "sparse": report.sparse}
    metadata |= {"naming": report.naming, "prefix": report.prefix}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def read_imported(path: Path) -> Imported:
    """Reads what `write_imported` wrote; raises ValueError if the file is absent, damaged or something else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint file.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): copy it again.") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} was not written by `bevfn checkpoint import`: import the published file first.")
    parts: dict[str, dict[str, Tensor]] = {"params": {}, "state": {}, "upstream": {}}
    for name, leaf in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = leaf
    return Imported(
        nest(parts["params"]),
        nest(parts["state"]),
        parts["upstream"],
        models.RENAMED.get(metadata["model"], metadata["model"]),
        metadata["source"],
        cast(SparseLayout, metadata["sparse"]),
        cast(Naming, metadata["naming"]),
        metadata["prefix"],
    )


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
