"""Starting weights from several checkpoints, as the recipes do: a LiDAR-only detector and a nuImages Swin into a
camera + LiDAR detector."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bevfn import tree
from bevfn.catalogue import PRETEXT

Loaded = Mapping[str, tuple[dict, dict]]
"""{source: (params, state)}"""


@dataclass
class Merge:
    """Where each leaf of the merged trees comes from; names are `params.<path>` and `state.<path>`."""

    filled: dict[str, str] = field(default_factory=dict)  # name: source
    initial: list[str] = field(default_factory=list)  # names that keep their initial value
    reshaped: dict[str, str] = field(default_factory=dict)  # of these: what shape a source has; see `fitting_only`
    unused: dict[str, str] = field(default_factory=dict)  # name that the trees lack: source
    pretext: dict[str, str] = field(default_factory=dict)  # name of what served a source's pretraining alone: source

    @property
    def absent(self) -> list[str]:
        """The names that keep their initial value since no source has them."""
        return [name for name in self.initial if name not in self.reshaped]

    def text(self) -> str:
        """One line per source and per group of leaves that stay at init; where only what fits was taken, every name."""
        lines = [f"at init, {name} {shapes}" for name, shapes in self.reshaped.items()]
        if self.reshaped or self.unused:
            lines += [f"at init, {name} is in no file" for name in self.absent]
            lines += [f"unused, {name} of {source}" for name, source in self.unused.items()]
            count = len(self.filled) + len(self.initial)
            lines += [
                f"{len(self.filled)} of {count} tensors have their shape there, {len(self.reshaped)} another one, "
                f"{len(self.absent)} are absent; {len(self.unused)} of the files' are not used"
            ]
        for source in dict.fromkeys(self.filled.values()):
            count = sum(origin == source for origin in self.filled.values())
            lines.append(f"{count} tensors from {source}{self._served(source)}")
        groups: dict[str, int] = {}
        for name in self.initial:
            group = ".".join(name.split(".")[1:3])
            groups[group] = groups.get(group, 0) + 1
        return "\n".join([*lines, *(f"{count} tensors of {group} at init" for group, count in groups.items())])

    def _served(self, source: str) -> str:
        """What of a source served its pretraining, for the line of that source."""
        count = sum(origin == source for origin in self.pretext.values())
        return f", whose other {count} served its pretraining alone and are left out" if count else ""


def load_into(
    params: dict, state: dict, loaded: Loaded, *, allow_missing: tuple[str, ...] = (), fitting_only: bool = False
) -> tuple[dict, dict, Merge]:
    """(params, state, merge): the given trees with the leaves of `loaded` = {source: (params, state)} in their places.

    Leaves that no source holds keep their value, where their path starts with one of `allow_missing` (a path or its
    beginning, e.g. "camera", "fuser"). Loaded leaves are copied to the dtype and device of those they replace.
    Leaves below `catalogue.PRETEXT` that the trees lack are left out, and named in `merge`.
    fitting_only: loaded leaves that are not in the trees, or have another shape there, are left out and named in `merge`,
    as mmcv's load_checkpoint does: for a model that starts from a relative.

    Raises ValueError for a leaf that is not in the trees, comes from two sources, has another shape, or is missing.
    """
    ours = {f"params.{path}": leaf for path, leaf in tree.flatten(params).items()}
    ours |= {f"state.{path}": leaf for path, leaf in tree.flatten(state).items()}
    flat, merge = dict(ours), Merge()
    for source, trees in loaded.items():
        for prefix, part in zip(("params", "state"), trees):
            for path, leaf in tree.flatten(part).items():
                name = f"{prefix}.{path}"
                if name not in ours and _below(path, (PRETEXT,)):
                    merge.pretext[name] = source
                elif not (fitting_only and _left_out(name, leaf, ours, source, merge)):
                    flat[name] = _place(name, leaf, ours, source, merge)
    merge.initial = [name for name in ours if name not in merge.filled]
    lost = [name for name in merge.initial if not _below(name.partition(".")[2], allow_missing)]
    if lost:
        raise ValueError(
            f"no checkpoint of {', '.join(loaded) or 'none'} holds {lost[0]}"
            + (f" and {len(lost) - 1} more leaves" if len(lost) > 1 else "")
            + ": load one that does, or name its path in allow_missing to keep the initial value."
        )
    new_params = tree.unflatten({path: flat[f"params.{path}"] for path in tree.flatten(params)}, params)
    new_state = tree.unflatten({path: flat[f"state.{path}"] for path in tree.flatten(state)}, state)
    return new_params, new_state, merge


def _left_out(name: str, leaf: Tensor, ours: Mapping[str, Tensor], source: str, merge: Merge) -> bool:
    """Whether a leaf does not fit, which `merge` then says."""
    if name not in ours:
        merge.unused[name] = source
        return True
    if leaf.shape == ours[name].shape:
        return False
    merge.reshaped[name] = f"is {list(leaf.shape)} in {source}, {list(ours[name].shape)} in the model"
    return True


def _place(name: str, leaf: Tensor, ours: Mapping[str, Tensor], source: str, merge: Merge) -> Tensor:
    if name not in ours:
        raise ValueError(f"{source} holds {name}, which the model lacks: it is a checkpoint of another model.")
    if name in merge.filled:
        raise ValueError(f"both {merge.filled[name]} and {source} hold {name}: load only one of them.")
    if leaf.shape != ours[name].shape:
        raise ValueError(f"{name} is {list(leaf.shape)} in {source} but {list(ours[name].shape)} in the model.")
    merge.filled[name] = source
    return torch.empty_like(ours[name], requires_grad=False).copy_(leaf.detach())


def _below(path: str, prefixes: tuple[str, ...]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)
