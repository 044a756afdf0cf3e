"""Masked voxels: BEVFusion's LiDAR branch learns, without labels, where the voxels are that it is not shown.

Occupancy prediction as in Occupancy-MAE (Min et al. 2022, arXiv 2206.09900): voxels are hidden at random, more of them near
the LiDAR, and a decoder tells from the others where the hidden ones are. Telling empty space from what is masked is also one of
the three losses of Voxel-MAE (Hess et al. 2022, arXiv 2207.00531). Precisely, for every sample:

1. A voxel whose centre is r metres (in x and y) from the origin is hidden with probability `ratios[i]`, independently of the
   others, where `edges` part r into bands. Hidden voxels are none to the sparse encoder: neither features nor sites.
2. What the encoder makes of the others goes through the layers of the BEV map, as in the detector, and then through a decoder: a
   3 x 3 convolution with norm and ReLU, and a 1 x 1 convolution to logits. Every BEV cell is parted into `split` x `split`
   columns, each into bins of `height` voxels: these are the cells of the target.
3. A target cell is *seen* if a voxel in it is not hidden, *hidden* if it has voxels and all are hidden, else *empty*.
4. loss = sum over hidden (target 1) and empty cells (target 0) of the focal loss (Lin et al. 2017, alpha 0.25, gamma 2) of the
   logits, over the number of hidden cells (at least 1). Seen cells do not count: to repeat what is shown teaches nothing.

What differs from Occupancy-MAE: there the targets are all voxels at the input's resolution, also the seen ones, the decoder is
three transposed 3-D convolutions behind the encoder alone, and the loss is the plain cross-entropy. Here the decoder stands
behind the BEV layers, so that they learn too, is as cheap as two layers of them, and the focal loss balances a hidden cell
against a hundred empty ones. As there, a cell that the LiDAR could not see counts as empty.

Its parameters are the detector's "lidar" and "bev", by the same names and shapes, and "pretext", which is the decoder.

    config = masked_voxels.Config(bevfusion.lidar_only())
    params, state = masked_voxels.init(config, seed=0)
    total, (state, metrics) = masked_voxels.loss(params, state, batch, key, config=config)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bevfn import losses, rng, tree
from bevfn.backbones import sparse_encoder
from bevfn.catalogue import PRETEXT
from bevfn.data.batch import Base, Batch, check_base, needed
from bevfn.data.reading import Needs
from bevfn.distributed import Train
from bevfn.layers import conv, conv_norm
from bevfn.models import bevfusion
from bevfn.precision import Policy

PRIOR = 0.01  # what an untrained decoder says of every cell, as RetinaNet's: else empty cells drown the first steps
BINS = 200  # of predicted probabilities, when they are scored
# Seed of what is hidden in an evaluation: the same voxels of every key frame, whatever is in the batch with it.
EVALUATED = 0


@dataclass(frozen=True)
class Config:
    detector: bevfusion.Config = field(default_factory=bevfusion.lidar_only)
    """whose LiDAR branch and BEV layers learn; cameras, fuser and head are left out"""
    ratios: tuple[float, ...] = (0.9, 0.7, 0.5)
    """share of voxels that is hidden in each band of distance (Occupancy-MAE's)"""
    edges: tuple[float, ...] = (30.0, 50.0)
    """m, between the bands"""
    split: int = 2
    """target cells along each side of a BEV cell"""
    height: int = 2
    """voxels of a target cell in z; the last cell may have fewer"""
    channels: int = 64
    """of the decoder"""

    def __post_init__(self) -> None:
        if self.detector.lidar is None:
            raise ValueError("masked voxels teach a LiDAR branch, which the detector has not; give one with lidar")
        if len(self.ratios) != len(self.edges) + 1 or list(self.edges) != sorted(set(self.edges)):
            raise ValueError(f"ratios {self.ratios} need one edge less, rising, between their bands, not {self.edges}")
        if not all(0 < ratio < 1 for ratio in self.ratios):
            raise ValueError(
                f"ratios {self.ratios} must be above 0 and below 1: something is hidden and something seen"
            )
        if self.split < 1 or self.height < 1 or self.stride % self.split:
            raise ValueError(
                f"split {self.split} must divide the {self.stride} voxels along a BEV cell, and height {self.height} be 1 or more"
            )

    @property
    def stride(self) -> int:
        """Voxels along a BEV cell."""
        return self.detector.head.stride

    @property
    def cells(self) -> tuple[int, int, int]:
        """X, Y, Z of the target."""
        (X, Y), (_, _, Z) = self.detector.head.cells, self.detector.voxels.grid
        return X * self.split, Y * self.split, -(-Z // self.height)


def init(config: Config, seed: int) -> tuple[dict, dict]:
    """(params, state): the detector's "lidar" and "bev" (where it has one) as `bevfusion.init` has them, and the decoder."""
    detector = config.detector
    assert detector.lidar is not None
    ours = {"lidar", "bev"}
    params, state = ({n: x for n, x in part.items() if n in ours} for part in bevfusion.init(detector, seed))
    generator = torch.Generator().manual_seed(seed)
    width = detector.head.channels_in
    if detector.neck is None:
        width = (
            detector.lidar.encoder.channels_out
            * sparse_encoder.output_grid(detector.lidar.encoder, detector.sparse_grid)[2]
        )
    logits = conv.init(config.channels, config.split**2 * config.cells[2], 1, bias=True, generator=generator)
    logits["bias"].fill_(-float(np.log(1 / PRIOR - 1)))
    decoder = {"hidden": conv_norm.init(width, config.channels, 3, generator=generator), "logits": logits}
    params[PRETEXT], state[PRETEXT] = tree.unzip(decoder)
    return params, state


def needs(config: Config) -> Needs:
    """Points alone: no boxes, no classes."""
    return Needs(model="masked voxels", base=Base.LIDAR, classes=0, points=True, boxes=False)


def apply(
    params: dict,
    state: dict,
    batch: Batch,
    *,
    config: Config,
    train: Train,
    policy: Policy = Policy(),  # noqa: B008
    key: Tensor,
    alike: bool = False,
) -> tuple[dict, dict]:
    """Hides voxels and predicts where they are.

    key: what is hidden. alike: by the voxels' places in their sample alone, not by the sample's in the batch.

    Returns:
        outputs "voxels" (the shown ones: as `bevfusion.voxelise` makes them, hidden ones being empty slots), "lidar", "bev"
        (where the detector has one), "logits" [B X Y Z] of the target cells, "hidden" and "empty" [B X Y Z] bool; "overflow"; and
        the new state.
    """
    check_base(batch, Base.LIDAR, "masked voxels")
    detector = config.detector
    points, valid = needed(batch.points, "points"), needed(batch.points_valid, "points_valid")
    voxels, overflow = bevfusion.voxelise(points, valid, detector.voxels, train=train)
    shown, hidden = mask(voxels, config, key, alike=alike)
    new: dict = {}
    sparse, new["lidar"] = bevfusion.encode(params["lidar"], state["lidar"], shown, detector, train, policy)
    outputs: dict = {"voxels": shown, "overflow": overflow | sparse.pop("overflow"), "lidar": sparse}
    x = sparse["bev"]
    if "bev" in params:
        outputs["bev"], new["bev"] = bevfusion.bev_layers(params["bev"], state["bev"], x, detector, train)
        x = outputs["bev"]["neck"]
    decoder, old = params[PRETEXT], state[PRETEXT]
    x, hidden_state = conv_norm.apply(decoder["hidden"], old["hidden"], x, train=train)
    new[PRETEXT] = {**old, "hidden": hidden_state}
    seen = occupied(voxels["coords"], (voxels["count"] > 0) & ~hidden, config)
    any_at_all = occupied(voxels["coords"], voxels["count"] > 0, config)
    logits = unfolded(conv.apply(decoder["logits"], x), config)
    return outputs | {"logits": logits, "hidden": any_at_all & ~seen, "empty": ~any_at_all}, new


def mask(voxels: dict, config: Config, key: Tensor, *, alike: bool = False) -> tuple[dict, Tensor]:
    """(the voxels with hidden ones as empty slots, which are hidden: [B V] bool), see the module's docstring."""
    coords, lower, size = voxels["coords"], config.detector.voxels.lower, config.detector.voxels.size
    B, V = coords.shape[:2]
    x, y = (lower[a] + (coords[..., a].float() + 0.5) * size[a] for a in range(2))  # B V, m
    distance = (x.square() + y.square()).sqrt()
    ratio = torch.full_like(distance, config.ratios[0])
    for edge, beyond in zip(config.edges, config.ratios[1:]):
        ratio = torch.where(distance >= edge, beyond, ratio)
    drawn = rng.uniform(key, (1, V)).expand(B, V) if alike else rng.uniform(key, (B, V))
    hidden = (drawn < ratio) & (voxels["count"] > 0)
    shown = {
        "features": torch.where(hidden[..., None], 0.0, voxels["features"]),
        "coords": torch.where(hidden[..., None], -1, coords),
        "count": torch.where(hidden, 0, voxels["count"]),
    }
    return shown, hidden


def occupied(coords: Tensor, counted: Tensor, config: Config) -> Tensor:
    """[B X Y Z] bool: the target cells with a voxel that counts; coords [B V 3] int32, counted [B V] bool."""
    B = len(coords)
    X, Y, Z = config.cells
    side = config.stride // config.split
    x, y, z = coords.long().unbind(-1)
    sample = torch.arange(B, device=coords.device)[:, None]
    # Those beyond what the encoder keeps of the grid, and empty slots, go to one more cell.
    inside = counted & (x < X * side) & (y < Y * side)
    cell = ((sample * X + x // side) * Y + y // side) * Z + z // config.height
    cell = torch.where(inside, cell, B * X * Y * Z).flatten()
    found = torch.zeros(B * X * Y * Z + 1, device=coords.device).index_add(0, cell, inside.flatten().float())
    return found[:-1].view(B, X, Y, Z) > 0


def unfolded(maps: Tensor, config: Config) -> Tensor:
    """Channels of BEV cells [B split*split*Z X/split Y/split] as target cells [B X Y Z]."""
    B, _, rows, columns = maps.shape
    X, Y, Z = config.cells
    parts = maps.view(B, config.split, config.split, Z, rows, columns)
    return parts.permute(0, 4, 1, 5, 2, 3).reshape(B, X, Y, Z)


def loss(
    params: dict,
    state: dict,
    batch: Batch,
    key: Tensor,
    *,
    config: Config,
    policy: Policy = Policy(),  # noqa: B008
    train: Train = True,
) -> tuple[Tensor, tuple[dict, dict]]:
    """The loss of the module's docstring, in the form that `train.make_step` takes once config, policy and train are bound.

    Returns:
        total (0-d float32) and (new state, metrics: "loss/total", "num_pos" hidden cells, "overflow/*").
    """
    outputs, new = apply(params, state, batch, config=config, train=train, policy=policy, key=key)
    hidden = outputs["hidden"]
    target, counted = hidden.float(), hidden | outputs["empty"]
    total = losses.sigmoid_focal(outputs["logits"], target, losses.positives(target, train), counted=counted)
    metrics = {"loss/total": total.detach(), "num_pos": target.sum()}
    return total, (new, metrics | bevfusion.overflow(outputs))


def predict(
    params: dict,
    state: dict,
    batch: Batch,
    *,
    config: Config,
    policy: Policy = Policy(),  # noqa: B008
) -> dict[str, Tensor]:
    """How often which probability is given to hidden and to empty cells, [B BINS] each, in evaluation mode; and what did not fit:
    "overflow/*" (0-d). What `score` takes."""
    key = rng.key(EVALUATED).to(batch.base_aug.device)
    outputs, _ = apply(params, state, batch, config=config, train=False, policy=policy, key=key, alike=True)
    B = len(outputs["logits"])
    p = torch.sigmoid(outputs["logits"].float()).flatten(1)  # B cells
    place = (p * BINS).long().clamp(max=BINS - 1) + BINS * torch.arange(B, device=p.device)[:, None]

    def histogram(cells: Tensor) -> Tensor:
        counts = torch.zeros(B * BINS, device=p.device).index_add(0, place.flatten(), cells.flatten().float())
        return counts.view(B, BINS)

    return {name: histogram(outputs[name]) for name in ("hidden", "empty")} | bevfusion.overflow(outputs)


def score(rows: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of `predict`'s histograms of all key frames [frames BINS], all cells together: "AP" of telling hidden from empty cells by
    their probability (area under the precision over recall, step by step), "chance AP", which is the share of hidden ones, and
    "IoU" of predicted and hidden cells at the probability where it is highest."""
    hidden, empty = (np.cumsum(rows[name].sum(0, dtype=np.float64)[::-1]) for name in ("hidden", "empty"))
    found, chosen = hidden, hidden + empty  # among the cells of that probability or more
    if not found[-1]:
        return dict.fromkeys(("AP", "chance AP", "IoU"), float("nan"))
    recall, precision = found / found[-1], found / np.maximum(chosen, 1)
    iou = found / (found[-1] + empty)
    return {
        "AP": float(np.sum(np.diff(recall, prepend=0.0) * precision)),
        "chance AP": float(found[-1] / chosen[-1]),
        "IoU": float(iou.max()),
    }
