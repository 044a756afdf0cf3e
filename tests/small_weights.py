"""Small checkpoints as upstream writes them: every key of a published model, at its family's small size."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bevfn import upstream
from bevfn.upstream import checkpoints
from bevfn.upstream.entries import Naming


def small(model: str) -> Any:
    """The family's small configuration of a model."""
    spec = upstream.CHECKPOINTS[model]
    config = spec.family.mini(spec.config())
    if model.startswith("resnet50"):  # of any width, but of its own depth
        config = replace(config, backbone=replace(config.backbone, blocks=(3, 4, 6, 3)))
    if model == "bevfusion-lidar-camera":  # takes over the LiDAR-only model's BEV layers, as the published one
        config = replace(config, fused_channels=128, backbone=replace(config.backbone, channels_in=128))
    return config


def upstream_state(
    model: str, naming: Naming = "mmdet", sparse: str = "spconv2", config: Any = None
) -> dict[str, Tensor]:
    """Random tensors under every upstream key of a small model (or of another configuration), with its derived buffers."""
    config = small(model) if config is None else config
    generator = torch.Generator().manual_seed(0)
    found = {}
    for entry in checkpoints.entries(model, naming, config=config):
        shape = entry.shape
        if entry.layout == "sparse" and sparse == "spconv2":
            shape = (shape[4], *shape[:4])
        if entry.layout == "sequence":
            shape = (*shape, 1)
        if entry.layout == "row":
            shape = (*shape[:2], shape[3])
        if entry.layout == "swapped":
            shape = (shape[1], shape[0], *shape[2:])
        counter = torch.tensor(7)
        drawn = torch.randn(shape, generator=generator)
        found[entry.key] = (
            counter if entry.tree == "upstream" else drawn.abs() if entry.path.endswith(".var") else drawn
        )
    prefix = upstream.CHECKPOINTS[model].looks[0].prefix or ""
    return {prefix + key: leaf for key, leaf in (found | checkpoints.buffers(model, naming, config=config)).items()}


def shrunk(model: str) -> checkpoints.Checkpoint:
    """The model with its small configuration, for commands, which know the published one."""
    config = small(model)
    return replace(checkpoints.CHECKPOINTS[model], config=lambda: config)
