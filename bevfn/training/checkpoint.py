"""Training checkpoints: a folder of one safetensors file and one JSON file that appears complete or not at all.

    runs/x/checkpoints/step_00000060/train_state.safetensors, meta.json
    runs/x/checkpoints/best.json                                which of them scored best

A folder is written under a hidden name, fsynced and renamed, and every other change is a rename too: whatever kills the
process at whatever moment, each visible folder is a whole checkpoint. What a disk breaks later two CRCs find on reading: the
tensors' in meta.json, and meta.json's own.
"""

import errno
import itertools
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bevfn import tree
from bevfn.files import checksum, read_json, to_json, write_atomically

TENSORS, META, BEST = "train_state.safetensors", "meta.json", "best.json"
# "step_00000060+" was on its way to replace another of the same step. Other names beside them are the user's.
NAME = re.compile(r"step_(\d+)\+?")
CANONICAL = re.compile(r"step_(\d{8}|[1-9]\d{8,})\+?")  # as runs name them
LEFTOVER = re.compile(rf"\.step_\d+\+?\.\d+\.(new|old)|\.{re.escape(BEST)}\..*\d")
FORMAT = 2  # of meta.json: sealed; before it had no format and no seal
OVERHEAD = 2**20  # bytes on disk besides the tensors' own: names, JSON, the file system's blocks
UNREADABLE = -1  # serial of a checkpoint whose meta.json is damaged


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, atomically, from the tensors' own memory where they are on the CPU."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors 0.8 makes files that only their owner can read
        save_file({k: _own(v.detach().cpu()) for k, v in tensors.items()}, temporary)
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _own(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that overlap. Views appear where a step was not donated its state.
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


# ---------------------------------------------------------------------------------------------------- train states


def save_step(folder: Path, train_state: Any, meta: dict, *, keep: int = 3) -> None:
    """Writes `train_state` and `meta` as `folder`, such as runs/x/checkpoints/step_00000060, then deletes all but the
    best and the `keep` last written beside it (0: none). What the user put there, or into one of them, stays: another name
    than a run gives, other files, a copy under another step's name.

    Raises OSError of one sentence that names the folder and the bytes it takes if they do not fit; nothing is left of
    it then, and the earlier checkpoints are as they were. One process may write there at a time (see run_folder).
    """
    folder, leaves = Path(folder), tree.flatten(train_state)
    made, beside = _hidden(folder, "new"), folder.with_name(f"{folder.name}+")
    try:
        _remove(made)  # of a killed process with this one's id
        made.mkdir(parents=True)
        _check_room(folder.parent, leaves)
        _write_tensors(made / TENSORS, leaves)
        record = {"torch": torch.__version__, **meta, "format": FORMAT, "checkpoint": _described(made, folder.parent)}
        # as it will be read: tuples are lists there, and the seal is of that
        record = read_json(to_json(record))
        write_atomically(made / META, to_json(record | {"seal": _seal(record)}, indent=1))
        _sync(made)
        if folder.exists():  # no rename replaces a full folder, so the new one is first shown beside it
            if beside.exists():
                _remove(beside) if _is_ours(beside) else os.replace(beside, _free_name(beside))
            os.replace(made, beside)
            _remove(folder) if _is_ours(folder) else os.replace(folder, _free_name(folder))
            os.replace(beside, folder)
        else:
            os.replace(made, folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise _not_written(folder, leaves, error) from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    if keep:
        kept = {folder, best(folder.parent)}
        ours = [old for old in steps(folder.parent) if CANONICAL.fullmatch(old.name) and _is_ours(old)]
        for old in ours[:-keep]:
            if old not in kept:
                _remove(old)


def load_step(folder: Path, like: Any) -> tuple[Any, dict]:
    """(train state with the structure, dtypes and devices of `like`, meta), bit for bit what was saved.

    Raises ValueError naming the folder and what is wrong: damaged, or the first leaf that is missing, superfluous or of
    another shape or dtype.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    stored, ours = read(folder), tree.flatten(like)
    differences = tree.diff(stored, ours)
    if differences:
        raise ValueError(
            f"{folder} does not fit this run: {differences[0]} (and {len(differences) - 1} more differences)"
        )
    # Copies: what safetensors returns is mapped from the file, which would stay on the disk after it is pruned.
    return tree.unflatten({k: v.to(ours[k].device, copy=True) for k, v in stored.items()}, like), meta


def read(folder: Path) -> dict[str, Tensor]:
    """The leaves of a checkpoint by dotted path, on the CPU; raises ValueError, naming it, if anything of it is damaged."""
    check(folder)
    return load_tensors(Path(folder) / TENSORS)


def averaged(folder: Path) -> bool:
    """Whether a checkpoint has averaged weights beside those that were trained."""
    with safe_open(Path(folder) / TENSORS, framework="pt") as file:
        return any(name.startswith("ema.") for name in file.keys())  # noqa: SIM118  (not a dict)


def steps(checkpoints: Path) -> list[Path]:
    """The checkpoints of a run, step_<number>, in the order in which they were written; damaged ones first.

    The order is a number in meta.json, not the time or the name: clocks go wrong, copies lose times, and a run that
    starts again writes smaller step numbers beside larger ones of the run before.
    """
    found = (f for f in Path(checkpoints).glob("step_*") if NAME.fullmatch(f.name) and f.is_dir())
    return sorted(found, key=lambda f: (_serial(f), f.name))


def latest(checkpoints: Path, say: Callable[[str], Any] = print) -> Path | None:
    """The last written checkpoint that is whole; None if there is none. `say` gets a sentence per damaged one."""
    # Those that do not say when they were written come first, since they may have been the last.
    for folder in sorted(reversed(steps(checkpoints)), key=lambda f: _serial(f) > UNREADABLE):
        try:
            check(folder)
            return folder
        except (ValueError, OSError) as error:
            say(f"skipped a checkpoint: {error}")
    return None


def keep_best(checkpoints: Path, name: str, value: float) -> bool:
    """Notes that checkpoint `name` scored `value`; if that is more than any before it (True), pruning spares it.

    Raises ValueError if there is no such checkpoint: save before evaluating.
    """
    if not (Path(checkpoints) / name / META).is_file():
        raise ValueError(
            f"{checkpoints} has no checkpoint {name} that could be the best; save it before its evaluation."
        )
    before = _read_best(checkpoints)
    if not math.isfinite(value) or (before is not None and not value > before["value"]):
        return False
    write_atomically(Path(checkpoints) / BEST, to_json({"name": name, "value": value}))
    return True


def best(checkpoints: Path) -> Path | None:
    """The checkpoint that scored best, None if none was scored or it is gone."""
    found = _read_best(checkpoints)
    return None if found is None else Path(checkpoints) / found["name"]


def sweep(checkpoints: Path) -> None:
    """Deletes what killed writes left behind. Only for the process that holds the run folder's lock."""
    for leftover in Path(checkpoints).glob(".*"):
        if LEFTOVER.fullmatch(leftover.name):
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()


# ----------------------------------------------------------------------------------------------------- small parts


def _described(made: Path, checkpoints: Path) -> dict[str, int]:
    """What `latest` orders by and checks: one more than any checkpoint there, size and CRC of the tensors."""
    size, crc = checksum(made / TENSORS)
    return {"serial": 1 + max(map(_serial, steps(checkpoints)), default=0), "bytes": size, "crc32": crc}


def _seal(meta: dict) -> int:
    """CRC-32 of what meta.json says besides, however it is laid out."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _serial(folder: Path) -> int:
    try:
        return read_meta(folder).get("checkpoint", {}).get("serial", 0)
    except (ValueError, OSError):
        return UNREADABLE


def read_meta(folder: Path) -> dict:
    """What meta.json says, without its seal; raises ValueError, naming it, unless all of it is as it was written."""
    path = Path(folder) / META
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a training checkpoint: it has no {META}; give a folder such as step_00000060"
        )
    try:
        meta = _stated(path)
        named = NAME.fullmatch(Path(folder).name)
        if named and meta.get("step", int(named[1])) != int(named[1]):
            raise ValueError(f"it says step {meta['step']}, its folder's name says {int(named[1])}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); use an older checkpoint") from None
    return meta


def _stated(path: Path) -> dict:
    """What a meta.json says, whatever the name of its folder. Raises ValueError if it is damaged."""
    meta = read_json(path.read_bytes())
    if not isinstance(meta, dict):
        raise ValueError(f"it is a {type(meta).__name__}, not a JSON object")
    _check_meta(meta)
    return meta


def _check_meta(meta: dict) -> None:
    """Raises ValueError unless the seal is right, and what is read here has its type; takes the seal out."""
    seal = meta.pop("seal", None)
    if "format" in meta or seal is not None:
        if meta.get("format") != FORMAT:
            raise ValueError(f"its format is {meta.get('format')!r}, this bevfn reads {FORMAT}")
        if seal != _seal(meta):
            raise ValueError("it is not what its seal says")
    described = meta.get("checkpoint", {})
    if not isinstance(described, dict):
        raise ValueError(f"its checkpoint is {described!r}")
    numbers = {"step": meta.get("step", 0)} | {name: described.get(name, 0) for name in ("serial", "bytes", "crc32")}
    for name, value in numbers.items():
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError(f"its {name} is {str(value)[:40]}")


def check(folder: Path) -> None:
    """Raises ValueError, naming it, unless a checkpoint is whole: meta.json, tensors, folder name agree."""
    folder = Path(folder)
    meta = read_meta(folder)
    path, described = folder / TENSORS, meta.get("checkpoint")
    if not path.is_file():
        raise ValueError(f"{folder} is incomplete: it has no {TENSORS}; use an older checkpoint")
    if described is not None and checksum(path) != (described.get("bytes"), described.get("crc32")):
        raise ValueError(f"{path} is damaged: its size or CRC is not what {META} says; use an older checkpoint")
    step = _step_of_tensors(path)
    if step is not None and meta.get("step", step) != step:
        raise ValueError(f"{path} is of step {step}, {META} says {meta['step']}; use an older checkpoint")


def _step_of_tensors(path: Path) -> int | None:
    """The leaf `step` of a train state, None where there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            leaf = file.get_tensor("step") if "step" in file.keys() else None  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); use an older checkpoint") from None
    if leaf is None or leaf.numel() != 1:
        return None
    if not torch.isfinite(leaf).all():
        raise ValueError(f"{path} has the step {leaf.item()}; use an older checkpoint")
    return int(leaf)


def _is_ours(folder: Path) -> bool:
    """Whether there is something in it, nothing but what `save_step` writes, and none of another step, as in a user's copy."""
    inside = {f.name for f in folder.iterdir()}
    if folder.is_symlink() or not inside or not inside <= {TENSORS, META}:
        return False
    named = NAME.fullmatch(folder.name)
    try:
        stated = _stated(folder / META).get("step")
    except (ValueError, OSError):
        return True  # damaged, and damage says nothing of whose it is
    return named is None or stated is None or stated == int(named[1])


def _free_name(folder: Path) -> Path:
    """Beside `folder`, and no checkpoint's."""
    names = (folder.with_name(f"{folder.name}.replaced{number or ''}") for number in itertools.count())
    return next(name for name in names if not name.exists())


def _read_best(checkpoints: Path) -> dict | None:
    path = Path(checkpoints) / BEST
    if not path.is_file():
        return None
    try:
        found = read_json(path.read_bytes())
        if not (
            NAME.fullmatch(found["name"]) and type(found["value"]) in (int, float) and math.isfinite(found["value"])
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ValueError(f"{path} is damaged; delete it, and the next evaluation writes it again") from None
    return found if (Path(checkpoints) / found["name"]).is_dir() else None


def _check_room(folder: Path, leaves: dict[str, Tensor]) -> None:
    if shutil.disk_usage(folder).free < _size(leaves) + OVERHEAD:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _not_written(path: Path, leaves: dict[str, Tensor], error: Exception) -> OSError:
    why = getattr(error, "strerror", None) or str(error).removeprefix("Error while serializing: I/O error: ")
    there = path.parent if path.parent.is_dir() else path.anchor
    return OSError(
        f"{path} could not be written ({why}): it takes {_size(leaves)} bytes and {shutil.disk_usage(there).free} are "
        "free; make room there or choose another folder (what was there before is intact)"
    )


def _size(leaves: dict[str, Tensor]) -> int:
    return sum(leaf.nbytes for leaf in leaves.values())


def _hidden(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}.{what}")


def _remove(folder: Path) -> None:
    """Deletes a folder that may be there; first out of sight, so that no half of it is ever visible."""
    if folder.exists():
        hidden = folder if folder.name.startswith(".") else _hidden(folder, "old")
        if hidden != folder:
            shutil.rmtree(hidden, ignore_errors=True)
            os.replace(folder, hidden)
        shutil.rmtree(hidden)


def _sync(path: Path) -> None:
    """Makes a file's content, or a folder's renames, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
