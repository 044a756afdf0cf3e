"""BEVFusion's image branch alone, taught what images show: depth from LiDAR points and the annotated boxes as rectangles.

From the finest map of the neck two things are predicted, by 1 x 1 convolutions:

- *depth*: a distribution over the bins of the view transform for every pixel of the map, held against the nearest LiDAR point
  that falls into it (`depth_net.depth_labels`, loss as BEVDepth's). Where the detector's depth net sees images alone (camera-only:
  `lift_splat.Config.lidar_depth` False) it is the depth net itself that learns this; the published LiDAR-camera model's
  is given the LiDAR points as input, which would be the answer, so that there a layer of the pretraining's own learns it.
- *rectangles*: a heatmap for each class with a Gaussian at the centre of every visible box' rectangle, and the logarithm of the
  rectangle's sides at its centre (objects as points: Zhou et al. 2019, arXiv 1904.07850). A rectangle is what encloses a 3D
  box' projected corners, cut to the image; it counts if all corners are MIN_DEPTH in front of the camera and what is left has
  sides of MIN_SIDE pixels. Boxes hidden by others count too: their annotations do not say so.

loss = depth_weight x depth + heatmap (Gaussian focal) + size_weight x size (L1).

Its parameters are the detector's "camera" without (camera-only: with the depth net of) its view transform, by the same names and
shapes, and "pretext", which the pretraining alone needs.

    config = image_branch.Config(bevfusion.lidar_camera())
    params, state = image_branch.init(config, seed=0)
    total, (state, metrics) = image_branch.loss(params, state, batch, key, config=config)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bevfn import boxes as box_ops
from bevfn import geometry, losses, tree
from bevfn.backbones import swin
from bevfn.catalogue import PRETEXT
from bevfn.data.batch import Base, Batch, annotated_boxes, check_base, needed
from bevfn.data.reading import Needs
from bevfn.distributed import Replicas, Train
from bevfn.evaluation.average_precision import Ranked, average_precision, curve
from bevfn.evaluation.matching import assign
from bevfn.heads import centerpoint_loss
from bevfn.heads.transfusion_loss import gaussian_radius
from bevfn.layers import conv, conv_norm
from bevfn.models import bevfusion, cameras
from bevfn.necks import lss_fpn
from bevfn.precision import Policy
from bevfn.views import camera_grid, depth_net, lift_splat

MIN_DEPTH = 0.5  # m
MIN_SIDE = 4.0  # pixels of the network's input
PRIOR = 0.1  # of the heatmaps before training, as CenterNet's
PEAKS = 50  # of an image that are scored
NEAR = 1.5  # feature pixels within which a peak finds a centre


@dataclass(frozen=True)
class Config:
    detector: bevfusion.Config = field(default_factory=bevfusion.lidar_camera)
    """whose image branch learns; all else is left out"""
    channels: int = 64
    """of the heads"""
    depth_weight: float = 3.0
    size_weight: float = 0.5
    overlap: float = 0.1
    """of rectangles whose centres are apart by the heatmap's radius (CornerNet's rule)"""

    def __post_init__(self) -> None:
        if self.detector.camera is None:
            raise ValueError("the detector has no cameras, whose branch could learn; give one with camera")

    @property
    def grid(self) -> camera_grid.Config:
        """The view transform's: image size, stride, depth bins."""
        assert self.detector.camera is not None
        return self.detector.camera.view.grid

    @property
    def own_depth(self) -> bool:
        """Whether a layer of the pretraining's own learns depth, since the detector's depth net is given it."""
        assert self.detector.camera is not None
        return self.detector.camera.view.lidar_depth


def init(config: Config, seed: int) -> tuple[dict, dict]:
    """(params, state): the detector's "camera" as far as it learns, and "pretext"."""
    camera = config.detector.camera
    assert camera is not None
    generator = torch.Generator().manual_seed(seed)
    branch: dict[str, Any] = {
        "backbone": swin.init(camera.backbone, generator),
        "neck": lss_fpn.init(camera.neck, generator),
    }
    view, _ = lift_splat.init(camera.view, generator)
    width, C = camera.neck.channels_out, config.channels

    def head(channels: int, width: int = C) -> dict:
        return conv.init(width, channels, 1, bias=True, generator=generator)

    pretext: dict[str, Any] = {"shared": conv_norm.init(width, C, 3, generator=generator)}
    pretext |= {"heatmap": head(config.detector.head.classes), "size": head(2)}
    pretext["heatmap"]["bias"].fill_(-float(np.log(1 / PRIOR - 1)))
    if config.own_depth:
        pretext["depth"] = head(config.grid.depth_bins, width)
    else:
        branch["view"] = {"depth_net": view["depth_net"]}
    return tree.unzip({"camera": branch, PRETEXT: pretext})


def needs(config: Config) -> Needs:
    """Images, their depth maps and boxes."""
    return Needs(
        model="the image branch",
        base=Base.LIDAR,
        classes=config.detector.head.classes,
        image_size=config.grid.image_size,
        depth=True,
    )


def apply(
    params: dict,
    state: dict,
    batch: Batch,
    *,
    config: Config,
    train: Train,
    policy: Policy = Policy(),  # noqa: B008
    key: Tensor | None = None,
) -> tuple[dict, dict]:
    """(outputs, new state). Of B*N images whose finest map is h x w: "camera" ("backbone", "neck", as of the detector), and in
    float32 "depth" [B*N D h w] probabilities, "heatmap" [B*N K h w] logits, "size" [B*N 2 h w] log of width and height (feature
    pixels). key: stochastic depth; None switches it off."""
    check_base(batch, Base.LIDAR, "the image branch")
    camera, old = params["camera"], state["camera"]
    features, new = bevfusion.image_features(camera, old, batch, config.detector, train, policy, key)
    x, pretext = features["neck"][0], params[PRETEXT]
    layer = pretext["depth"] if config.own_depth else camera["view"]["depth_net"][-1]["conv"]
    depth = conv.apply(layer, x.float())[
        :, : config.grid.depth_bins
    ]  # float32, as the view transform is; context is behind
    shared, shared_state = conv_norm.apply(pretext["shared"], state[PRETEXT]["shared"], x, train=train)
    outputs = {
        "camera": features,
        "depth": depth.softmax(1),
        "heatmap": conv.apply(pretext["heatmap"], shared).float(),
        "size": conv.apply(pretext["size"], shared).float(),
    }
    return outputs, {"camera": old | new, PRETEXT: state[PRETEXT] | {"shared": shared_state}}


def rectangles(batch: Batch, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes in the images: (left, top, right, bottom [B*N G 4] in pixels of the network's input, labels [B*N G], which count
    [B*N G] bool)."""
    boxes, labels, valid = annotated_boxes(batch)
    boxes, valid, _ = box_ops.only_usable(boxes, valid)
    fields = camera_grid.of_frame(batch, 0, "undo_base_aug", "base_aug", "image_from_base", "image_aug")
    u, v, depth = geometry.project(box_ops.corners(boxes).flatten(1, 2), **fields)  # B N G*8
    u, v, depth = (plane.unflatten(-1, (-1, 8)).flatten(0, 1) for plane in (u, v, depth))  # B*N G 8
    (H, W), N = config.grid.image_size, len(u) // len(boxes)

    def ends(plane: Tensor, size: int) -> tuple[Tensor, Tensor]:  # max with a dim reaches an NPU graph, min does not
        return (-(-plane).max(-1)[0]).clamp(0.0, float(size)), plane.max(-1)[0].clamp(0.0, float(size))

    (left, right), (top, bottom) = ends(u, W), ends(v, H)
    in_front = -(-depth).max(-1)[0] >= MIN_DEPTH
    visible = in_front & (right - left >= MIN_SIDE) & (bottom - top >= MIN_SIDE)
    labels, valid = (x.repeat_interleave(N, 0) for x in (labels, valid))
    return torch.stack([left, top, right, bottom], -1), labels, valid & visible


def targets(batch: Batch, config: Config) -> dict[str, Tensor]:
    """What the boxes ask for: "heatmap" [M K h w], "cell" [M G] int64 (row w + column, 0 where none counts), "size" [M G 2]
    (0 there), "labels" and "counted" [M G] (bool), of M = B*N images."""
    rectangle, labels, counted = rectangles(batch, config)
    stride, (h, w) = float(config.grid.stride), config.grid.feature_size
    left, top, right, bottom = (rectangle / stride).unbind(-1)  # M G, feature pixels
    column, row = ((left + right) / 2).trunc(), ((top + bottom) / 2).trunc()
    width, height = (torch.where(counted, side, 1.0) for side in (right - left, bottom - top))
    radius = gaussian_radius(height, width, config.overlap).trunc()
    heatmap = centerpoint_loss.gaussians(
        [column, row], radius, labels, counted, cells=(h, w), classes=config.detector.head.classes
    )
    cell = torch.where(counted, row * w + column, 0.0).long()
    size = torch.stack([width, height], -1).log()
    return {"heatmap": heatmap, "cell": cell, "size": size, "labels": labels, "counted": counted}


def loss(
    params: dict,
    state: dict,
    batch: Batch,
    key: Tensor | None = None,
    *,
    config: Config,
    policy: Policy = Policy(),  # noqa: B008
    train: Train = True,
) -> tuple[Tensor, tuple[dict, dict]]:
    """The loss of the module's docstring, in the form that `train.make_step` takes once config, policy and train are bound.

    Returns:
        total (0-d float32) and (new state, metrics: loss terms "loss/*", "num_pos" rectangles).
    """
    outputs, new = apply(params, state, batch, config=config, train=train, policy=policy, key=key)
    found = targets(batch, config)
    replicas = train if isinstance(train, Replicas) else None
    depth = cameras.depth_loss(outputs["depth"], batch, config.grid, weight=config.depth_weight, replicas=replicas)
    heatmap = losses.gaussian_focal(outputs["heatmap"], found["heatmap"], train=train)
    counted = found["counted"].float()
    predicted = _gathered(outputs["size"], found["cell"])
    size = losses.weighted_l1(predicted, found["size"], counted[..., None], losses.positives(counted, train))
    terms = {"depth": depth, "heatmap": heatmap, "size": config.size_weight * size}
    total = depth + heatmap + terms["size"]
    metrics = {"loss/total": total.detach(), "num_pos": counted.sum()}
    return total, (new, metrics | {f"loss/{name}": term.detach() for name, term in terms.items()})


def _gathered(maps: Tensor, cell: Tensor) -> Tensor:
    """What maps [M C h w] have at cells [M G]: [M G C]."""
    M, C, h, w = maps.shape
    rows = maps.permute(0, 2, 3, 1).reshape(-1, C)
    place = torch.arange(M, device=cell.device)[:, None] * (h * w) + cell
    return rows.index_select(0, place.flatten()).view(M, -1, C)


def predict(
    params: dict,
    state: dict,
    batch: Batch,
    *,
    config: Config,
    policy: Policy = Policy(),  # noqa: B008
) -> dict[str, Tensor]:
    """What `score` takes of every key frame, in evaluation mode: "depth" [B 2], the sum of |predicted - LiDAR| / LiDAR over
    labelled pixels and their number; "peaks" [B N PEAKS 4], the heatmaps' highest local maxima (score, class, row, column);
    "centres" [B N G 4], the rectangles' (1 if it counts, class, row, column)."""
    outputs, _ = apply(params, state, batch, config=config, train=False, policy=policy)
    N = len(outputs["depth"]) // len(batch.base_aug)
    found = targets(batch, config)
    w = config.grid.feature_size[1]
    cell = found["cell"]
    centres = torch.stack([x.float() for x in (found["counted"], found["labels"], cell // w, cell % w)], -1)
    made = {"peaks": peaks(outputs["heatmap"]), "centres": centres}
    made = {name: value.unflatten(0, (-1, N)) for name, value in made.items()}
    return made | {"depth": depth_error(outputs["depth"], needed(batch.depth, "depth maps"), config.grid)}


def peaks(logits: Tensor) -> Tensor:
    """Heatmaps [M K h w] -> [M PEAKS 4]: score, class, row and column of the local maxima (of 3 x 3) that are highest, 0 where
    there are fewer."""
    p = torch.sigmoid(logits)
    _, K, h, w = p.shape
    p = torch.where(F.max_pool2d(p, 3, stride=1, padding=1) == p, p, 0.0).flatten(1)
    scores, place = torch.topk(p, min(PEAKS, K * h * w), dim=1)
    return torch.stack([scores, *(x.float() for x in (place // (h * w), place % (h * w) // w, place % w))], -1)


def depth_error(p: Tensor, depth: Tensor, grid: camera_grid.Config) -> Tensor:
    """[B 2] of distributions p [B*N D h w] and depth maps [B N H W]: sum and number, see `predict`. The prediction is the mean of
    the distribution, the LiDAR's depth the middle of its bin: right to half a step."""
    labels = depth_net.depth_labels(depth.flatten(0, 1), grid.depth_m, grid.stride)  # M h w
    low, _, step = grid.depth_m
    middle = low + step * (torch.arange(grid.depth_bins, device=p.device) + 0.5)  # D
    predicted = (p * middle[:, None, None]).sum(1)
    truth = low + step * (labels.clamp(min=0).float() + 0.5)
    labelled = (labels >= 0).float()
    error = labelled * (predicted - truth).abs() / truth
    return torch.stack([x.view(len(depth), -1).sum(1) for x in (error, labelled)], -1)


def score(rows: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of what `predict` gave of all key frames: "2D mAP", the mean over annotated classes of the average precision (nuScenes'
    rule, of one threshold) of peaks, each of which finds the nearest free centre of its class and image less than NEAR feature
    pixels away; and "depth error", the mean of |predicted - LiDAR| / LiDAR."""
    error, count = rows["depth"].sum(0, dtype=np.float64)
    peaks, centres = (rows[name].reshape(-1, *rows[name].shape[2:]) for name in ("peaks", "centres"))  # images rows 4
    classes = np.unique(centres[centres[..., 0] > 0][:, 1])
    precisions = [_average_precision(peaks, centres, label) for label in classes]
    return {
        "2D mAP": float(np.mean(precisions)) if precisions else float("nan"),
        "depth error": float(error / count) if count else float("nan"),
    }


def _average_precision(peaks: np.ndarray, centres: np.ndarray, label: float) -> float:
    """Of one class: peaks and centres of all images [images rows 4]."""
    scores, found, annotated = [], [], 0
    for ours, theirs in zip(peaks, centres):
        ours = ours[(ours[:, 0] > 0) & (ours[:, 1] == label)]  # in falling order
        theirs = theirs[(theirs[:, 0] > 0) & (theirs[:, 1] == label)]
        distance = np.linalg.norm(ours[:, None, 2:] - theirs[None, :, 2:], axis=-1)
        scores.append(ours[:, 0].astype(np.float64))
        found.append(assign(distance, NEAR) >= 0)
        annotated += len(theirs)
    hit = np.concatenate(found)
    precision, recall, _ = curve(Ranked(np.concatenate(scores), hit.astype(np.float64), hit), annotated)
    return average_precision(precision, recall)
