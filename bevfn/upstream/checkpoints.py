"""The published checkpoints that bevfn reads: one entry each."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bevfn.models import awml, bevdepth, bevfusion, bevnext
from bevfn.upstream import names_awml, names_bevdepth, names_bevfusion, names_bevnext
from bevfn.upstream.entries import Entry, Names, Naming
from bevfn.upstream.entries import entries as _entries


@dataclass(frozen=True)
class Look:
    """What tells a state dict's model: keys that begin with all of `anchors`, below one prefix."""

    what: str
    anchors: tuple[str, ...]
    key_frames: int | None = None
    """of a BEVDepth, read off the widths of its BEV map; None: any number"""
    classes: int | None = None
    """of a BEVFusion's head; None: any number"""
    naming: Naming = "mmdet"
    prefix: str | None = None
    """the one prefix that the keys may have; None: any"""


@dataclass(frozen=True)
class Checkpoint:
    """What importing and exporting needs: names come from `names`, widths from the family's `init(config)`."""

    looks: tuple[Look, ...]
    family: ModuleType
    """the model's module: `init`"""
    config: Callable[[], Any]
    """the published configuration"""
    names: Callable[[dict, Naming], Names]
    """of the family's params tree, or of the part of it that the file holds"""
    buffers: Callable[[Any, Naming], dict[str, Tensor]] = lambda config, _: {}
    """upstream's stored buffers that follow from the configuration, by key: ours are computed, never loaded"""
    unused: tuple[tuple[str, str], ...] = ()
    """(pattern of keys without the prefix, why they have no use here)"""
    fitted: Callable[[Any, Mapping[str, Tensor]], Any] = lambda config, leaves: config
    """the configuration of the release that leaves, by upstream's names or ours (`params.<path>`), are of"""
    prefix: str = ""
    """in front of every key, where upstream's own files have one"""


_COMPUTED = "voxelization and image normalization are computed from the configuration"


def _detector(
    looks: tuple[Look, ...],
    family: ModuleType,
    config: Callable[[], Any],
    names: ModuleType,
    unused: tuple[tuple[str, str], ...] = (),
) -> Checkpoint:
    """A detector as its repository writes it: in one naming."""
    return Checkpoint(
        looks,
        family,
        config,
        lambda params, _: names.detector(params),
        lambda made, _: names.detector_buffers(made),
        unused,
    )


_LIDAR = ("pts_middle_encoder.", "bbox_head.")


def _bevfusion(config: Callable[[], bevfusion.Config], what: str, *anchors: str) -> Checkpoint:
    return _detector((Look(what, (*_LIDAR, *anchors)),), bevfusion, config, names_bevfusion, names_awml.UNUSED)


def _awml(config: Callable[[], bevfusion.Config], *looks: Look) -> Checkpoint:
    """A detector of five classes: of ten, it is mmdetection3d's."""
    return Checkpoint(
        tuple(replace(look, classes=len(awml.CLASSES)) for look in looks),
        bevfusion,
        config,
        names_awml.detector,
        lambda made, _: names_awml.detector_buffers(made),
        names_awml.UNUSED,
        names_awml.fitted,
    )


def _in_both_namings(what: str, *anchors: str) -> tuple[Look, Look]:
    """AWML's with cameras, of today and of before December 2025."""
    part = "view_transform.dtransform."
    return Look(what, (*anchors, f"{part}net."), naming="net"), Look(what, (*anchors, f"{part}0."))


_AWML_PLAIN = Look("an AWML BEVFusion-L detector without Fourier features", _LIDAR)


def _bevdepth(config: Callable[[], bevdepth.Config], what: str, *anchors: str) -> Checkpoint:
    anchors = ("backbone.depth_net.reduce_conv.", "head.trunk.conv1.", *anchors)
    looks = (Look(what, anchors, key_frames=config().frames),)
    return replace(_detector(looks, bevdepth, config, names_bevdepth), prefix="model.")  # of the Lightning module


def _bevnext(config: Callable[[], bevnext.Config], what: str, *anchors: str) -> Checkpoint:
    parts = ("img_view_transformer.depth_net.", "img_view_transformer.crf.", "transformer_neck.", "proposal_head.")
    looks = (Look(what, (*parts, *anchors)),)
    return Checkpoint(looks, bevnext, config, lambda params, _: names_bevnext.detector(params))


_RESNET50 = ("conv1.weight", "layer1.0.conv3.weight", "layer4.2.conv3.weight")
CHECKPOINTS = {
    "bevfusion-lidar": _bevfusion(bevfusion.lidar_only, "a LiDAR-only BEVFusion detector"),
    "bevfusion-lidar-camera": _bevfusion(
        bevfusion.lidar_camera, "a camera + LiDAR BEVFusion detector", "img_backbone."
    ),
    "awml-lidar-offline": _awml(awml.lidar_offline, _AWML_PLAIN),
    "awml-lidar": _awml(
        awml.lidar,
        Look("an AWML BEVFusion-L detector", (*_LIDAR, "pts_middle_encoder.exponents")),
        _AWML_PLAIN,  # before 2.7; nothing in it tells the voxels' size
    ),
    "awml-camera-lidar": _awml(
        awml.camera_lidar, *_in_both_namings("an AWML BEVFusion-CL detector", *_LIDAR, "img_backbone.")
    ),
    "awml-camera": _awml(awml.camera, *_in_both_namings("an AWML BEVFusion-C detector", "bbox_head.", "img_backbone.")),
    "swin-nuimages": Checkpoint(
        (
            Look("a Swin backbone in original naming", ("patch_embed.proj.weight",), naming="original"),
            Look("a Swin backbone in mmdet naming", ("patch_embed.projection.weight",)),
        ),
        bevfusion,
        bevfusion.lidar_camera,
        names_bevfusion.swin,
        names_bevfusion.swin_buffers,
        names_bevfusion.UNUSED_OF_SWIN,
    ),
    "bevdepth-1key": _bevdepth(lambda: bevdepth.key_frames(1), "a BEVDepth detector of 1 key frame"),
    "bevdepth-2key": _bevdepth(bevdepth.two_key, "a BEVDepth detector of 2 key frames"),
    "bevdepth-4key": _bevdepth(lambda: bevdepth.key_frames(4), "a BEVDepth detector of 4 key frames"),
    "bevdepth-2key-da": _bevdepth(
        bevdepth.two_key_aggregated,
        "a BEVDepth detector of 2 key frames with depth aggregation",
        "backbone.depth_aggregation_net.",
    ),
    "matrixvt": _bevdepth(
        bevdepth.matrix_vt, "a MatrixVT detector", "backbone.horiconv.out_conv.", "backbone.depth_reducer."
    ),
    "resnet50": Checkpoint(
        # torchvision's file: in a detector the same names have something in front
        (Look("an ImageNet ResNet-50", _RESNET50, prefix=""),),
        bevdepth,
        bevdepth.two_key,
        lambda params, _: names_bevdepth.resnet(params),
        unused=names_bevdepth.UNUSED_OF_RESNET,
    ),
    "bevnext-stage1": _bevnext(bevnext.stage_one, "a BEVNeXt detector of stage 1 (one frame)"),
    "bevnext-stage2": _bevnext(
        bevnext.stage_two, "a BEVNeXt detector of stage 2 (frames fused)", "img_bev_encoder_backbone.fusion_layer."
    ),
    "resnet50-detector": Checkpoint(
        (Look("a detector of mmdetection on a ResNet-50", _RESNET50, prefix="backbone."),),
        bevnext,
        bevnext.stage_one,
        lambda params, _: names_bevnext.image_backbone(params),
    ),
}
"""In the order of the models' own files; parts that start a model beside them."""


def entries(model: str, naming: Naming = "mmdet", *, config: Any = None) -> list[Entry]:
    """Every leaf and every carried key of `model`, in upstream's order; `naming` concerns the lone Swin and AWML's cameras.

    config: the family's configuration whose shapes count; the published one if None.
    """
    spec = CHECKPOINTS[model]
    with torch.device("meta"):  # shapes alone: no memory, no random numbers
        params, state = spec.family.init(spec.config() if config is None else config, seed=0)
    return _entries(spec.names(params, naming), params, state)


def fitted(model: str, leaves: Mapping[str, Tensor]) -> Any:
    """The configuration of the release that a file of `model` is of, see `Checkpoint.fitted`; the published one of most."""
    spec = CHECKPOINTS[model]
    return spec.fitted(spec.config(), leaves)


def naming(model: str, wanted: str | None = None) -> Naming:
    """That of today's files of `model`, or the one that is wanted. Raises ValueError for one that its files never had."""
    known = [look.naming for look in CHECKPOINTS[model].looks]
    found = next((name for name in known if wanted in (None, name)), None)
    if found is None:
        raise ValueError(f"{model} has no naming {wanted}; its files have {' or '.join(dict.fromkeys(known))}")
    return found


def has_sparse_kernels(model: str) -> bool:
    """Whether a file of `model` has kernels in one of two layouts (see `entries.Named`)."""
    return any(entry.layout == "sparse" for entry in entries(model))


def reason_unused(key: str, model: str) -> str | None:
    """Why a key that no entry names has no use, None if it should not be there. `key` without the source's prefix."""
    if key.startswith(("pts_voxel_layer.", "pts_voxel_encoder.", "data_preprocessor.")):
        return _COMPUTED
    return next((reason for pattern, reason in CHECKPOINTS[model].unused if re.fullmatch(pattern, key)), None)


def buffers(model: str, naming: Naming = "mmdet", *, config: Any = None) -> dict[str, Tensor]:
    """Upstream's stored buffers that follow from the configuration, by key."""
    spec = CHECKPOINTS[model]
    return spec.buffers(spec.config() if config is None else config, naming)
