"""A run's folder belongs to one process at a time and to one config: the lock, config.json, and where to go on.

with run_folder.open(Path("runs/x"), config, resume=True) as latest:      # a checkpoint's folder, or None
    ...
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bevfn.files import write_atomically
from bevfn.metrics import METRICS_FILE
from bevfn.training import checkpoint

CONFIG_FILE, LOCK_FILE, CHECKPOINTS = "config.json", ".lock", "checkpoints"
PATIENCE = 3.0  # s for the workers of a killed run, which hold its lock until they notice (data/loader.py)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems


@contextlib.contextmanager
def open(
    run_dir: Path,
    config: dict,
    *,
    resume: bool = False,
    force: bool = False,
    free: frozenset[str] = frozenset(),
    say: Callable[[str], Any] = print,
) -> Iterator[Path | None]:
    """Context manager: the run folder, locked, with `config` in its config.json; gives the checkpoint to go on from.

    config: plain JSON values (others as their str), nested or not; `free` names its fields, as `workers` or
    `data.workers`, that a resumed run may change. None is given where there is nothing to go on from: without `resume`,
    and before a run's first checkpoint. Leftovers of killed writes are deleted; `say` gets a sentence per damaged
    checkpoint that was skipped.

    Raises ValueError of one sentence if the folder cannot be written, is in use by another run, holds a run that is not
    to be resumed, or was made with another config (each difference named; not with `force`, which keeps the old config
    beside the new one as config.1.json, ...). Nothing is changed then.
    """
    run_dir = Path(run_dir)
    config = json.loads(json.dumps(config, default=str))  # as it will be read back, so that the two compare
    with contextlib.ExitStack() as stack:
        with _writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(run_dir, say))
        # All checks come before the first write: a refused run leaves the folder as it found it.
        if resume:
            _check_config(run_dir, config, force, free)
        else:
            _check_empty(run_dir)
        with _writing(run_dir):
            _write_config(run_dir, config, free)
            checkpoint.sweep(run_dir / CHECKPOINTS)
        latest = checkpoint.latest(run_dir / CHECKPOINTS, say) if resume else None
        if resume and latest is None and _holds_run(run_dir):
            say(f"{run_dir} has no whole checkpoint yet: the run begins from its start")
        yield latest


def differences(before: dict, now: dict) -> dict[str, str]:
    """{dotted field: "old -> new"} of two configs of plain JSON values."""
    old, new = _flat(before), _flat(now)
    absent = object()  # None is a value
    return {
        name: f"{_shown(old, name)} -> {_shown(new, name)}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name, absent) != new.get(name, absent)
    }


# ---------------------------------------------------------------------------------------------------------- checks


def _check_empty(run_dir: Path) -> None:
    if _holds_run(run_dir):
        raise ValueError(
            f"{run_dir} already holds a run; add --resume to go on with it, or choose another folder with --run-dir."
        )


def _holds_run(run_dir: Path) -> bool:
    """Whether there is something to lose; a run that failed before its first step left only its config."""
    metrics = run_dir / METRICS_FILE
    return bool(checkpoint.steps(run_dir / CHECKPOINTS)) or (metrics.is_file() and metrics.stat().st_size > 0)


def _check_config(run_dir: Path, config: dict, force: bool, free: frozenset[str]) -> None:
    before = _read_config(run_dir) if _holds_run(run_dir) else None
    if before is None or force:
        return
    changed = [f"{name}: {how}" for name, how in differences(before, config).items() if not _is_free(name, free)]
    if changed:
        raise ValueError(
            f"{run_dir} was begun with another config ({'; '.join(changed)}); give the old values, choose another folder "
            "with --run-dir, or add --force to go on with the new ones."
        )


def _is_free(name: str, free: frozenset[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:n]) in free for n in range(1, len(parts) + 1))


def _read_config(run_dir: Path) -> dict | None:
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to resume with the config as it is now.") from None


def _write_config(run_dir: Path, config: dict, free: frozenset[str]) -> None:
    before = _read_config(run_dir) if _holds_run(run_dir) else None
    if before is not None and any(not _is_free(name, free) for name in differences(before, config)):
        numbers = [int(m[1]) for f in run_dir.iterdir() if (m := re.fullmatch(r"config\.(\d+)\.json", f.name))]
        write_atomically(run_dir / f"config.{max(numbers, default=0) + 1}.json", (run_dir / CONFIG_FILE).read_bytes())
    write_atomically(run_dir / CONFIG_FILE, json.dumps(config, indent=1).encode())


def _flat(config: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(config, dict) or not config:
        return {path: config}
    return {
        name: leaf for key, value in config.items() for name, leaf in _flat(value, f"{path}.{key}".lstrip(".")).items()
    }


def _shown(flat: dict[str, Any], name: str) -> str:
    return json.dumps(flat[name]) if name in flat else "(none)"


# -------------------------------------------------------------------------------------------------------- the lock


@contextlib.contextmanager
def _locked(run_dir: Path, say: Callable[[str], Any]) -> Iterator[None]:
    """The folder's exclusive lock, which the kernel takes back however this process ends."""
    descriptor = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        began = time.monotonic()
        while not _try_lock(descriptor, run_dir, say):
            if time.monotonic() - began > PATIENCE:
                raise ValueError(
                    f"{run_dir} is in use by another run ({_holder(run_dir)}); wait for it, or choose another folder with "
                    "--run-dir."
                )
            time.sleep(0.1)
        # The file's text is only for the message above: what counts is the lock, and the file itself stays. To delete
        # it would let a third process lock a new file while another one still waits for the old one.
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        try:
            yield
        finally:
            os.truncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, run_dir: Path, say: Callable[[str], Any]) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        say(f"warning: the file system of {run_dir} has no locks; do not start two runs there")
    return True


def _holder(run_dir: Path) -> str:
    return (run_dir / LOCK_FILE).read_text() or "its process has not said which"


@contextlib.contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"The run folder {run_dir} cannot be written ({error.strerror}); choose another one with --run-dir."
        ) from None
