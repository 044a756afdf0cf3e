"""Training checkpoints: a folder of one safetensors file and one JSON file that appears complete or not at all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from bevfn import tree
from bevfn.files import write_atomically

TENSORS, META = "train_state.safetensors", "meta.json"


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes one safetensors file atomically."""
    write_atomically(path, save({k: _own(v.detach().cpu()) for k, v in tensors.items()}, metadata))


def _own(tensor: Tensor) -> Tensor:
    # safetensors refuses views of one storage, which parameters are after a step that was not donated its state.
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads one safetensors file onto the CPU; raises ValueError, naming it, if it is missing, truncated or foreign."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the path of a .safetensors file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); copy it again") from None


def save_step(folder: Path, train_state: Any, meta: dict, *, keep: int = 3) -> None:
    """Writes `train_state` and `meta` as `folder`, such as runs/x/checkpoints/step_00000060, which is there complete or
    not at all (temporary name, fsync, rename), and deletes all but the `keep` last written beside it (0: none)."""
    folder = Path(folder)
    made = folder.with_name(f".{folder.name}.{os.getpid()}")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    made.mkdir(parents=True)
    try:
        save_tensors(made / TENSORS, tree.flatten(train_state))
        write_atomically(made / META, json.dumps({"torch": torch.__version__, **meta}, indent=1).encode())
        _sync(made)
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    # By time, not by name: a run that starts again writes smaller step numbers beside larger ones of the run before.
    written = sorted(folder.parent.glob(f"{folder.name.partition('_')[0]}_*"), key=lambda f: f.stat().st_mtime_ns)
    for old in written[:-keep] if keep else []:
        shutil.rmtree(old)


def load_step(folder: Path, like: Any) -> tuple[Any, dict]:
    """(train state with the structure, dtypes and devices of `like`, meta), bit for bit what was saved.

    Raises ValueError naming the folder and the first leaf that is missing, superfluous or of another shape or dtype.
    """
    folder = Path(folder)
    if not (folder / META).is_file():
        raise ValueError(
            f"{folder} is not a training checkpoint: it has no {META}; give a folder such as step_00000060"
        )
    stored, ours = load_tensors(folder / TENSORS), tree.flatten(like)
    differences = tree.diff(stored, ours)
    if differences:
        raise ValueError(
            f"{folder} does not fit this run: {differences[0]} (and {len(differences) - 1} more differences)"
        )
    try:
        meta = json.loads((folder / META).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / META} is damaged ({error}); use an older checkpoint") from None
    return tree.unflatten({k: v.to(ours[k].device) for k, v in stored.items()}, like), meta


def _sync(folder: Path) -> None:
    """Makes the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
