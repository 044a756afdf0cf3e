"""Checkpoints of the published LiDAR-camera detector beside a plain write, copy and read of as many bytes.

bevfn bench checkpoint --folder runs
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

from bevfn import tree
from bevfn.models import bevfusion
from bevfn.precision import Policy
from bevfn.training import checkpoint, optim, train


def measure(folder: Path, *, repeats: int = 3) -> dict:
    """Figures of a checkpoint in `folder`, whose disk counts; see `of_state`."""
    optimizer = optim.Config(lr=optim.Schedule(2e-4))
    params, state = bevfusion.init(bevfusion.lidar_camera(), seed=0)
    return of_state(train.init(params, state, optimizer, precision=Policy()), folder, repeats=repeats)


def of_state(train_state: train.TrainState, folder: Path, *, repeats: int) -> dict:
    """Medians of seconds of save, verify (all bytes read, their CRC checked) and load (verified, then read into a train
    state), and of a plain write and copy, both on the disk when they end, and read; they take turns.

    Nothing empties the page cache: whoever reads finds the file in memory, as a run that resumes at once does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, run: Callable, *arguments: object) -> None:
        started = perf_counter()
        run(*arguments)
        seconds.setdefault(name, []).append(perf_counter() - started)

    with tempfile.TemporaryDirectory(prefix="bevfn-bench-", dir=folder) as made:
        root, plain, copied = Path(made), Path(made) / "plain", Path(made) / "copied"
        size = 0
        for repeat in range(repeats):
            step = root / f"step_{repeat:08d}"
            train_state.step.fill_(repeat)  # folder, meta and tensors must agree
            timed("save", partial(checkpoint.save_step, keep=1), step, train_state, {"step": repeat})
            timed("verify", checkpoint.latest, root)
            timed("load", checkpoint.load_step, step, train_state)
            data = (step / checkpoint.TENSORS).read_bytes()
            size = len(data)
            timed("plain write", _write, plain, data)
            timed("plain copy", _copy, plain, copied)
            timed("plain read", plain.read_bytes)
    medians = {name: median(times) for name, times in seconds.items()}
    return {
        "parameters": tree.num_elements(train_state.params),
        "bytes": size,
        "bytes_per_parameter": size / tree.num_elements(train_state.params),
        "seconds": medians,
        "gb_per_second": {name: 1e-9 * size / value for name, value in medians.items()},
        "save_over_plain_write": medians["save"] / medians["plain write"],
        "load_over_plain_read": medians["load"] / medians["plain read"],
    }


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
