"""BEVNeXt's two-stage head (Li et al. 2024, arXiv 2312.01696): class heatmaps from the BEV map, box codes from
the map that camera features refine (`perspective.py`).

Both stages are CenterPoint heads that lack the other's branches; their tasks are merged for the losses and for decoding.
No gradient of the heatmaps' losses reaches the refinement, and the boxes' losses reach the BEV map only through its queries.
Source: BEVNeXt mmdet3d/models/detectors/bevnext.py and dense_heads/centerpoint_head_{proposal,reg}.py (behaviour); golden
cases bevnext_stage1 and bevnext_stage2.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bevfn import losses, tree
from bevfn.data.batch import Batch
from bevfn.distributed import Replicas, Train
from bevfn.heads import centerpoint, centerpoint_loss, perspective
from bevfn.layers import conv, conv_norm

TERMS = {"reg": "xy", "height": "z", "dim": "whl", "rot": "yaw", "vel": "vel"}  # the loss of each code map
COUNT_EPS = 1e-4  # what upstream adds to the number of a task's boxes


def published_head(velocity_weight: float = 0.2) -> centerpoint.Config:
    """Grid, tasks, losses and decoding of both stages; the second training stage has a velocity weight of 1."""
    return centerpoint.Config(
        heatmap_bias=None,  # upstream configures -2.19 but never applies it
        code_weights=(1.0,) * 8 + (velocity_weight,) * 2,
        nms=("rotated", "rotated", "rotated", "circle", "rotated", "rotated"),
        nms_thresholds=(0.2, 0.2, 0.2, 1.0, 0.2, 0.5),
        nms_rescale=(1.0, 0.7, 0.7, 0.4, 0.55, 1.0, 1.0, 1.0, 4.5, 9.0),
    )


@dataclass(frozen=True)
class Config:
    """The defaults are BEVNeXt's first training stage on nuScenes; the second has 160 channels."""

    head: centerpoint.Config = field(default_factory=published_head)
    """of both stages; its `channels_in` are the BEV map's"""
    channels: int = 80
    """C, of the camera features and the refined map"""
    depth_bins: int = 118
    attention_heads: int = 8
    heights_m: perspective.Bounds = (-5.0, 3.0, 1.0)
    """see `perspective.Config`"""

    def __post_init__(self) -> None:
        _ = self.refine  # which checks what it is made of

    @property
    def refine(self) -> perspective.Config:
        """The refinement over the heads' grid."""
        x_m, y_m = (
            (low, low + step * count, step)
            for low, step, count in zip(self.head.lower, self.head.cell, reversed(self.head.cells))
        )
        return perspective.Config(
            channels_in=self.head.channels_in,
            channels=self.channels,
            heads=self.attention_heads,
            x_m=x_m,
            y_m=y_m,
            heights_m=self.heights_m,
        )

    @property
    def bbox(self) -> centerpoint.Config:
        """The second stage's head."""
        return replace(self.head, channels_in=self.channels)


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state) of {"proposal", "depth_embedding", "refine", "bbox"}."""
    D, head = config.depth_bins, config.head
    return tree.unzip(
        {
            "proposal": {
                "shared": centerpoint.init_shared(head, generator),
                "tasks": [{"heatmap": centerpoint.init_heatmap(head, classes, generator)} for classes in head.tasks],
            },
            "depth_embedding": {
                "hidden": conv_norm.init(D, D, 1, bias=True, generator=generator),
                "out": conv.init(D, config.channels, 1, bias=True, generator=generator),
            },
            "refine": perspective.init(config.refine, generator),
            "bbox": {
                "shared": centerpoint.init_shared(config.bbox, generator),
                "tasks": [centerpoint.init_codes(config.bbox, generator) for _ in head.tasks],
            },
        }
    )


def apply(
    params: dict,
    state: dict,
    bev: Tensor,
    context: Tensor,
    depth: Tensor,
    batch: Batch,
    *,
    config: Config,
    image_size: tuple[int, int],
    train: Train,
) -> tuple[dict, dict]:
    """Both stages.

    Args:
        bev: [B C_in Y X] in the compute dtype.
        context: [B*N C H W], depth: [B*N D H W] probabilities, of the key frame; the depth gets no gradient.
        batch: whose key frame's calibration and 3D augmentation place the anchors.
        image_size: rows and columns of the network's images.

    Returns:
        outputs and new state: "proposal" and "bbox" (`centerpoint.apply`, heatmaps alone and codes alone),
        "depth_embedding" [B*N C H W], "refine" (`perspective.apply`) and "tasks", the maps of both per task.

    Raises ValueError if the map is not of the heads' cells, or the batch has no cameras.
    """
    proposal, proposal_state = centerpoint.apply(
        params["proposal"], state["proposal"], bev, config=config.head, train=train
    )
    embedding, embedding_state = _embed(
        params["depth_embedding"], state["depth_embedding"], depth.detach().to(bev.dtype), train=train
    )
    features = context.to(bev.dtype) + embedding
    refined, refine_state = perspective.apply(
        params["refine"],
        state["refine"],
        bev,
        features,
        batch,
        config=config.refine,
        image_size=image_size,
        train=train,
    )
    bbox, bbox_state = centerpoint.apply(params["bbox"], state["bbox"], refined["map"], config=config.bbox, train=train)
    outputs = {
        "proposal": proposal,
        "depth_embedding": embedding,
        "refine": refined,
        "bbox": bbox,
        "tasks": [{**heatmap, **codes} for heatmap, codes in zip(proposal["tasks"], bbox["tasks"], strict=True)],
    }
    new = {"proposal": proposal_state, "depth_embedding": embedding_state, "refine": refine_state, "bbox": bbox_state}
    return outputs, new


def _embed(params: dict, state: dict, depth: Tensor, *, train: Train) -> tuple[Tensor, dict]:
    """Probabilities [B*N D H W] -> [B*N C H W]."""
    x, hidden = conv_norm.apply(params["hidden"], state["hidden"], depth, train=train)
    return conv.apply(params["out"], x), {"hidden": hidden}


def each_map(ours: Tensor, theirs: Tensor, weight: Tensor, count: Tensor) -> dict[str, Tensor]:
    """`TERMS` of a task, 0-d: an L1 for each code map; operands as `centerpoint_loss.whole_code`."""
    split = [x.split(list(centerpoint.OUTPUTS.values()), -1) for x in (ours, theirs, weight)]
    return {
        name: losses.weighted_l1(part, wanted, share, count + COUNT_EPS)
        for name, part, wanted, share in zip(TERMS.values(), *split)
    }


def loss(
    outputs: dict,
    boxes: Tensor,
    labels: Tensor,
    valid: Tensor,
    *,
    config: Config,
    replicas: Replicas | None = None,
) -> tuple[Tensor, dict]:
    """CenterPoint's loss (`centerpoint_loss.loss`) of the merged tasks, with a loss for each code map: terms "task0/heatmap",
    "task0/xy", "task0/z", "task0/whl", "task0/yaw", "task0/vel", ..., and their sums.

    outputs: of `apply`.
    """
    return centerpoint_loss.loss(
        outputs["tasks"], boxes, labels, valid, config=config.head, replicas=replicas, code=each_map
    )


def decode(tasks: list[dict[str, Tensor]], config: Config) -> dict[str, Tensor]:
    """Detections from the merged tasks: see `centerpoint.decode`."""
    return centerpoint.decode(tasks, config.head)
