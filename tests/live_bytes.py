"""The most bytes of tensors that are alive at once, eager: counted by storage, not by the process' memory, which keeps
what was freed and holds the kernels' own buffers."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self.alive:
                self.alive.add(key)
                self.now += x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self._freed, key, x.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def peak(f: Callable[[], Any]) -> int:
    """Of what f() makes."""
    with _Counter() as counter:
        f()
    return counter.peak
