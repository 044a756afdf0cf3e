"""Weights that a run begins with, or that are evaluated: of an imported file, or of a run's checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bevfn import tree, upstream
from bevfn.training import checkpoint, located
from bevfn.upstream import recognise


def parts(params: dict, state: dict, loaded: upstream.Loaded) -> tuple[dict, dict, upstream.Merge]:
    """The trees with the leaves that the files have, which must be leaves of the model; the others are trained from init."""
    return upstream.load_into(params, state, loaded, allow_missing=tuple(params))


@dataclass(frozen=True)
class Start:
    """What becomes of the files of --pretrained."""

    merge: Callable[[dict, dict, upstream.Loaded], tuple[dict, dict, upstream.Merge]] = parts
    """(params, state, loaded) -> (params, state, where each leaf is from)"""
    averages: bool = False
    """of a run's checkpoint its EMA is taken, if it has one"""


def read_weights(path: Path, *, ema: bool = False) -> tuple[dict, dict]:
    """(params, state) of an imported file, or of a training checkpoint's folder (`ema`: their averages, if it has).

    path: also a run's folder, or RUN/best. Raises ValueError, naming the file, if it is absent, damaged or yet to be imported, or
    a weight in it is none (`upstream.impossible`).
    """
    path = located.whole(path)
    if not path.is_dir():
        read = imported(path)
        params, state = read.params, read.state
    else:
        tensors = checkpoint.read(path)
        root = "ema." if ema and any(name.startswith("ema.") for name in tensors) else ""
        params, state = (
            upstream.nest({n.removeprefix(root + part): x for n, x in tensors.items() if n.startswith(root + part)})
            for part in ("params.", "state.")
        )
    return usable(path, params, state)


def check(path: Path) -> None:
    """Raises ValueError for what `read_weights` would refuse hours later: a path where no weights are, a published file."""
    place = located.whole(path)
    if place.is_dir():
        checkpoint.read_meta(place)
    else:
        imported(place)


def imported(file: Path) -> upstream.Imported:
    """What `bevfn checkpoint import` wrote. Raises ValueError, with the command, for a published file."""
    try:
        return upstream.read_imported(file)
    except upstream.NotImported:
        if (file.parent / checkpoint.META).is_file():
            raise ValueError(f"{file} is a part of a checkpoint; give its folder, {file.parent}") from None
        looks = recognise.recognise(upstream.read_state_dict(file))
        raise ValueError(
            f"{file} is a published file ({looks.what}), which is imported first: `bevfn checkpoint import {file} "
            f"{file.with_suffix('').name}_imported.safetensors --model {looks.model or 'MODEL'}` writes the file to give here"
        ) from None


def usable(path: Path, params: dict, state: dict) -> tuple[dict, dict]:
    """The weights of a file, in memory of their own. Raises ValueError where one of them is none."""
    for name, leaf in tree.flatten({"params": params, "state": state}).items():
        if what := upstream.impossible(name, leaf):
            raise ValueError(f"{path}: {name} is {what}; take an older checkpoint, or import the published file again")
    # Clones: what safetensors maps from a file lies at any multiple of 4 bytes, where a CPU's products round otherwise than
    # on a trained model's aligned tensors, and a checkpoint would not score bit for bit as its run did.
    return tree.map(torch.clone, params), tree.map(torch.clone, state)
