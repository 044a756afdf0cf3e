"""BEVFusion's sparse encoder: voxels to a BEV map through residual sparse 3-D convolutions.

Every level has a fixed capacity of active sites per sample; what does not fit is counted in `overflow`.
Source: mmdetection3d projects/BEVFusion/bevfusion/sparse_encoder.py (behaviour); SECOND (Yan et al. 2018).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bevfn import tree
from bevfn.distributed import Train
from bevfn.kernels import neighbours
from bevfn.kernels.sparse_conv import Tiles, tiles
from bevfn.layers import batch_norm, remat, sparse_conv

KERNEL = (3, 3, 3)
OUT = {"kernel": (1, 1, 3), "stride": (1, 1, 2), "padding": (0, 0, 0)}  # conv_out: half the height


@dataclass(frozen=True)
class Config:
    channels_in: int = 5
    channels: tuple[int, ...] = (16, 32, 64, 128)
    """width of each level; the last one's convolutions keep their resolution"""
    channels_out: int = 128
    blocks: int = 2
    """residual blocks of a level"""
    paddings: tuple[tuple[int, int, int], ...] = ((1, 1, 1), (1, 1, 1), (1, 1, 0))
    """padding (x, y, z) of the stride-2 convolutions between levels"""
    capacities: tuple[int, ...] = (200_000, 150_000, 80_000, 64_800)
    """active sites per sample after each stride-2 convolution and after conv_out"""
    norm_eps: float = 1e-3
    norm_momentum: float = 0.01
    recompute: bool = False
    """every residual block once more for the gradient, see `layers.remat`"""

    def __post_init__(self) -> None:
        levels = len(self.channels)
        if len(self.paddings) != levels - 1 or len(self.capacities) != levels:
            raise ValueError(
                f"sparse encoder with {levels} channels needs {levels - 1} paddings and {levels} capacities "
                f"(one per stride-2 convolution, and conv_out), got {len(self.paddings)} and {len(self.capacities)}"
            )


@tree.register
@dataclass(frozen=True)
class Tables:
    """Which rows the convolutions read: of the voxels' cells alone, so that whoever reads them can make it. Rows of a level
    are B times its capacity, those of level 0 the voxels' slots."""

    submanifold: list[Tensor]
    """per level [27 rows] int32, see `neighbours.submanifold`"""
    strided: list[dict[str, Tensor]]
    """per stride-2 convolution, and conv_out: "sites" [W 4] int32 (b, x, y, z), "active" [W] bool, "table" [K W] and
    "inverse" [K V] int32, "found" [] int32, see `neighbours.strided`"""


def output_grid(config: Config, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """(X, Y, Z) of the BEV map for voxels in `grid`."""
    for way in ways(config):
        grid = neighbours.out_grid(grid, **way)
    return grid


def ways(config: Config) -> list[dict]:
    """Kernel, stride and padding of the convolutions between levels, and of conv_out."""
    return [*({"kernel": KERNEL, "stride": (2, 2, 2), "padding": padding} for padding in config.paddings), OUT]


def tables(coords: Tensor, valid: Tensor, *, config: Config, grid: tuple[int, int, int]) -> Tables:
    """The tables of voxels as `apply` takes them: coords [B V 3] int32, valid [B V] bool."""
    B = coords.shape[0]
    sites, active = _sites(coords), valid.flatten()
    made = Tables([], [])
    for way, capacity in zip(ways(config), config.capacities):
        made.submanifold.append(neighbours.submanifold(sites, active, kernel=KERNEL, grid=grid, batch=B))
        room = B * capacity
        names = ("sites", "active", "table", "inverse", "found")
        found = neighbours.strided(sites, active, **way, grid=grid, capacity=room, batch=B)
        made.strided.append(dict(zip(names, found)))
        sites, active, *_ = found
        grid = neighbours.out_grid(grid, **way)
    return made


def _sites(coords: Tensor) -> Tensor:
    """Cells [B V 3] -> rows [B*V 4] (b, x, y, z)."""
    B, V, _ = coords.shape
    sample = torch.arange(B, dtype=torch.int32, device=coords.device)[:, None, None].expand(-1, V, 1)
    return torch.cat([sample, coords], dim=2).flatten(0, 1)


def _check(tables: Tables, config: Config, B: int, V: int) -> None:
    """Raises ValueError where tables are not of so many samples and voxels, and of the config's capacities; free in a graph."""
    rows, levels = [B * room for room in (V, *config.capacities)], len(config.capacities)
    if (len(tables.submanifold), len(tables.strided)) != (levels, levels):
        raise ValueError(
            f"the batch's tables of the sparse encoder are of {len(tables.submanifold)} levels (submanifold) and "
            f"{len(tables.strided)} (strided), the model's of {levels}; make tables by the config that is run"
        )
    for level, (way, below, above) in enumerate(zip(ways(config), rows, rows[1:])):
        K = math.prod(way["kernel"])
        wanted = {
            **{"submanifold": [math.prod(KERNEL), below], "table": [K, above], "inverse": [K, below]},
            **{"sites": [above, 4], "active": [above], "found": []},
        }
        given = {"submanifold": tables.submanifold[level], **tables.strided[level]}
        for name, shape in wanted.items():
            found = list(given[name].shape) if name in given else "missing"
            if found != shape:
                raise ValueError(
                    f"the batch's {name} table of the sparse encoder's level {level} is {found}, the model's is "
                    f"{shape} ({B} samples, {V} voxels, capacities {config.capacities}); make tables by the config that is run"
                )


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state): conv_input, stages[level]{blocks, down}, conv_out."""
    made: dict = {
        "conv_input": sparse_conv.init(config.channels_in, config.channels[0], KERNEL, generator),
        "stages": [],
    }
    for level, width in enumerate(config.channels):
        stage: dict = {"blocks": [_init_block(width, generator) for _ in range(config.blocks)]}
        if level + 1 < len(config.channels):
            stage["down"] = sparse_conv.init(width, config.channels[level + 1], KERNEL, generator)
        made["stages"].append(stage)
    made["conv_out"] = sparse_conv.init(config.channels[-1], config.channels_out, OUT["kernel"], generator)
    return tree.unzip(made)


def _init_block(width: int, generator: torch.Generator) -> tuple[dict, dict]:
    return tree.unzip(
        {
            "conv1": sparse_conv.init_weight(width, width, KERNEL, generator),
            "norm1": batch_norm.init(width),
            "conv2": sparse_conv.init_weight(width, width, KERNEL, generator),
            "norm2": batch_norm.init(width),
        }
    )


def apply(
    params: dict,
    state: dict,
    features: Tensor,
    coords: Tensor,
    valid: Tensor,
    *,
    config: Config,
    grid: tuple[int, int, int],
    train: Train,
    given: Tables | None = None,
) -> tuple[dict, dict]:
    """Encodes voxels.

    Args:
        features: [B V C_in] in the compute dtype; coords: [B V 3] int32 (x, y, z) cells of `grid`; valid: [B V] bool.
        grid: cells (X, Y, Z) of the voxel grid; the published one has one more in z than the voxelizer (41 for 40).
        given: the `tables` of these voxels; None: they are made here.

    Returns:
        outputs: "bev" [B C_out*Z X Y], channel = c * Z + z, rows = x, columns = y; "conv_input", "stages" (a list)
        and "conv_out", each {"features" [W C], "coords" [W 4] (b, x, y, z), "valid" [W]}; "overflow": {level: sites
        that did not fit}; and the new state.

    Raises ValueError if the tables that are given do not fit voxels and config.
    """
    B, V = coords.shape[:2]
    if given is None:
        given = tables(coords, valid, config=config, grid=grid)
    else:
        _check(given, config, B, V)
    norm = {"train": train, "momentum": config.norm_momentum, "eps": config.norm_eps}
    x = features.flatten(0, 1)  # V C, V = B * voxels per sample
    sites, active, table = _sites(coords), valid.flatten(), given.submanifold[0]  # V 4, V, K V
    shared = tiles(table, table.flip(0))  # by the convolutions of a level
    x, new_input = sparse_conv.apply(
        params["conv_input"], state["conv_input"], x, table, table.flip(0), active, shared, **norm
    )
    outputs: dict = {"conv_input": {"features": x, "coords": sites, "valid": active}, "stages": [], "overflow": {}}
    stages = []
    for level, (stage, old) in enumerate(zip(params["stages"], state["stages"])):
        new: dict = {"blocks": []}
        for block, statistics in zip(stage["blocks"], old["blocks"]):
            through = partial(_block, norm=norm)
            x, seen = remat.apply(through, block, statistics, x, table, active, shared, recompute=config.recompute)
            new["blocks"].append(seen)
        if "down" in stage:
            way = given.strided[level]
            sites, active, table = way["sites"], way["active"], given.submanifold[level + 1]
            x, new["down"] = _down(stage["down"], old["down"], x, way, **norm)
            shared = tiles(table, table.flip(0))
            outputs["overflow"][f"voxels_l{level + 1}"] = _lost(way)
        outputs["stages"].append({"features": x, "coords": sites, "valid": active})
        stages.append(new)
    way = given.strided[-1]
    sites, active = way["sites"], way["active"]
    x, new_out = _down(params["conv_out"], state["conv_out"], x, way, **norm)
    outputs["conv_out"] = {"features": x, "coords": sites, "valid": active}
    outputs["overflow"]["voxels_out"] = _lost(way)
    outputs["bev"] = to_bev(x, sites, active, B, output_grid(config, grid))
    return outputs, {"conv_input": new_input, "stages": stages, "conv_out": new_out}


def _down(params: dict, state: dict, x: Tensor, way: dict[str, Tensor], **norm: Any) -> tuple[Tensor, dict]:
    """The convolution from one level's sites to the next one's."""
    table, inverse = way["table"], way["inverse"]
    return sparse_conv.apply(params, state, x, table, inverse, way["active"], tiles(table, inverse), **norm)


def _lost(way: dict[str, Tensor]) -> Tensor:
    """Sites that did not fit, 0-d."""
    return (way["found"] - way["active"].shape[0]).clamp(min=0)


def _block(
    params: dict, state: dict, x: Tensor, table: Tensor, active: Tensor, shared: Tiles, *, norm: dict
) -> tuple[Tensor, dict]:
    """relu(norm(conv(relu(norm(conv(x))))) + x), x [V C] on the sites of a submanifold table [K V]."""
    inverse = table.flip(0)  # offset k seen from the other end is offset K-1-k
    y = sparse_conv.convolve(params["conv1"], x, table, inverse, shared)
    y, norm1 = batch_norm.apply(params["norm1"], state["norm1"], y, valid=active, relu=True, **norm)
    y = sparse_conv.convolve(params["conv2"], y, table, inverse, shared)
    y, norm2 = batch_norm.apply(params["norm2"], state["norm2"], y, valid=active, **norm)
    return torch.relu(y + x), {"norm1": norm1, "norm2": norm2}


def to_bev(x: Tensor, sites: Tensor, active: Tensor, B: int, grid: tuple[int, int, int]) -> Tensor:
    """Rows [W C] at sites [W 4] (b, x, y, z) -> dense map [B C*Z X Y], zero elsewhere; memory is B X Y (C Z)."""
    X, Y, Z = grid
    b, ix, iy, iz = sites.long().unbind(1)
    cell = ((b * X + ix) * Y + iy) * Z + iz  # W
    cell = torch.where(active, cell, B * X * Y * Z)  # one more row takes what is padding (zeros)
    dense = x.new_zeros(B * X * Y * Z + 1, x.shape[1]).index_add(0, cell, x)[:-1]
    dense = dense.view(B, X, Y, Z, -1).transpose(3, 4)  # B X Y C Z: the published channel order is c * Z + z
    return dense.reshape(B, X, Y, -1).permute(0, 3, 1, 2)
