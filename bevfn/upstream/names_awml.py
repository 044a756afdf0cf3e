"""Foreign names of TIER IV's BEVFusion: mmdetection3d's, with `.net` in the view transform's parts since December 2025, and
what its releases differ in.

Source: state dicts of AWML's models (7a6ec07), the history of AWML's depth_lss.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from bevfn.models import awml, bevfusion
from bevfn.upstream import names_bevfusion
from bevfn.upstream.entries import Names, Naming

_ENCODER = "pts_middle_encoder"
UNUSED = ((rf"{_ENCODER}\.aug_features_(min|max)_values", "bounds of Fourier features, which this model has none of"),)
# By the number of bins: today's, base/2.0's and j6gen2's.
_DEPTHS = {129: (1.0, 130.0, 1.0), 95: (1.0, 134.0, 1.4), 118: (1.0, 166.2, 1.4)}


def detector(params: dict, naming: Naming) -> Names:
    """A detector of any sensors, in upstream's order."""
    return names_bevfusion.detector(params, view="net." if naming == "net" else "")


def detector_buffers(config: bevfusion.Config) -> dict[str, Tensor]:
    """Swin's and the view transform's, and the bounds and frequencies of Fourier features."""
    made = names_bevfusion.detector_buffers(config)
    if config.lidar is not None and config.lidar.fourier is not None:
        waves = config.lidar.fourier
        made[f"{_ENCODER}.aug_features_min_values"] = torch.tensor(waves.lower)
        made[f"{_ENCODER}.aug_features_max_values"] = torch.tensor(waves.upper)
        made[f"{_ENCODER}.exponents"] = 2.0 ** torch.arange(waves.frequencies)
    return made


def fitted(config: bevfusion.Config, leaves: Mapping[str, Tensor]) -> bevfusion.Config:
    """The configuration of the release that a file is of, told by its shapes.

    Releases differ in the point features (intensity, Fourier), the fuser's kernel, the depth bins, and the depth net's width and
    biases.
    `leaves` by upstream's names, or by ours: `params.<path>`.
    """

    def found(ours: str, *theirs: str) -> Tensor | None:
        return next((leaves[name] for name in (f"params.{ours}", *theirs) if name in leaves), None)

    entry = found("lidar.conv_input.conv.weight", f"{_ENCODER}.conv_input.0.weight")
    if config.lidar is not None and entry is not None:
        channels = entry.numel() // (prod((3, 3, 3)) * config.lidar.encoder.channels[0])
        config = replace(config, lidar=_reading(config.lidar, channels))
    fuser = found("fuser.conv.weight", "fusion_layer.0.weight")
    if config.fuser_kernel is not None and fuser is not None:
        config = replace(config, fuser_kernel=fuser.shape[-1])
    part = "view_transform.depthnet"
    last = found("camera.view.depth_net.2.conv.weight", f"{part}.6.weight", f"{part}.net.6.weight")
    if config.camera is None or last is None:
        return config
    first, bias = (
        found(f"camera.view.depth_net.0.conv.{leaf}", f"{part}.0.{leaf}", f"{part}.net.0.{leaf}")
        for leaf in ("weight", "bias")
    )
    wide = first is not None and first.shape[0] == first.shape[1]
    view = replace(config.camera.view, bias=bias is not None, wide_depth_net=wide)
    depth = _DEPTHS.get(last.shape[0] - view.channels_out)
    if depth is not None and view.grid.depth_bins in _DEPTHS:
        view = replace(view, grid=replace(view.grid, depth_m=depth))
    return replace(config, camera=replace(config.camera, view=view))


def _reading(lidar: bevfusion.Lidar, channels: int) -> bevfusion.Lidar:
    """A LiDAR branch as it is, but with what a first convolution of so many channels reads."""
    encoder = replace(lidar.encoder, channels_in=channels)
    for intensity in (False, True):
        published = awml.lidar(intensity=intensity).lidar
        assert published is not None and published.fourier is not None
        if channels == published.fourier.channels:
            return bevfusion.Lidar(encoder, published.features, published.fourier)
        if channels == len(published.features):
            return bevfusion.Lidar(encoder, published.features)
    return lidar
