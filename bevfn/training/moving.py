"""Batches on their way to the device: the next one is read and copied while the device makes a step of this one.

On CUDA and NPUs a copy runs beside a step if it comes from pinned memory and is on another stream; the step's stream
then waits for it, and the host for nothing. Samples that worker processes read are views of shared memory until they are
written to pinned memory. On a CPU there is nothing to copy, and a batch is read when its step is due.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bevfn import tree
from bevfn.data.batch import Batch
from bevfn.data.loader import Loaded
from bevfn.training.profiling import phase

Item = tuple[int, list[Loaded], list[Batch]]
"""(steps done after it, what the loader gave, its batches on the device) of a step"""


class Mover:
    """The items of `steps` in their order, of which `fetch` brings the next one on its way."""

    def __init__(self, steps: Iterator[tuple[int, list[Loaded]]], device: str) -> None:
        self._steps, self._device = steps, device
        # torch.cuda, torch.npu: the same names in both
        self._module: Any = None if device.startswith("cpu") else torch.get_device_module(device)
        self._stream = None if self._module is None else self._module.Stream(device)
        self._ahead: list[Moving | None] = []  # one at most

    def fetch(self) -> None:
        """Reads the next item and begins to copy it. Call it when a step has been handed to the device."""
        if self._stream is not None and not self._ahead:
            self._ahead.append(self._begun())

    def take(self) -> Item | None:
        """The next item, which steps handed to the device from now on may use; None behind the last one."""
        moving = self._ahead.pop() if self._ahead else self._begun()
        if moving is None:
            return None
        if moving.copied is not None:
            current = self._module.current_stream(self._device)
            current.wait_event(moving.copied)
            for leaf in tree.leaves(moving.item[2]):
                leaf.record_stream(current)  # or its memory could be taken by the next copy before the step is through
        return moving.item

    def _begun(self) -> "Moving | None":
        with phase("read"):
            read = next(self._steps, None)
        if read is None:
            return None
        done, loaded = read
        with phase("move"):
            if self._stream is None:
                return Moving((done, loaded, [item.batch.to(self._device) for item in loaded]), None)
            with self._module.stream(self._stream):
                batches = [tree.map(self._copied, item.batch) for item in loaded]
                return Moving((done, loaded, batches), self._stream.record_event())

    def _copied(self, leaf: Tensor) -> Tensor:
        # Its allocator gives pinned memory to the next batch only when the copy is through.
        return leaf.pin_memory().to(self._device, non_blocking=True)


@dataclass(frozen=True)
class Moving:
    """An item that is being copied."""

    item: Item
    copied: Any
    """event of the copying stream; None if the item is there"""
