"""CenterPoint's head (Yin et al. 2021, arXiv 2006.11275) as BEVDepth uses it: per task a class heatmap and dense maps of
box codes, decoded at the heatmap's highest cells with a non-maximum suppression (`suppression.py`).

Targets and losses are in `centerpoint_loss.py`. BEV maps are [B C Y X]: rows = y, columns = x. A task's classes compete
for the same cells; labels count through the tasks in order.

Source: BEVDepth bevdepth/layers/heads/bev_depth_head.py (behaviour), mmdetection3d centerpoint_head.py and
centerpoint_bbox_coders.py; golden cases bevdepth_r50_2key and matrixvt_r50, `decode_synth*` included.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bevfn import tree
from bevfn.distributed import Train
from bevfn.heads import suppression
from bevfn.layers import branch, conv_norm, remat

OUTPUTS = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}  # channels of a task's code maps, in the code's order


@dataclass(frozen=True)
class Config:
    """The defaults are BEVDepth's on nuScenes, whose classes are car; truck, construction vehicle; bus, trailer;
    barrier; motorcycle, bicycle; pedestrian, traffic cone."""

    channels_in: int = 256
    channels: int = 64
    tasks: tuple[int, ...] = (1, 2, 2, 1, 2, 2)
    """classes of each task"""
    lower: tuple[float, float] = (-51.2, -51.2)
    """x, y of the map's corner, m"""
    cell: tuple[float, float] = (0.8, 0.8)
    """m in x and y"""
    cells: tuple[int, int] = (128, 128)
    """Y and X cells"""
    heatmap_bias: float | None = -2.19
    """initial bias of the heatmaps; None is torch's default"""
    # training
    gaussian_overlap: float = 0.1
    min_radius: int = 2
    code_weights: tuple[float, ...] = (1.0,) * 8 + (0.5, 0.5)
    """of reg 2, height, dim 3, rot 2, vel 2"""
    bbox_weight: float = 0.25
    # decoding
    queries: int = 500
    """highest cells of a task"""
    score_threshold: float = 0.1
    post_center_range: tuple[float, ...] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
    """decoded gravity centres outside (x, y, z lower, upper; m) are dropped"""
    nms: suppression.Kind | tuple[suppression.Kind, ...] = "circle"
    """of all tasks, or one per task"""
    nms_thresholds: tuple[float, ...] = (4.0, 12.0, 10.0, 1.0, 0.85, 0.175)
    """per task, see `suppression.near`"""
    nms_rescale: tuple[float, ...] | None = None
    """per class: what sizes are multiplied by before the suppression looks at them; None is 1"""
    max_per_task: int = 83
    """boxes that the suppression keeps"""
    recompute: bool = False
    """the branches of every task once more for the gradient, see `layers.remat`"""

    def __post_init__(self) -> None:
        if len(self.nms_thresholds) != len(self.tasks):
            raise ValueError(f"nms_thresholds {self.nms_thresholds} must name one per task of {self.tasks}")
        if len(self.kinds) != len(self.tasks):
            raise ValueError(f"nms {self.nms} must be one name, or one per task of {self.tasks}")
        if self.nms_rescale is not None and len(self.nms_rescale) != self.classes:
            raise ValueError(f"nms_rescale {self.nms_rescale} must be one number per class of {self.tasks}")
        if len(self.code_weights) != sum(OUTPUTS.values()):
            raise ValueError(f"code_weights {self.code_weights} must be {sum(OUTPUTS.values())} numbers")

    @property
    def classes(self) -> int:
        return sum(self.tasks)

    @property
    def kinds(self) -> tuple[suppression.Kind, ...]:
        """What `nms` means for each task."""
        return self.nms if isinstance(self.nms, tuple) else (self.nms,) * len(self.tasks)

    @property
    def first_class(self) -> tuple[int, ...]:
        """Label of each task's first class."""
        return tuple(sum(self.tasks[:t]) for t in range(len(self.tasks)))


SIZE_AWARE_SCALES = (0.6, 0.4, 0.4, 0.7, 0.8, 0.9)


def size_aware(config: Config) -> Config:
    """The head with BEVStereo's suppression."""
    return replace(config, nms="size_aware_circle", nms_thresholds=SIZE_AWARE_SCALES)


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state) of {"shared", "tasks"}: hidden layers Kaiming normal as mmcv's, the last ones torch's default."""
    return tree.unzip(
        {
            "shared": init_shared(config, generator),
            "tasks": [
                {**init_codes(config, generator), "heatmap": init_heatmap(config, classes, generator)}
                for classes in config.tasks
            ],
        }
    )


def init_shared(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state) of the layer before all branches."""
    return conv_norm.init(config.channels_in, config.channels, 3, generator=generator, kaiming="fan_out")


def init_codes(config: Config, generator: torch.Generator) -> dict[str, tuple[dict, dict]]:
    """A task's regression branches: {"reg": (params, state), "height", "dim", "rot", "vel"}."""
    return {
        name: branch.init(config.channels, width, generator=generator, kaiming="fan_out")
        for name, width in OUTPUTS.items()
    }


def init_heatmap(config: Config, classes: int, generator: torch.Generator) -> tuple[dict, dict]:
    """A task's heatmap branch."""
    params, state = branch.init(config.channels, classes, generator=generator, kaiming="fan_out")
    if config.heatmap_bias is not None:
        params["out"]["bias"].fill_(config.heatmap_bias)
    return params, state


def apply(params: dict, state: dict, x: Tensor, *, config: Config, train: Train) -> tuple[dict, dict]:
    """x [B C_in Y X] -> outputs and new state.

    Outputs: "shared" [B C Y X] and "tasks", per task {"reg" 2 (cell fraction), "height" 1 (m, gravity centre), "dim" 3
    (log m), "rot" 2 (sin, cos), "vel" 2 (m/s), "heatmap" (logits)}, each [B n Y X].

    Params may lack branches: a head of heatmaps alone and one of codes alone are two calls, whose tasks are merged for
    the loss and for `decode`.

    Raises ValueError if the map is not of `config.cells`.
    """
    if tuple(x.shape[2:]) != config.cells:
        raise ValueError(f"BEV map is {tuple(x.shape[2:])} cells, the head's config.cells is {config.cells}")
    shared, shared_state = conv_norm.apply(params["shared"], state["shared"], x, train=train)
    tasks, states = [], []
    for task, statistics in zip(params["tasks"], state["tasks"]):
        through = partial(_apply_task, train=train)
        maps, seen = remat.apply(through, task, statistics, shared, recompute=config.recompute)
        tasks.append(maps)
        states.append(seen)
    return {"shared": shared, "tasks": tasks}, {"shared": shared_state, "tasks": states}


def _apply_task(params: dict, state: dict, shared: Tensor, *, train: Train) -> tuple[dict, dict]:
    maps: dict = {}
    seen: dict = {}
    for name, weights in params.items():
        y, seen[name] = branch.apply(weights, state[name], shared, train=train)
        maps[name] = y.float()
    return maps, seen


# --------------------------------------------------------------------------------------------------------- decoding


def decode(tasks: list[dict[str, Tensor]], config: Config) -> dict[str, Tensor]:
    """Detections of every task, suppressed; static shapes, no host.

    Returns:
        "boxes" [B Q 9] (x, y, z bottom centre, dx, dy, dz m, yaw rad, vx, vy m/s; augmented ego frame), "scores" [B Q],
        "labels" [B Q] int64, "valid" [B Q] bool; task by task, in falling order of score within a task.
    """
    found = [candidates(maps, config) for maps in tasks]
    boxes, scores, valid = (torch.stack([task[name] for task in found], 1) for name in ("boxes", "scores", "valid"))
    labels = torch.stack([task["labels"] + first for task, first in zip(found, config.first_class)], 1)
    keep = suppress(_rescaled(boxes, labels, config), valid, config)  # B tasks Q
    bottom = boxes[..., 2] - boxes[..., 5] * 0.5
    boxes = torch.cat([boxes[..., :2], bottom[..., None], boxes[..., 3:]], -1)
    return {
        "boxes": boxes.flatten(1, 2),
        "scores": scores.flatten(1, 2),
        "labels": labels.flatten(1, 2),
        "valid": keep.flatten(1, 2),
    }


def candidates(maps: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The task's highest cells over all its classes, without a search for peaks: boxes with GRAVITY centres."""
    B, K, Y, X = maps["heatmap"].shape
    scores, place = torch.topk(torch.sigmoid(maps["heatmap"]).reshape(B, -1), min(config.queries, K * Y * X))  # B Q
    label = place.to(torch.int32) // (Y * X)  # Ascend's AI Core divides int32, not int64
    cell = place.to(torch.int32) - label * (Y * X)
    row = cell // X
    code = torch.cat([maps[name] for name in OUTPUTS], 1).flatten(2).transpose(1, 2)  # B Y*X 10
    reg, height, dim, rot, vel = code.gather(1, cell.long()[..., None].expand(-1, -1, code.shape[-1])).split(
        list(OUTPUTS.values()), -1
    )
    x = ((cell - row * X).float() + reg[..., 0]) * config.cell[0] + config.lower[0]
    y = (row.float() + reg[..., 1]) * config.cell[1] + config.lower[1]
    yaw = torch.atan2(rot[..., 0], rot[..., 1])
    boxes = torch.cat([torch.stack([x, y], -1), height, dim.exp(), yaw[..., None], vel], -1)
    lower, upper = (boxes.new_tensor(config.post_center_range[i : i + 3]) for i in (0, 3))
    inside = ((boxes[..., :3] >= lower) & (boxes[..., :3] <= upper)).sum(-1) == 3
    return {
        "boxes": boxes,
        "scores": scores,
        "labels": label.long(),
        "valid": inside & (scores > config.score_threshold),
    }


def suppress(boxes: Tensor, valid: Tensor, config: Config) -> Tensor:
    """The boxes that stay of each task, bool [B tasks Q]; boxes [B tasks Q 7+] in falling order of score, valid bool."""
    # One task after another: a pair of boxes takes dozens of numbers on the way to an IoU.
    each = zip(config.kinds, config.nms_thresholds, strict=True)
    near = [suppression.near(boxes[:, t], kind, threshold) for t, (kind, threshold) in enumerate(each)]
    return suppression.greedy(torch.stack(near, 1), valid, config.max_per_task)


def _rescaled(boxes: Tensor, labels: Tensor, config: Config) -> Tensor:
    """The boxes [B tasks Q 9] with the sizes that the suppression sees; labels [B tasks Q]."""
    if config.nms_rescale is None:
        return boxes
    factor = boxes.new_tensor(config.nms_rescale).index_select(0, labels.flatten()).view(*labels.shape, 1)
    return torch.cat([boxes[..., :3], boxes[..., 3:6] * factor, boxes[..., 6:]], -1)
