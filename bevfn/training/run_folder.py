"""A run's folder belongs to one process at a time and to one config: the lock, config.json, and where to go on.

with run_folder.open(Path("runs/x"), config, resume=True, facts={"total_steps": 630}) as latest:  # a folder, or None
    ...

What a run's numbers depend on besides its config (`facts`: data, processes, code) is in each checkpoint's meta.json under
"run", the config under "config", sealed, and a run that goes on from it must have the same.
"""

import contextlib
import dataclasses
import difflib
import errno
import fcntl
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from bevfn import catalogue
from bevfn.files import as_read, read_json, to_json, write_atomically
from bevfn.metrics import METRICS_FILE, read_metrics
from bevfn.names import unusable
from bevfn.training import checkpoint

FACTS, FLAGS = "run", "config"  # in meta.json
CONFIG_FILE, LOCK_FILE, CHECKPOINTS = "config.json", ".lock", "checkpoints"
SUMMARY, EVALUATIONS = "summary.json", "evaluations"
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
    facts: dict | None = None,
    first: int | None = None,
    say: Callable[[str], Any] = print,
) -> Iterator[Path | None]:
    """Context manager: the run folder, locked, with `config` in its config.json; gives the checkpoint to go on from.

    config, facts: plain JSON values (others as their str), nested or not; `free` names fields of either, as `workers` or
    `data.workers`, that a resumed run may change. first: the step of the first checkpoint that the run writes, None if it
    writes none. None is given where there is nothing to go on from: without `resume`,
    and before a run's first checkpoint. Leftovers of killed writes are deleted; `say` gets a sentence per damaged
    checkpoint that was skipped, and one if the checkpoint is too old to say which facts or config it was made with.

    Raises ValueError of one sentence if the folder cannot be written, is in use by another run, holds a run that is not
    to be resumed or none that could be, has files that are damaged, checkpoints of which none is whole, or none although it came further, or was made
    with another config or other facts (each difference named; not with `force`, which says them, and keeps the old
    config beside the new one as config.1.json, ...). Nothing is changed then.
    """
    run_dir = Path(run_dir)
    config, facts = as_read(config), as_read(facts or {})  # so that they compare
    if resume:
        check_resumable(run_dir)
    with contextlib.ExitStack() as stack:
        with _writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(run_dir, say))
        # All checks come before the first write: a refused run leaves the folder as it found it.
        latest = None
        if resume:
            latest = _latest(run_dir, say)
            if latest is None and first is not None and not force:
                _check_not_lost(run_dir, first)
            changed = _config_changes(run_dir, latest, config, free, say) + _fact_changes(
                run_dir, latest, facts, free, say
            )
            if changed and not force:
                raise ValueError(
                    f"{run_dir} was begun with another config ({'; '.join(changed)}); give the old values, choose another "
                    "folder with --run-dir, or add --force to go on with the new ones."
                )
            if changed:
                say(f"warning: --force goes on although this differs: {'; '.join(changed)}")
            _check_readable(run_dir)
        else:
            _check_empty(run_dir)
        with _writing(run_dir):
            _write_config(run_dir, config, free)
            checkpoint.sweep(run_dir / CHECKPOINTS)
        if resume and latest is None and _holds_run(run_dir):
            say(f"{run_dir} has no whole checkpoint yet: the run begins from its start")
        yield latest


def check_resumable(run_dir: Path, model: str = "") -> None:
    """Raises ValueError for a folder that holds no run to go on with, with the runs beside it, or one of another recipe than that
    of `model`, with the command that goes on with it."""
    if (run_dir / CONFIG_FILE).is_file():
        theirs = catalogue.MODELS.get(str(read_config(run_dir / CONFIG_FILE).get("model")))
        ours = catalogue.MODELS.get(model)
        if theirs and ours and theirs.experiment != ours.experiment:
            raise ValueError(
                f"{run_dir} is a run of the recipe {theirs.experiment}, not of {ours.experiment}: `bevfn train {theirs.experiment} "
                f"--run-dir {run_dir} --resume` goes on with it"
            )
        return
    if _holds_run(run_dir):
        return
    beside = sorted(path.parent.name for path in run_dir.parent.glob(f"*/{CONFIG_FILE}"))
    names = difflib.get_close_matches(run_dir.name, beside, n=1) or beside[-5:]
    hint = f"; {run_dir.parent} has the runs {', '.join(names)}" if names else ""
    raise ValueError(
        f"{run_dir} holds no run to go on with (it has no {CONFIG_FILE}){hint}; check --run-dir, or leave out --resume to "
        "begin one there."
    )


def step_name(done: int) -> str:
    """Of checkpoints and evaluations."""
    return f"step_{done:08d}"


def read_config(path: Path) -> dict:
    """What a config.json says, in the names of today; raises ValueError, naming it, if it is damaged or no JSON object."""
    try:
        config = read_json(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"it is a {type(config).__name__}, not a JSON object")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); copy it back. Without it --resume compares the flags with those that the last "
            "checkpoint was made with, and with none where an older bevfn made that."
        ) from None
    return _renamed(config)


def _renamed(config: dict) -> dict:
    """The config of a run that is older than the catalogue, where sensors were a flag and image sizes another."""
    config = {name: value for name, value in config.items() if name != "source_size"}  # the data's tables have them
    if isinstance(sensors := config.pop("modality", None), str):
        config["model"] = f"bevfusion-{sensors}"
        if sensors == "lidar":
            config.pop("image_backbone_lr", None)  # LiDAR-only runs had it, and no image backbone
    if isinstance(model := config.get("model"), str):
        config["model"] = catalogue.FORMER.get(model, model)
    return config


def stored_config(path: Path, default: Any) -> Any:
    """The config dataclass that a config.json was written from; what it does not say is `default`'s.

    Raises ValueError, naming the file and the field, if it is damaged, of another dataclass, or has a value of another
    type.
    """
    stored, hints = read_config(path), get_type_hints(type(default))
    if foreign := sorted(set(stored) - {field.name for field in dataclasses.fields(default)}):
        raise ValueError(f"{path} is of another experiment (it sets {foreign[0]}); name the one that was trained")
    values = {}
    for name, value in stored.items():
        try:
            values[name] = _typed(value, hints[name])
        except TypeError:
            raise ValueError(f"{path} is damaged: {name} is {json.dumps(value)[:40]}; copy it back") from None
    try:
        return dataclasses.replace(default, **values)
    except ValueError as error:  # of a value that its flag cannot have
        raise ValueError(f"{path} is damaged ({error}); copy it back") from None


def _typed(value: Any, hint: Any) -> Any:
    """A JSON value as what a field of this type held; raises TypeError if it is none."""
    kind, inside = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        for option in inside:
            with contextlib.suppress(TypeError):
                return _typed(value, option)
    elif kind is tuple and isinstance(value, list):
        each = inside[:1] * len(value) if inside[1:] == (Ellipsis,) else inside
        if len(each) == len(value):
            return tuple(map(_typed, value, each))
    elif kind is Literal and any(type(value) is type(option) and value == option for option in inside):
        return value
    elif isinstance(value, str) and unusable(value):
        raise TypeError
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    elif hint is Any or type(value) is hint:
        return value
    raise TypeError


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


def _latest(run_dir: Path, say: Callable[[str], Any]) -> Path | None:
    """The last whole checkpoint; None if the run has written none yet."""
    skipped: list[str] = []
    latest = checkpoint.latest(run_dir / CHECKPOINTS, skipped.append)
    if latest is None and skipped:
        raise ValueError(
            f"{run_dir}: none of its {len(skipped)} checkpoints is whole ({skipped[0]}); copy one back, or begin anew in "
            "another folder with --run-dir."
        )
    for sentence in skipped:
        say(sentence)
    if skipped:
        say(f"going on from the older {latest}")
    return latest


def _check_not_lost(run_dir: Path, first: int) -> None:
    """Raises ValueError for a run without checkpoints that has written what comes behind its first one."""
    evaluated = [int(m[1]) for f in run_dir.glob(f"{EVALUATIONS}/*") if (m := checkpoint.CANONICAL.fullmatch(f.name))]
    # The metrics of a checkpoint's own step are written before it, its evaluation and the summary behind it.
    logged = [row["step"] for row in read_metrics(run_dir)] if (run_dir / METRICS_FILE).is_file() else []
    behind = {METRICS_FILE: max(logged, default=0) - 1, EVALUATIONS: max(evaluated, default=0)}
    later = [name for name, step in behind.items() if step >= first]
    later += [SUMMARY] if (run_dir / SUMMARY).is_file() else []
    if later:
        raise ValueError(
            f"{run_dir} has no checkpoint, but {' and '.join(later)} of later steps than its first one, due at step {first}; copy "
            f"its {CHECKPOINTS}/ back, begin anew in another folder with --run-dir, or add --force to begin again in this one."
        )


def _config_changes(
    run_dir: Path, latest: Path | None, config: dict, free: frozenset[str], say: Callable[[str], Any]
) -> list[str]:
    """Against config.json, or what the checkpoint was made with where that file is gone or of another run."""
    if not _holds_run(run_dir):
        return []
    stored = _read_config(run_dir)
    sealed = None if latest is None else checkpoint.read_meta(latest).get(FLAGS)
    if isinstance(sealed, dict):
        sealed = _renamed(sealed)
        # --force leaves the config before beside that with which the next checkpoint will be made.
        forced = (read_config(path) for path in run_dir.glob("config.[0-9]*.json"))
        if stored is None or all(_changed(sealed, one, free) for one in itertools.chain([stored], forced)):
            return _changed(sealed, config, free)
    if stored is None:
        say(f"{run_dir} has no {CONFIG_FILE}, and no checkpoint that notes its flags: nothing compares them with these")
        return []
    return _changed(stored, config, free)


def _fact_changes(
    run_dir: Path, latest: Path | None, facts: dict, free: frozenset[str], say: Callable[[str], Any]
) -> list[str]:
    if latest is None:
        return []
    before = checkpoint.read_meta(latest).get(FACTS)
    if isinstance(before, dict):
        return _changed(before, facts, free)
    if facts:
        say(f"{latest} is of an older bevfn, which did not note its data, processes and code: nothing compares them")
    # Facts that are in the config too were not free then.
    config = _read_config(run_dir) or {}
    known = {name: config[name] for name in facts if name in config}
    return _changed(known, {name: facts[name] for name in known})


def _changed(before: dict, now: dict, free: frozenset[str] = frozenset()) -> list[str]:
    return [f"{name}: {how}" for name, how in differences(before, now).items() if not _is_free(name, free)]


def _check_readable(run_dir: Path) -> None:
    """Raises ValueError for damaged files that the run would read hours later."""
    checkpoint.best(run_dir / CHECKPOINTS)
    if (run_dir / METRICS_FILE).is_file():
        read_metrics(run_dir)


def _is_free(name: str, free: frozenset[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:n]) in free for n in range(1, len(parts) + 1))


def _read_config(run_dir: Path) -> dict | None:
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        return None
    return read_config(path)


def _write_config(run_dir: Path, config: dict, free: frozenset[str]) -> None:
    before = _read_config(run_dir) if _holds_run(run_dir) else None
    if before is not None and any(not _is_free(name, free) for name in differences(before, config)):
        numbers = [int(m[1]) for f in run_dir.iterdir() if (m := re.fullmatch(r"config\.(\d+)\.json", f.name))]
        write_atomically(run_dir / f"config.{max(numbers, default=0) + 1}.json", (run_dir / CONFIG_FILE).read_bytes())
    write_atomically(run_dir / CONFIG_FILE, to_json(config, indent=1))


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
def locked(run_dir: Path, say: Callable[[str], Any] = print) -> Iterator[None]:
    """The folder's exclusive lock, which the kernel takes back however this process ends.

    Raises ValueError, which says who has it, if another process keeps it for PATIENCE.
    """
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
