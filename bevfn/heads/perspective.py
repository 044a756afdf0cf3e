"""BEVNeXt's perspective refinement (Li et al. 2024, arXiv 2312.01696): every cell of the BEV map looks up
the key frame's camera features where the points above its centre appear in the images.

BEV maps are [B C Y X]: rows = y, columns = x; query q is the cell of row q // X and column q % X.
Source: BEVNeXt mmdet3d/models/necks/persepective_refinement.py (behaviour); golden cases bevnext_stage1 and _stage2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bevfn import geometry, tree
from bevfn.data.batch import Batch, needed
from bevfn.distributed import Train
from bevfn.layers import conv_norm, deform_attn, layer_norm, linear

Bounds = tuple[float, float, float]
EDGE = 1e-5  # an anchor counts from this share of the image inside its border, and from this depth (m)


@dataclass(frozen=True)
class Config:
    """The defaults are BEVNeXt's first stage on nuScenes. Bounds are (low, high, step) in m."""

    channels_in: int = 256
    """of the BEV map"""
    channels: int = 80
    """C, of the camera features and the refined map"""
    heads: int = 8
    ffn_expansion: int = 4
    x_m: Bounds = (-51.2, 51.2, 0.8)
    y_m: Bounds = (-51.2, 51.2, 0.8)
    heights_m: Bounds = (-5.0, 3.0, 1.0)
    """a query has one anchor, and one sampling point, at the middle of each step"""

    def __post_init__(self) -> None:
        if self.channels % (2 * self.heads):
            raise ValueError(f"channels {self.channels} must be a multiple of twice the {self.heads} heads")
        if self.anchors < 2 or self.anchors % 2:
            raise ValueError(f"heights_m {self.heights_m} must hold an even number of steps, not {self.anchors}")

    @property
    def anchors(self) -> int:
        """P, points above a cell."""
        return geometry.num_cells(self.heights_m)

    @property
    def cells(self) -> tuple[int, int]:
        """Y and X cells."""
        return geometry.num_cells(self.y_m), geometry.num_cells(self.x_m)


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state): every tensor of two or more axes Xavier uniform as published, the embeddings included."""
    C, (Y, X), inner = config.channels, config.cells, config.channels * config.ffn_expansion

    def dense(*shape: int) -> Tensor:
        return linear.xavier(*shape, generator=generator)

    def layer(c_in: int, c_out: int) -> dict:
        return {**linear.init(c_in, c_out, bias=True, generator=generator), "weight": dense(c_out, c_in)}

    return tree.unzip(
        {
            "embedding": dense(Y * X, C),
            "rows": dense(Y, C // 2),
            "columns": dense(X, C // 2),
            "shared": conv_norm.with_norm({"weight": dense(C, config.channels_in, 3, 3)}, C),
            "attention": deform_attn.init(C, heads=config.heads, points=config.anchors, generator=generator),
            "ffn": {"fc1": layer(C, inner), "fc2": layer(inner, C)},
            "norms": [layer_norm.init(C) for _ in range(2)],
        }
    )


def apply(
    params: dict,
    state: dict,
    bev: Tensor,
    features: Tensor,
    batch: Batch,
    *,
    config: Config,
    image_size: tuple[int, int],
    train: Train,
) -> tuple[dict, dict]:
    """Refines a BEV map with the camera features that its cells see.

    Args:
        bev: [B C_in Y X] in the compute dtype.
        features: [B*N C H W], the key frame's.
        batch: whose key frame's calibration and 3D augmentation place the anchors.
        image_size: rows and columns of the network's images.

    Returns:
        outputs and the new state. "features" as given; "shared" [B C Y X]; "query" [B Q C]; "position" [1 Q C];
        "reference" [B N Q P 2] and "mask" [B N Q P] (`anchors`); "attention", "norm0", "ffn", "out" [B Q C], the
        decoder layer's sums and norms; "map" [B C Y X], which is "out" as a map.

    Raises ValueError if the map is not of `config.cells`, or the batch has no cameras.
    """
    if tuple(bev.shape[2:]) != config.cells:
        raise ValueError(f"BEV map is {tuple(bev.shape[2:])} cells, x_m and y_m of the refinement hold {config.cells}")
    shared, shared_state = conv_norm.apply(params["shared"], state["shared"], bev, train=train)
    query = params["embedding"].to(shared.dtype) + shared.flatten(2).transpose(1, 2)  # B Q C
    places = position(params).to(query.dtype)
    reference, mask = anchors(batch, config, image_size)
    seen = mask.float().sum(-1) > 0  # B N Q; sums, since Ascend reduces no booleans
    looked_up = deform_attn.apply(
        params["attention"],
        query + places,
        features,
        reference.flatten(0, 1),
        seen.flatten(0, 1),
        heads=config.heads,
    )
    settled = settle(params, query + looked_up)
    outputs = {
        "features": features,
        "shared": shared,
        "query": query,
        "position": places,
        "reference": reference,
        "mask": mask,
        **settled,
        "map": settled["out"].transpose(1, 2).reshape(shared.shape),
    }
    return outputs, {"shared": shared_state}


def settle(params: dict, attention: Tensor) -> dict[str, Tensor]:
    """The decoder layer behind its attention, which has the query in it: {"attention", "norm0", "ffn", "out"} [B Q C]."""
    norm0 = layer_norm.apply(params["norms"][0], attention)
    ffn = norm0 + linear.apply(params["ffn"]["fc2"], torch.relu(linear.apply(params["ffn"]["fc1"], norm0)))
    return {"attention": attention, "norm0": norm0, "ffn": ffn, "out": layer_norm.apply(params["norms"][1], ffn)}


def position(params: dict) -> Tensor:
    """What tells the cells apart, [1 Q C]: the column's embedding, then the row's."""
    rows, columns = params["rows"], params["columns"]
    Y, X = len(rows), len(columns)
    both = [columns[None].expand(Y, -1, -1), rows[:, None].expand(-1, X, -1)]
    return torch.cat(both, -1).reshape(1, Y * X, -1)


def anchors(batch: Batch, config: Config, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where the points above the cells' centres appear in the key frame's images, float32 whatever the compute dtype.

    Returns:
        [B N Q P 2]: x and y, where 0 and 1 are the image's borders, far outside (up to 1e10) for points behind a camera;
        [B N Q P] bool: whether the point is in front of the camera and inside its image.
    """
    device = batch.base_aug.device
    axes = [geometry.cell_centres(bounds, device) for bounds in (config.y_m, config.x_m, config.heights_m)]
    y, x, z = torch.meshgrid(*axes, indexing="ij")  # Y X P
    points = torch.stack([x, y, z], -1).view(1, -1, 3).expand(len(batch.base_aug), -1, -1)
    u, v, depth = geometry.project(
        points,
        undo_base_aug=batch.undo_base_aug,
        base_aug=batch.base_aug,
        image_from_base=needed(batch.image_from_base, "image_from_base")[:, 0],
        image_aug=needed(batch.image_aug, "image_aug")[:, 0],
    )  # B N Q*P
    # Tensors, because CUDA divides by a Python number through its reciprocal.
    x, y = (place / place.new_full((), float(size)) for place, size in ((u, image_size[1]), (v, image_size[0])))
    inside = (x > EDGE) & (x < 1 - EDGE) & (y > EDGE) & (y < 1 - EDGE) & (depth > EDGE)
    form = (*u.shape[:2], -1, config.anchors)
    return torch.stack([x, y], -1).view(*form, 2), inside.view(form)
