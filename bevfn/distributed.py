"""Data parallelism: processes that run the same step on other samples, and what they sum.

    replicas = distributed.start("cuda")        # None in a single process; launched by torchrun otherwise
    step = train.make_step(loss_fn, optimizer, replicas=replicas)
    distributed.stop()

`Replicas` is a plain value; its methods are functional collectives (`_c10d_functional`), so they are nodes of the step's
one graph, and torchair converts them to HCCL operators. Below it are helpers for the host, on the CPU.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import torch.distributed
from torch import Tensor

from bevfn import tree

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
AUTO = "auto"
PREFERRED = ("npu", "cuda", "cpu")  # by "auto"
# Collectives wait for the slowest process: a cold compilation, or rank 0 scoring nuScenes val (20 minutes).
TIMEOUT = timedelta(hours=2)
# Who is left when one process is gone notices at its next collective, and then says so to the others.
ANSWER_S = 5.0


@dataclass(frozen=True)
class Replicas:
    """The processes of a data-parallel run as one of them sees it.

    The methods run on all replicas or on none, in the same order, and give every replica the same bits. No gradient
    flows through them: an `autograd.Function` that needs one calls them in its backward (see `layers/batch_norm.py`).
    """

    group: str
    """the process group's name"""
    rank: int
    """0 <= rank < count; rank 0 writes files"""
    count: int

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the replicas, any shape and float or integer dtype."""
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(x.detach().contiguous(), "sum", self.group))

    def mean(self, x: Tensor) -> Tensor:
        """x averaged over the replicas."""
        return self.sum(x) / self.count

    def stack(self, x: Tensor) -> Tensor:
        """[count ...]: x of every replica, in rank order."""
        ops = torch.ops._c10d_functional
        flat = ops.all_gather_into_tensor(x.detach().reshape(-1).contiguous(), self.count, self.group)
        return ops.wait_tensor(flat).view(self.count, *x.shape)


@dataclass(frozen=True)
class Groups:
    """A batch that is `count` batches of equal size, one after another along the first axis, in one call.

    Each is normalised by its own statistics, of all `replicas` where there are some, and the running statistics are
    updated by one after the other: what as many calls would do.
    """

    count: int
    replicas: Replicas | None = None


Train = bool | Replicas | Groups
"""`train` of a layer: False running statistics, True those of this process' batch, Replicas those of all batches, Groups
those of each part of the batch."""


# -------------------------------------------------------------------------------------------------- start and stop


def start(device: str) -> Replicas | None:
    """Joins the run that torchrun launched; None without torchrun or with a single process.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. "cuda" and "npu" mean one device per process: the
    LOCAL_RANK-th becomes this process' current one, so that the rest of the program can go on saying "cuda". Data moves
    by gloo, NCCL or HCCL, what is on the CPU by gloo; the processes of a run trust each other and their network.

    Raises ValueError if the variables are incomplete or contradict each other, or if there is no such device.
    """
    world, device = _environment(), chosen(device)
    if world is None or world["WORLD_SIZE"] == 1:
        check_device(device)
        _without_hf32(device)
        return None
    kind, index = _kind_and_index(device)
    if index:
        raise ValueError(f"device {device!r} is one device for {world['WORLD_SIZE']} processes; give {kind!r}")
    if kind != "cpu":
        _take_device(kind, world["LOCAL_RANK"])
    _without_hf32(kind)
    backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{BACKENDS[kind]}"
    rank, size = world["RANK"], world["WORLD_SIZE"]
    torch.distributed.init_process_group(backend, rank=rank, world_size=size, timeout=TIMEOUT)
    everyone = torch.distributed.group.WORLD
    assert everyone is not None
    return Replicas(everyone.group_name, world["RANK"], world["WORLD_SIZE"])


def stop() -> None:
    """Leaves the run; does nothing in a single process. Call it in a `finally`, or the others wait for the timeout."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Lost(ConnectionError):
    """Another process of the run is gone; `gone` holds its rank, or ranks, as far as they are known."""

    def __init__(self, message: str, gone: frozenset[int]) -> None:
        super().__init__(message)
        self.gone = gone


@contextlib.contextmanager
def watched(replicas: Replicas | None) -> Iterator[None]:
    """Inside, what a collective raises because a process of the run has ended becomes `Lost`, one sentence that names it.

    A process that ends closes its connections, which the others notice at their next collective at once; a machine that
    is cut off they notice after TIMEOUT.
    """
    try:
        yield
    except RuntimeError as error:
        if replicas is None or not _of_a_connection(error):
            raise
        gone = _gone(replicas)
        ranks = ", ".join(map(str, sorted(gone))) or "another"
        raise Lost(
            f"rank {ranks} of the run's {replicas.count} processes ended or does not answer, so rank {replicas.rank} ends "
            "too; its own last words say why",
            gone,
        ) from None


def _of_a_connection(error: RuntimeError) -> bool:
    # gloo's errors are plain RuntimeErrors that begin with their place in its source
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).partition("]")[0]


def _gone(replicas: Replicas) -> frozenset[int]:
    """Ranks that do not say within ANSWER_S that they are still there."""
    from torch.distributed.distributed_c10d import _get_default_store

    others = frozenset(range(replicas.count)) - {replicas.rank}
    try:
        store = _get_default_store()
        store.set(f"bevfn/there/{replicas.rank}", "")
        gone = _silent(store, "there", others)
        store.set(f"bevfn/knows/{replicas.rank}", "")
        if replicas.rank == 0:  # it may keep the store, which the others still ask
            _silent(store, "knows", others - gone)
        return gone
    except RuntimeError:  # whoever kept the store took it along: rank 0, or torchrun
        return frozenset() if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else frozenset({0})


def _silent(store: Any, what: str, ranks: frozenset[int]) -> frozenset[int]:
    """Those of `ranks` that have not set their key within ANSWER_S, all of them together."""
    silent: set[int] = set()
    deadline = time.monotonic() + ANSWER_S
    for rank in ranks:
        try:
            store.wait([f"bevfn/{what}/{rank}"], timedelta(seconds=max(0.05, deadline - time.monotonic())))
        except torch.distributed.DistStoreError:  # nobody has set it
            silent.add(rank)
    return frozenset(silent)


def _environment() -> dict[str, int] | None:
    """torchrun's numbers, or None where nothing launched this process as one of many."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if os.environ.get(name)]
    if not set(given) & set(names[:3]):  # clusters set MASTER_ADDR for their own reasons
        return None
    if missing := [name for name in names if name not in given]:
        raise ValueError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}; launch with torchrun, or unset "
            f"{', '.join(given)} to run one process"
        )
    numbers = {}
    for name in (*names[:3], "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise ValueError(f"{name}={os.environ[name]!r} is not a whole number; launch with torchrun")
        numbers[name] = int(os.environ[name])
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or numbers["WORLD_SIZE"])
    limits = (("RANK", "WORLD_SIZE", numbers["WORLD_SIZE"]), ("LOCAL_RANK", "the processes of this node,", here))
    for name, limit_name, limit in limits:
        if numbers[name] >= limit:
            raise ValueError(f"{name}={numbers[name]} must be below {limit_name} {limit}; launch with torchrun")
    if here > numbers["WORLD_SIZE"]:
        raise ValueError(f"LOCAL_WORLD_SIZE={here} is above WORLD_SIZE={numbers['WORLD_SIZE']}; launch with torchrun")
    return numbers


def chosen(device: str) -> str:
    """What "auto" means here: "npu", "cuda" or "cpu", the first that there is. Any other device is itself."""
    if device != AUTO:
        return device
    return next(kind for kind in PREFERRED if kind == "cpu" or _count(kind))


def check_device(device: str) -> None:
    """Raises ValueError, which says what there is instead, unless this process can compute on `device`."""
    kind, index = _kind_and_index(chosen(device))
    if kind != "cpu" and int(index or 0) >= (found := _count(kind)):
        raise ValueError(f"there is no device {device}; {_remedy(kind, found)}")


def is_there(device: str) -> bool:
    """Whether this process can compute on `device`, a valid name of one."""
    kind, index = _kind_and_index(chosen(device))
    return kind == "cpu" or int(index or 0) < _count(kind)


def _remedy(kind: str, found: int) -> str:
    """What to do about a device that is not there."""
    if found:
        return f"choose {kind}:0 to {kind}:{found - 1}"
    if kind == "npu":
        return "torch_npu sees none (it needs CANN and a driver: npu-smi info); use --device cpu"
    if torch.version.cuda is None and torch.version.hip is None:
        release = torch.__version__.partition("+")[0]
        return (
            f"this torch, {torch.__version__}, is a build for CPUs: on Linux `pip install --force-reinstall torch=={release}` "
            "installs one for CUDA (https://pytorch.org/get-started lists others); or use --device cpu"
        )
    return "torch is built for GPUs, but sees none (does nvidia-smi show one?); use --device cpu"


def _kind_and_index(device: str) -> tuple[str, str]:
    kind, _, index = device.partition(":")
    if kind not in BACKENDS or not (index.isdecimal() or device == kind):
        raise ValueError(f"device {device!r} is none of {AUTO}, {', '.join(BACKENDS)}, or one of several, as cuda:1")
    return kind, index


def _count(kind: str) -> int:
    """Devices of this kind on this node."""
    if kind == "npu":
        if importlib.util.find_spec("torch_npu") is None:
            return 0
        try:
            ctypes.CDLL("libascendcl.so")  # of CANN, without which torch_npu must not even be tried
            import torch_npu  # noqa: F401  (registers torch.npu and HCCL)
        except (ImportError, OSError):
            return 0
    module = torch.get_device_module(kind)
    return module.device_count() if module.is_available() else 0


def _take_device(kind: str, index: int) -> None:
    found = _count(kind)
    if index >= found:
        remedy = f"start at most {found} processes per node" if found else _remedy(kind, found)
        raise ValueError(f"process {index} of this node needs device {kind}:{index}, but there are {found}; {remedy}")
    torch.get_device_module(kind).set_device(index)


def _without_hf32(device: str) -> None:
    """float32 is float32 on an NPU whatever runs the step (`ascend.lower.HF32`); torch_npu's default is HF32 for convolutions."""
    if device.startswith("npu"):
        npu: Any = torch.get_device_module("npu")
        npu.conv.allow_hf32 = npu.matmul.allow_hf32 = False


# ------------------------------------------------------------------------------------------------------ on the host


def agree(flag: bool, replicas: Replicas | None) -> bool:
    """Whether `flag` is true on any replica: how all of them notice one's signal, stop request or damaged file.

    A few hundred microseconds; every replica must call it at the same place, such as the end of a step.
    """
    return flag if replicas is None else int(replicas.sum(torch.tensor(int(flag)))) > 0


def gather(value: Any, replicas: Replicas | None) -> list[Any]:
    """`value` of every replica, in rank order, on every replica; what JSON can say, and it comes back as JSON does.

    No pickle, so nothing received can run; NaN and infinity pass. Raises TypeError for other objects.
    """
    return [json.loads(part) for part in _exchange(json.dumps(value).encode(), replicas)]


def gather_arrays(arrays: Mapping[str, np.ndarray], replicas: Replicas | None) -> dict[str, np.ndarray]:
    """The union of all replicas' named arrays, on every replica; any number, shape and numeric dtype per replica.

    A name that several replicas hold appears once, with the lowest rank's array: samples that a loader repeated to fill
    the last batch drop out if arrays are named by sample token. Ordered by rank, then as the replica had them.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    order = json.dumps(list(contiguous))  # safetensors sorts by its own rules
    union: dict[str, np.ndarray] = {}
    for part in _exchange(safetensors.numpy.save(contiguous, {"order": order}), replicas):
        found = safetensors.numpy.load(part)
        header = json.loads(part[8 : 8 + int.from_bytes(part[:8], "little")])
        for name in json.loads(header["__metadata__"]["order"]):
            union.setdefault(name, found[name])
    return union


def difference(values: Any, replicas: Replicas | None) -> str | None:
    """The first dotted path of the pytree whose bytes are not the same on all replicas, and where; None if all agree.

    For the start of a run: another file of pretrained weights on one node would train on in silence.
    """
    digests = {path: _digest(leaf) for path, leaf in tree.flatten(values).items()}
    parts = gather(digests, replicas)
    for rank, theirs in enumerate(parts):
        for path in [*parts[0], *theirs]:
            if parts[0].get(path) != theirs.get(path):
                return f"{path} of rank {rank} is not rank 0's"
    return None


def _digest(leaf: Tensor) -> str:
    content = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{leaf.dtype} {list(leaf.shape)}".encode() + content.tobytes()).hexdigest()


def _exchange(payload: bytes, replicas: Replicas | None) -> list[bytes]:
    """Every replica's bytes, of any length, in rank order."""
    if replicas is None:
        return [payload]
    lengths = replicas.stack(torch.tensor(len(payload))).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    return [bytes(row[:n].numpy()) for row, n in zip(replicas.stack(padded), lengths)]
