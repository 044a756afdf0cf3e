"""MatrixVT's view transform (Zhou et al. 2022, arXiv 2211.10593): image columns to BEV cells by two matrix products.

Image rows are reduced away first ("prime extraction"): the depth by a learned weight per pixel, the feature by a
maximum and 1-D convolutions along the row. What is left is one feature and one depth distribution per ray (camera and
column), and two 0/1 matrices say where they go:

    ring [D S]: bin d of any ray falls into cell s          ray [R S]: any bin of ray r falls into cell s
    bev[c, s] = sum_r feature[r, c] ray[r, s] sum_d depth[r, d] ring[d, s]

The matrices are built in the graph, from the calibration alone and without a gradient: training augments images and
BEV, so that every sample has its own, and 24 MB a sample would be a poor thing to load and copy. A fixed rig can build
them once (`matrices`) and give them to `apply`.

Source: BEVDepth bevdepth/layers/backbones/matrixvt.py; golden case matrixvt_r50. All in float32, as there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bevfn import geometry, tree
from bevfn.data.batch import Batch
from bevfn.distributed import Train
from bevfn.layers import branch, conv, conv_norm
from bevfn.views import camera_grid

ROW = (1, 3)  # kernel of a 1-D convolution along the image rows


@dataclass(frozen=True)
class Config:
    """The defaults are MatrixVT's."""

    context: int = 80
    channels: int = 512
    """of the 1-D convolutions"""
    blocks: int = 2


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state) with torch's default initialisation."""
    C, width = config.context, config.channels
    return tree.unzip(
        {
            "rows": branch.init(C, 1, bias=True, generator=generator),
            "merge": [conv.init(C, C, 1, bias=True, generator=generator) for _ in range(2)],
            "reduce": conv_norm.init(C, width, ROW, generator=generator),
            "blocks": [
                [conv_norm.init(width, width, ROW, generator=generator) for _ in range(2)] for _ in range(config.blocks)
            ],
            "out": conv_norm.init(width, C, ROW, bias=True, generator=generator),
        }
    )


def apply(
    params: dict,
    state: dict,
    depth: Tensor,
    context: Tensor,
    places: tuple[Tensor, Tensor],
    *,
    grid: camera_grid.Config,
    train: Train,
) -> tuple[dict[str, Tensor], dict]:
    """Depth and context of one frame's images to its BEV map.

    Args:
        depth: [B*N D H W] float32, softmax over D; context: [B*N C H W] float32.
        places: ring [B D Y*X] and ray [B N*W Y*X], see `matrices`.

    Returns:
        outputs "row_logits" [B*N 1 H W], "depth_reduced" [B*N D W], "merged" [B*N C H W], "reduced" [B*N channels W],
        "feature" [B*N C W] and "bev" [B C Y X]; and the new state.
    """
    ring, ray = places
    new: dict = {}
    logits, new["rows"] = branch.apply(params["rows"], state["rows"], context, train=train)  # B*N 1 H W
    out = {"row_logits": logits, "depth_reduced": (depth * torch.softmax(logits, 2)).sum(2)}
    merged = conv.apply(params["merge"][1], torch.sigmoid(conv.apply(params["merge"][0], context)))
    out["merged"] = merged
    x = merged.max(2)[0][:, :, None]  # B*N C 1 W
    x, new["reduce"] = conv_norm.apply(params["reduce"], state["reduce"], x, train=train)
    out["reduced"], new["blocks"] = x[:, :, 0], []
    for block, statistics in zip(params["blocks"], state["blocks"]):
        y, seen = conv_norm.chain(block, statistics, x, train=train)
        x = y + x  # no ReLU behind the sum
        new["blocks"].append(seen)
    x, new["out"] = conv_norm.apply(params["out"], state["out"], x, train=train)
    out["feature"] = x[:, :, 0]  # B*N C W
    B = len(ring)
    by_ray = _rays(out["depth_reduced"], B)  # B R D
    weight = torch.bmm(by_ray, ring) * ray  # B R S
    bev = torch.bmm(_rays(out["feature"], B).transpose(1, 2), weight)  # B C S
    out["bev"] = bev.view(B, -1, *grid.cells)
    return out, new


def _rays(x: Tensor, B: int) -> Tensor:
    """[B*N K W] -> [B N*W K], camera by camera, then column by column."""
    M, K, W = x.shape
    return x.transpose(1, 2).reshape(B, M // B * W, K)


# ----------------------------------------------------------------------------------------------------- the matrices


def ray_points(batch: Batch, frame: int, grid: camera_grid.Config) -> geometry.Planes:
    """One point per ray and depth bin, the mean over the image rows: x, y, z in cells from the grid's lower corner,
    each [B R D], R = N*W."""
    planes = []
    point = camera_grid.frustum_points(batch, frame, grid)  # B N D H W
    for coordinate, bounds in zip(point, (grid.x_m, grid.y_m, grid.z_m)):
        place = geometry.in_cells(coordinate, bounds)
        place = place.expand(*place.shape[:2], grid.depth_bins, *grid.feature_size).mean(3)  # B N D W
        planes.append(place.transpose(2, 3).flatten(1, 2))
    x, y, z = planes
    return x, y, z


def ray_cells(batch: Batch, frame: int, grid: camera_grid.Config) -> Tensor:
    """The cell of every ray's depth bin, int64 [B R D], row * columns + column.

    The height does not matter. Points outside go to the cell in the middle of the map, which `matrices` then empties:
    upstream loses that cell, and so do we.
    """
    rows, columns = grid.cells
    places = grid.ordered(ray_points(batch, frame, grid))[:2]
    row, column = ((p if grid.truncate_toward_zero else p.floor()).to(torch.int64) for p in places)
    inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    return torch.where(inside, row * columns + column, _lost(grid))


def matrices(cell: Tensor, grid: camera_grid.Config) -> tuple[Tensor, Tensor]:
    """ring [B D S] and ray [B R S] float32 of 0 and 1 (S = Y*X) from `ray_cells` [B R D]."""
    S = grid.cells[0] * grid.cells[1]
    keep = (torch.arange(S, device=cell.device) != _lost(grid)).float()
    return _marked(cell.transpose(1, 2), S) * keep, _marked(cell, S) * keep


def _marked(cell: Tensor, cells: int) -> Tensor:
    """[B N cells] float32, 1 in row n where one of cell [B N M] is. Counted: Ascend's AI Core adds by index, it does not
    scatter."""
    rows = torch.arange(cell.shape[0] * cell.shape[1], device=cell.device).view(*cell.shape[:2], 1) * cells
    index = (cell + rows).reshape(-1)
    count = torch.zeros(rows.numel() * cells, device=cell.device).index_add(
        0, index, torch.ones(len(index), device=cell.device)
    )
    return count.clamp(max=1.0).view(*cell.shape[:2], cells)


def _lost(grid: camera_grid.Config) -> int:
    rows, columns = grid.cells
    return rows // 2 * columns + columns // 2
