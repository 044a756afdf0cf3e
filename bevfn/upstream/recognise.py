"""What a foreign state dict is: which model, key prefix, naming and sparse kernel layout; why a key has no use here."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bevfn.upstream import names_bevdepth
from bevfn.upstream.entries import Entry, Naming

SparseLayout = Literal["spconv2", "mmcv"]

_SWIN: dict[str, Naming] = {
    "patch_embed.proj.weight": "original",
    "patch_embed.projection.weight": "mmdet",
}
_FOREIGN = {  # a key part that only such a model has: what to call it
    "encoders.lidar.": "a BEVFusion of the original MIT repository, whose naming differs from mmdetection3d's",
    "encoders.camera.": "a camera-only BEVFusion of the original MIT repository",
    "params.": "a file that `bevfn checkpoint import` has already written",
    "pts_bbox_head.": "a detector of the CenterPoint or BEVDet family",
    "img_view_transformer.": "a detector of the BEVDet family",
    "layer1.0.conv1.": "a ResNet or a detector on one",
}


@dataclass(frozen=True)
class Source:
    """What a state dict looks like; `model` is None where no model of ours fits."""

    what: str
    model: str | None
    prefix: str = ""  # in front of every key of the model, e.g. "backbone." or "module."
    naming: Naming = "mmdet"


def recognise(keys: Mapping[str, Tensor]) -> Source:
    """Says which model a state dict belongs to, by its anchors: the sparse encoder and head, the camera-aware depth net,
    Swin's patch embedding, or the layers of a bare ResNet."""
    found = _bevdepth(keys)
    if found is not None:
        return found
    lidar = _prefix_before(keys, "pts_middle_encoder.")
    if lidar is not None and any(key.startswith(f"{lidar}bbox_head.") for key in keys):
        if any(key.startswith(f"{lidar}img_backbone.") for key in keys):
            return Source("a camera + LiDAR BEVFusion detector", "bevfusion-lidar-camera", lidar)
        return Source("a LiDAR-only BEVFusion detector", "bevfusion-lidar", lidar)
    for part, what in _FOREIGN.items():
        if any(key.startswith(part) or f".{part}" in key for key in keys):
            return Source(what, None)
    for anchor, naming in _SWIN.items():
        prefix = _prefix_before(keys, anchor)
        if prefix is not None:
            return Source(f"a Swin backbone in {naming} naming", "swin-nuimages", prefix, naming)
    parts = sorted({key.split(".")[0] for key in keys})
    return Source(f"a model with the parts {', '.join(parts[:8])}{', ...' if len(parts) > 8 else ''}", None)


def _bevdepth(keys: Mapping[str, Tensor]) -> Source | None:
    """A detector of BEVDepth's family, whose key frames follow from the widths of its BEV map, or a bare ResNet."""
    prefix = _prefix_before(keys, "backbone.depth_net.reduce_conv.")
    if prefix is None:
        # torchvision's file; in a detector the same names have something in front
        bare = {"conv1.weight", "layer1.0.conv3.weight", "layer4.2.conv3.weight"} <= set(keys)
        return Source("an ImageNet ResNet-50", "resnet50") if bare else None
    if f"{prefix}backbone.horiconv.out_conv.0.weight" in keys:
        return Source("a MatrixVT detector", "matrixvt", prefix)
    stem = keys.get(f"{prefix}head.trunk.conv1.weight")
    context = keys.get(f"{prefix}backbone.depth_net.context_conv.weight")
    if stem is None or context is None or stem.dim() != 4 or stem.shape[1] % context.shape[0]:
        return Source("a detector with BEVDepth's depth net but another BEV head", None, prefix)
    frames = stem.shape[1] // context.shape[0]
    refined = any(key.startswith(f"{prefix}backbone.depth_aggregation_net.") for key in keys)
    model = f"bevdepth-{frames}key{'-da' if refined else ''}"
    what = f"a BEVDepth detector of {frames} key frame{'s' if frames > 1 else ''}"
    what += " with depth aggregation" if refined else ""
    return Source(what, model if model in names_bevdepth.MODELS else None, prefix)


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


def reason_unused(key: str, model: str) -> str | None:
    """Why a key that no entry names has no use, None if it should not be there. `key` without the source's prefix."""
    if model == "swin-nuimages":
        if key.endswith(".attn_mask"):
            return "shift mask for the pre-training image size; bevfn computes its own"
        if key.startswith("head."):
            return "classification head of the pre-training"
        if key in ("norm.weight", "norm.bias"):
            return "norm of the classification head"
        if key in ("norm0.weight", "norm0.bias"):
            return "norm of the first stage, whose output the detector does not use"
    if model == "resnet50" and key in ("fc.weight", "fc.bias"):
        return "classification head of the pre-training"
    if key.startswith(("pts_voxel_layer.", "pts_voxel_encoder.", "data_preprocessor.")):
        return "voxelization and image normalization are computed from the configuration"
    return None
