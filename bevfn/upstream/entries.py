"""What a name map says: our modules under their foreign names. `entries` joins it to the leaves that `init` makes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bevfn import tree

Tree = Literal["params", "state", "upstream"]  # "upstream": a key kept only so that the export is exact
WeightLayout = Literal["same", "sparse", "sequence", "merged", "row", "swapped"]
Naming = Literal["mmdet", "original", "net"]
"""mmdet's; of a lone Swin the original repository's; of AWML mmdet's with `.net` in the view transform's parts"""


@dataclass(frozen=True)
class Named:
    """A module of ours (a path below which leaves lie), or one parameter, and its foreign name.

    layout is the weight's (of a norm also the bias'):
            same
            sparse    ours [kx ky kz in out]; upstream the same (mmcv) or [out kx ky kz in] (spconv 2)
            sequence  ours [out in], upstream a Conv1d's [out in 1]
            row       ours [out in 1 k], upstream a Conv1d's [out in k]
            swapped   ours [out in 1 1], upstream a transposed convolution's [in out 1 1]
            merged    last axis 4C, a patch merging's norm or reduction: ours channel-major, original Swin block-major
    optional  the file may lack it; the leaves then keep their initial values.
    """

    path: str
    key: str
    layout: WeightLayout = "same"
    optional: bool = False


Names = Iterator[Named]


@dataclass(frozen=True)
class Entry:
    """One leaf: `path` in our `tree`, `key` upstream, `shape` of ours; the rest as in `Named`."""

    tree: Tree
    path: str
    key: str
    shape: tuple[int, ...]
    layout: WeightLayout = "same"
    optional: bool = False

    @property
    def name(self) -> str:
        """The leaf's name in a bevfn checkpoint file."""
        return f"{self.tree}.{self.path}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.int64 if self.tree == "upstream" else torch.float32


def conv_norm(
    path: str, key: str, conv: str = "0", norm: str = "1", *, layout: WeightLayout = "same", names: str = "conv norm"
) -> Names:
    """A convolution and its batch norm: `conv` and `norm` upstream below `key`, the two `names` here below `path`."""
    for ours, theirs, how in zip(names.split(), (conv, norm), (layout, "same")):
        yield Named(f"{path}.{ours}", f"{key}.{theirs}", how)


def entries(names: Iterable[Named], params: dict, state: dict) -> list[Entry]:
    """Every leaf that the names reach, and the batch counts beside running statistics, in the names' order."""
    weights, statistics = tree.flatten(params), tree.flatten(state)
    found: list[Entry] = []
    for named in names:
        if named.path in weights:
            shape = tuple(weights[named.path].shape)
            found.append(Entry("params", named.path, named.key, shape, named.layout, named.optional))
            continue
        for leaf in ("weight", "bias"):
            if (path := f"{named.path}.{leaf}") in weights:
                layout = named.layout if leaf == "weight" or named.layout == "merged" else "same"
                shape = tuple(weights[path].shape)
                found.append(Entry("params", path, f"{named.key}.{leaf}", shape, layout, named.optional))
        for leaf in ("mean", "var"):
            if (path := f"{named.path}.{leaf}") in statistics:
                shape = tuple(statistics[path].shape)
                found.append(Entry("state", path, f"{named.key}.running_{leaf}", shape))
        if f"{named.path}.mean" in statistics:
            counter = f"{named.key}.num_batches_tracked"
            found.append(Entry("upstream", counter, counter, ()))
    return found


def impossible(name: str, leaf: Tensor) -> str | None:
    """What a leaf of `params` or `state` holds that no such leaf can hold; None if nothing. `name`: of ours, dotted."""
    if not leaf.is_floating_point():
        return f"of type {str(leaf.dtype).removeprefix('torch.')}, which no weight is"
    if not torch.isfinite(leaf).all():
        return "NaN or infinite"
    if name.endswith(".var") and (leaf < 0).any():
        return "negative, which no variance is"
    return None
