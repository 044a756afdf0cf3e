"""One leaf of ours and its foreign key, and the entries of the modules that every model is made of."""

from dataclasses import dataclass
from typing import Literal

import torch

Tree = Literal["params", "state", "upstream"]  # "upstream": a key kept only so that the export is exact
Layout = Literal["same", "sparse", "sequence", "merged", "row", "swapped"]
Naming = Literal["mmdet", "original"]


@dataclass(frozen=True)
class Entry:
    """One leaf: `path` in our `tree`, `key` upstream, `shape` of ours and the relation of the layouts.

    layout  same
            sparse    ours [kx ky kz in out]; upstream the same (mmcv) or [out kx ky kz in] (spconv 2)
            sequence  ours [out in], upstream a Conv1d's [out in 1]
            row       ours [out in 1 k], upstream a Conv1d's [out in k]
            swapped   ours [out in 1 1], upstream a transposed convolution's [in out 1 1]
            merged    last axis 4C, a patch merging's norm or reduction: ours channel-major, original Swin block-major
    optional  the file may lack it; the leaf then keeps its initial value.
    """

    tree: Tree
    path: str
    key: str
    shape: tuple[int, ...]
    layout: Layout = "same"
    optional: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """The leaf's name in a bevfn checkpoint file."""
        return f"{self.tree}.{self.path}"


def weight_bias(path: str, key: str, shape: tuple[int, ...], *, bias: bool, layout: Layout = "same") -> list[Entry]:
    """A convolution or linear layer; shape[0] is the number of outputs (sparse kernels: shape[-1], without bias)."""
    found = [Entry("params", f"{path}.weight", f"{key}.weight", shape, layout)]
    return [*found, Entry("params", f"{path}.bias", f"{key}.bias", shape[:1])] if bias else found


def normalisation(
    path: str, key: str, channels: int, *, layout: Layout = "same", optional: bool = False, statistics: bool = False
) -> list[Entry]:
    """A layer norm, or with `statistics` a batch norm."""
    found = [
        Entry("params", f"{path}.{leaf}", f"{key}.{leaf}", (channels,), layout, optional) for leaf in ("weight", "bias")
    ]
    if statistics:
        found += [
            Entry("state", f"{path}.mean", f"{key}.running_mean", (channels,)),
            Entry("state", f"{path}.var", f"{key}.running_var", (channels,)),
            Entry("upstream", f"{key}.num_batches_tracked", f"{key}.num_batches_tracked", (), dtype=torch.int64),
        ]
    return found


def conv_norm(
    path: str,
    key: str,
    shape: tuple[int, ...],
    *,
    conv: str = "0",
    norm: str = "1",
    bias: bool = False,
    channels: int | None = None,
    layout: Layout = "same",
    names: tuple[str, str] = ("conv", "norm"),
) -> list[Entry]:
    """A convolution and its batch norm, named `conv` and `norm` upstream below `key` and `names` here below `path`."""
    channels = (shape[-1] if layout == "sparse" else shape[0]) if channels is None else channels
    found = weight_bias(f"{path}.{names[0]}", f"{key}.{conv}", shape, bias=bias, layout=layout)
    return found + normalisation(f"{path}.{names[1]}", f"{key}.{norm}", channels, statistics=True)
