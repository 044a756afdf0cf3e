"""BEV backbone that fuses frames (BEVNeXt, Li et al. 2024, arXiv 2312.01696): blocks of Res2Net (Gao et al.
2019, arXiv 1904.01169) whose first one takes the frames' maps side by side, newest first.

The fusion block halves nothing. Its 1x1 gathers neighbouring frames in `groups`; from the oldest group on, each one's 3x3
sees the result of the one before, and the newest goes on as it is. The stages' blocks split their channels into `scales`:
in a stage's first block each scale has its own strided 3x3, in the others each takes in the one before; the last scale
only passes, pooled where the others stride. No convolution has a bias.

Source: BEVNeXt mmdet3d/models/backbones/res2fusion.py (behaviour); golden case bevnext_stage2, `bev_fusion`.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bevfn import tree
from bevfn.distributed import Train
from bevfn.layers import conv_norm, remat


@dataclass(frozen=True)
class Config:
    """The defaults are those of BEVNeXt's stage 2."""

    frames: int = 9
    context: int = 160
    """channels of each frame's map, and of the fused one"""
    groups: int = 3
    """of frames; each has frames / groups of them"""
    group_width: int = 60
    """channels of a group inside the fusion block"""
    blocks: tuple[int, ...] = (2, 2, 2)
    """of each stage; every stage halves the resolution and doubles the channels"""
    scales: int = 4
    width_divisor: int = 8
    """output channels of a block per channel of a scale"""
    recompute: bool = False
    """every block once more for the gradient, see `layers.remat`"""

    def __post_init__(self) -> None:
        if self.frames % self.groups or self.groups < 2:
            raise ValueError(f"{self.groups} groups must be at least 2 and divide the {self.frames} frames")
        if any(channels % self.width_divisor for channels in self.stage_channels):
            raise ValueError(
                f"width_divisor {self.width_divisor} must divide the stages' channels {self.stage_channels}"
            )

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Output channels of every stage."""
        return tuple(self.context * 2 ** (s + 1) for s in range(len(self.blocks)))


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state) with torch's default initialisation.

    {"fusion": block, "stages": [stage][block]} of {"reduce", "scales": layers, "expand", "shortcut" (first blocks)}.
    """
    C, inner = config.context, config.groups * config.group_width
    fusion = {
        "reduce": conv_norm.init(config.frames * C, inner, 1, generator=generator, groups=config.groups),
        "scales": [
            conv_norm.init(config.group_width, config.group_width, 3, generator=generator)
            for _ in range(config.groups - 1)
        ],
        "expand": conv_norm.init(inner, C, 1, generator=generator),
    }
    stages, c_in = [], C
    for count, c_out in zip(config.blocks, config.stage_channels):
        stages.append([_init_block(c_in if i == 0 else c_out, c_out, i == 0, config, generator) for i in range(count)])
        c_in = c_out
    return tree.unzip({"fusion": fusion, "stages": stages})


def _init_block(c_in: int, c_out: int, first: bool, config: Config, generator: torch.Generator) -> dict:
    width = c_out // config.width_divisor
    made = {
        "reduce": conv_norm.init(c_in, width * config.scales, 1, generator=generator),
        "scales": [conv_norm.init(width, width, 3, generator=generator) for _ in range(config.scales - 1)],
        "expand": conv_norm.init(width * config.scales, c_out, 1, generator=generator),
    }
    if first:
        made["shortcut"] = conv_norm.init(c_in, c_out, 1, generator=generator)
    return made


def apply(params: dict, state: dict, x: Tensor, *, config: Config, train: Train) -> tuple[list[Tensor], dict]:
    """Frames side by side [B frames*C Y X], newest first -> (the fused map [B C Y X] and every stage's, new state)."""
    fuse, through = partial(_fuse, config=config, train=train), partial(_block, train=train)
    fused, fusion = remat.apply(fuse, params["fusion"], state["fusion"], x, recompute=config.recompute)
    maps, stages = [fused], []
    for blocks, old in zip(params["stages"], state["stages"]):
        y, new = maps[-1], []
        for block, statistics in zip(blocks, old):
            y, seen = remat.apply(through, block, statistics, y, recompute=config.recompute)
            new.append(seen)
        maps.append(y)
        stages.append(new)
    return maps, {"fusion": fusion, "stages": stages}


def _fuse(params: dict, state: dict, x: Tensor, *, config: Config, train: Train) -> tuple[Tensor, dict]:
    x, reduced = conv_norm.apply(params["reduce"], state["reduce"], x, train=train)
    newest, *older = x.split(config.group_width, 1)
    parts, scales = _hierarchy(params["scales"], state["scales"], [*reversed(older), newest], train=train)
    y, expanded = conv_norm.apply(params["expand"], state["expand"], torch.cat(parts, 1), train=train)
    return y, {"reduce": reduced, "scales": scales, "expand": expanded}


def _hierarchy(params: list, state: list, parts: list[Tensor], *, train: Train) -> tuple[list[Tensor], list]:
    """Every part but the last through its 3x3, the result of the one before added first; the last as it is."""
    *inner, last = parts
    outputs: list[Tensor] = []
    seen = []
    for layer, old, part in zip(params, state, inner, strict=True):
        y, new = conv_norm.apply(layer, old, part + outputs[-1] if outputs else part, train=train)
        outputs.append(y)
        seen.append(new)
    return [*outputs, last], seen


def _block(params: dict, state: dict, x: Tensor, *, train: Train) -> tuple[Tensor, dict]:
    """x [B C_in Y X] -> ([B C_out Y X], new state), of half the resolution where the block has a shortcut."""
    new: dict = {}
    y, new["reduce"] = conv_norm.apply(params["reduce"], state["reduce"], x, train=train)
    parts = list(y.chunk(len(params["scales"]) + 1, 1))
    if "shortcut" in params:
        *inner, last = parts
        layers = [
            conv_norm.apply(layer, old, part, train=train, stride=2)
            for layer, old, part in zip(params["scales"], state["scales"], inner, strict=True)
        ]
        parts, new["scales"] = [*(y for y, _ in layers), F.avg_pool2d(last, 3, 2, 1)], [seen for _, seen in layers]
        x = F.avg_pool2d(x, 2)
        x, new["shortcut"] = conv_norm.apply(params["shortcut"], state["shortcut"], x, train=train, relu=False)
    else:
        parts, new["scales"] = _hierarchy(params["scales"], state["scales"], parts, train=train)
    y, new["expand"] = conv_norm.apply(params["expand"], state["expand"], torch.cat(parts, 1), train=train, relu=False)
    return torch.relu(y + x), {name: new[name] for name in state}  # in the old order, which is part of a tree
