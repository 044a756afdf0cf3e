"""A step under a compiler: one graph, cheap guards, the old state's buffers reused.

Inductor compiles C++ with -ffp-contract=off, so fused geometry rounds as eager does (see `geometry`).
"""

import os
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import torch.utils._pytree as pytree

from bevfn import choices
from bevfn.kernels import native

Backend = choices.Backend
ASCEND = ("torchair", "npugraph-ex")  # bevfn.ascend.device


def step(step_fn: Callable, *, backend: str = "inductor", donate: bool = True, strict: bool = False) -> Callable:
    """step_fn(train_state, batch) -> (train_state, metrics) as one compiled graph of the same signature.

    The graph takes a flat list of tensors: guards on a thousand dict entries would cost as much as a small step.
    With `donate` the new state is written into the old one's buffers, so that no second copy of the training state
    outlives a step: the state passed in is the state that comes out, and its old values are gone. Metrics must not
    share memory with the state.

    strict: Dynamo reads the Python of the step, as `torch.compile(step_fn, fullgraph=True)` does. Otherwise AOTAutograd
    traces it with fake tensors, as the offline lowering for Ascend does; a branch on a tensor's value or `.item()` is
    an error either way, and the graph is the same. Reading 560 parameter paths over and over is what Dynamo is slow
    at: BEVFusion's step (mini size) reaches the backend after 17 s of CPU, strict after 58 s.
    """
    check_backend(backend)
    run: Callable | None = None
    made_for: pytree.TreeSpec | None = None

    def compiled(train_state: Any, batch: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        nonlocal run, made_for
        kept, state_spec = pytree.tree_flatten(train_state)
        leaves, spec = pytree.tree_flatten((train_state, batch))
        inside = _large(kept) if donate and backend not in ASCEND else frozenset()  # GE returns new tensors
        if run is None or spec != made_for:
            pure = _flat(step_fn, spec, state_spec)
            plain = strict or backend in ("eager", *ASCEND)
            run, made_for = _compiled(_donating(pure, inside, plain), backend), spec
        with torch.no_grad():
            new, metrics = run(leaves)
            if not donate:
                return pytree.tree_unflatten(new, state_spec), metrics
            pairs = [(old, leaf) for old, leaf in zip(kept, new) if leaf is not None]
            torch._foreach_copy_([old for old, _ in pairs], [leaf for _, leaf in pairs])
        return train_state, metrics

    return compiled


def _flat(step_fn: Callable, spec: pytree.TreeSpec, state_spec: pytree.TreeSpec) -> Callable:
    """step_fn between lists of leaves."""

    def flat(*leaves: torch.Tensor) -> tuple[list[torch.Tensor], dict]:
        new, metrics = step_fn(*pytree.tree_unflatten(list(leaves), spec))
        new_leaves, new_spec = pytree.tree_flatten(new)
        if new_spec != state_spec or any((a is None) != (b is None) for a, b in zip(new_leaves, leaves)):
            raise ValueError("the step returned a train state of another structure than it was given")
        return new_leaves, metrics

    return flat


def _donating(flat: Callable, inside: frozenset[int], strict: bool) -> Callable:
    """`flat` on one list, the leaves `inside` written to their old buffers in the graph and returned as None."""
    import torch._dynamo  # a second of imports, which only who compiles waits for

    traced = flat if strict else torch._dynamo.nonstrict_trace(flat)

    def run(leaves: list[torch.Tensor]) -> tuple[list[torch.Tensor | None], dict]:
        new, metrics = traced(*leaves)
        for i in inside:
            leaves[i].copy_(new[i])
        return [None if i in inside else leaf for i, leaf in enumerate(new)], metrics

    return run


def _large(leaves: list[torch.Tensor | None]) -> frozenset[int]:
    # The optimizer's flat vectors are most of the state: updated in place by the graph. The many small leaves follow in
    # one call after it: 560 copies of slices of one vector cost inductor's scheduler 54 s of CPU to compile (measured).
    total = sum(leaf.numel() for leaf in leaves if leaf is not None)
    return frozenset(i for i, leaf in enumerate(leaves) if leaf is not None and leaf.numel() * 16 >= total)


def function(f: Callable, *, backend: str = "inductor") -> Callable:
    """f(*pytrees) as one compiled graph, without gradients."""
    check_backend(backend)
    if backend in ASCEND:
        return _compiled(f, backend)

    def flat(leaves: list[torch.Tensor], spec: pytree.TreeSpec) -> Any:
        return f(*pytree.tree_unflatten(leaves, spec))

    run = _compiled(flat, backend)

    def compiled(*arguments: Any) -> Any:
        with torch.no_grad():
            return run(*pytree.tree_flatten(arguments))

    return compiled


def check_backend(backend: str) -> None:
    """Raises ValueError unless `backend` can run here."""
    if backend in ASCEND:
        from bevfn.ascend import device

        device.check(backend)
    elif backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(get_args(Backend))}")


def _compiled(flat: Callable, backend: str) -> Callable:
    if backend == "eager":
        return flat
    if backend in ASCEND:
        from bevfn.ascend import device

        return device.compiled(flat, backend)  # type: ignore[arg-type]
    if backend == "inductor":
        ready()
        from bevfn import fused_kernels  # imports inductor

        return torch.compile(flat, fullgraph=True, dynamic=False, backend=fused_kernels.backend)
    return torch.compile(flat, fullgraph=True, dynamic=False, backend=backend)


def ready() -> None:
    """What inductor wants before it compiles. Raises FileNotFoundError, one sentence, without a C++ compiler."""
    native.compiler()  # now, not a traceback of inductor's later
    _trust_cache()
    _drop_half_written_libraries()


def _cache() -> Path:
    """Inductor's folder."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # imports inductor

    return Path(cache_dir())


def _trust_cache() -> None:
    """Leaves a cache that others may write, such as /tmp/torchinductor_NAME made by somebody else: inductor runs its code."""
    if why := native.untrusted(_cache()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(native.private_folder() / "inductor")
        warnings.warn(
            f"inductor compiles again for this process, since {why}: set TORCHINDUCTOR_CACHE_DIR to a folder of your own.",
            stacklevel=2,
        )


def _drop_half_written_libraries() -> None:
    """Deletes what a process that was killed while compiling left in inductor's cache: loading it fails, or is SIGBUS.

    Files that end before their ELF section table, and are not being written by another process at this moment.
    """
    for path in _cache().rglob("*.so"):
        with open(path, "rb") as file:
            header = file.read(64)
        about = path.stat()
        if (len(header) < 64 or about.st_size < _elf_end(header)) and time.time() - about.st_mtime > 5.0:
            path.unlink(missing_ok=True)


def _elf_end(header: bytes) -> int:
    """Where the section table of a 64-bit ELF file ends, which linkers write last."""
    (offset,) = struct.unpack_from("<Q", header, 0x28)
    size, count = struct.unpack_from("<HH", header, 0x3A)
    return offset + size * count
