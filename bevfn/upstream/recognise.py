"""What a foreign state dict is: which model, key prefix, naming and sparse kernel layout."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bevfn.upstream.checkpoints import CHECKPOINTS, Look
from bevfn.upstream.entries import Entry, Naming

SparseLayout = Literal["spconv2", "mmcv"]

_DEPTH_NET, _TRUNK = "backbone.depth_net.reduce_conv.", "head.trunk.conv1."
FOREIGN = (  # what bevfn does not read, told by its keys all the same
    Look("a detector with BEVDepth's depth net but another BEV head", (_DEPTH_NET,)),
    Look("a BEVDepth detector of {key_frames} key frames", (_DEPTH_NET, _TRUNK)),
    Look(
        "a BEVDepth detector of {key_frames} key frames with depth aggregation",
        (_DEPTH_NET, _TRUNK, "backbone.depth_aggregation_net."),
    ),
    Look("a BEVFusion of the original MIT repository, whose naming differs from mmdetection3d's", ("encoders.lidar.",)),
    Look("a camera-only BEVFusion of the original MIT repository", ("encoders.camera.",)),
    Look("a file that `bevfn checkpoint import` has already written", ("params.",)),
    Look("a detector of the CenterPoint or BEVDet family", ("pts_bbox_head.",)),
    Look("a detector of the BEVDet family", ("img_view_transformer.",)),
    Look("a ResNet or a detector on one", ("layer1.0.conv1.",)),
)


@dataclass(frozen=True)
class Recognised:
    """What a state dict looks like; `model` is None where no model of ours fits."""

    what: str
    model: str | None
    prefix: str = ""  # in front of every key of the model, e.g. "backbone." or "module."
    naming: Naming = "mmdet"
    alike: tuple[str, ...] = ()
    """models whose files can look the same"""


def recognise(keys: Mapping[str, Tensor]) -> Recognised:
    """Says which model a state dict belongs to, from its keys and shapes: the look that asks for most wins.

    Between equals what bevfn does not read wins, so that a detector is not taken for the backbone inside it.
    """
    looks: list[tuple[str | None, Look]] = [(None, look) for look in FOREIGN]
    looks += [(name, look) for name, spec in CHECKPOINTS.items() for look in spec.looks]
    for name, look in sorted(looks, key=_demands, reverse=True):
        prefix = _prefix_before(keys, look.anchors[0]) if look.prefix is None else look.prefix
        if prefix is None or not all(any(key.startswith(prefix + a) for key in keys) for a in look.anchors):
            continue
        frames = _key_frames(keys, prefix)
        if look.classes not in (None, _classes(keys, prefix)):
            continue
        if look.key_frames in (None, frames) and (frames is not None or "{key_frames}" not in look.what):
            alike = tuple(other for other, same in looks if other not in (None, name) and same == look)
            return Recognised(look.what.format(key_frames=frames), name, prefix, look.naming, alike)
    parts = sorted({key.split(".")[0] for key in keys})
    return Recognised(f"a model with the parts {', '.join(parts[:8])}{', ...' if len(parts) > 8 else ''}", None)


def _demands(pair: tuple[str | None, Look]) -> int:
    """Of a look; `sorted` in reverse keeps the order of equals."""
    look = pair[1]
    return len(look.anchors) + (look.key_frames is not None) + (look.classes is not None)


def _classes(keys: Mapping[str, Tensor], prefix: str) -> int | None:
    """Maps of a BEVFusion's class heatmap."""
    last = keys.get(f"{prefix}bbox_head.heatmap_head.1.weight")
    return None if last is None else last.shape[0]


def _key_frames(keys: Mapping[str, Tensor], prefix: str) -> int | None:
    """Maps of a BEVDepth's depth net that its BEV backbone takes side by side."""
    stem = keys.get(f"{prefix}head.trunk.conv1.weight")
    context = keys.get(f"{prefix}backbone.depth_net.context_conv.weight")
    if stem is None or context is None or stem.dim() != 4 or stem.shape[1] % context.shape[0]:
        return None
    return stem.shape[1] // context.shape[0]


def _prefix_before(keys: Collection[str], anchor: str) -> str | None:
    """The text before `anchor` (at a dot) in the first key that has it, the shortest if there are several."""
    found = [key[: key.index(anchor)] for key in keys if key.startswith(anchor) or f".{anchor}" in key]
    return min(found, key=len) if found else None


def sparse_layout(upstream: Mapping[str, Tensor], entries: Sequence[Entry]) -> SparseLayout:
    """The layout of the sparse kernels, by their shapes taken together (spconv 2's if nothing decides).

    Raises ValueError if some kernels are certainly of one layout and some of the other.
    """
    certain: dict[SparseLayout, list[str]] = {"spconv2": [], "mmcv": []}
    for entry in entries:
        if entry.layout == "sparse" and entry.key in upstream:
            shape, mmcv = tuple(upstream[entry.key].shape), entry.shape
            spconv2 = (mmcv[4], *mmcv[:4])
            if shape in (spconv2, mmcv) and spconv2 != mmcv:
                certain["spconv2" if shape == spconv2 else "mmcv"].append(entry.key)
    if certain["spconv2"] and certain["mmcv"]:
        raise ValueError(
            f"sparse kernels are of two layouts: {certain['spconv2'][0]} is [out kx ky kz in] (spconv 2) but "
            f"{certain['mmcv'][0]} is [kx ky kz in out] (mmcv); permute the file's kernels to one of them."
        )
    return "mmcv" if certain["mmcv"] else "spconv2"
