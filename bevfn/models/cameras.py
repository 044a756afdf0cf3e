"""What camera models share: images as their networks take them, and one network over several frames."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from bevfn import tree
from bevfn.data.batch import CAMERA_FIELDS, Batch, needed
from bevfn.distributed import Groups, Replicas, Train
from bevfn.views import camera_grid, depth_net

# ImageNet's, of R, G, B in 0..255.
IMAGE_MEAN = (123.675, 116.28, 103.53)
IMAGE_STD = (58.395, 57.12, 57.375)


class Supervised(Protocol):
    """A detector's config, as far as its depth loss needs it."""

    @property
    def grid(self) -> camera_grid.Config: ...
    @property
    def depth_loss_weight(self) -> float: ...


def images(batch: Batch, frames: int, image_size: tuple[int, int]) -> Tensor:
    """The batch's images, uint8 [B T N H W 3]; raises ValueError if they are not what the model takes."""
    images = needed(batch.images, "images")
    found, size = images.shape[1], tuple(images.shape[3:5])
    if found < frames:
        raise ValueError(f"the batch has {found} frames, the model takes {frames}; read more key frames")
    if size != image_size:
        raise ValueError(f"images are {size} pixels, the model's grid.image_size is {image_size}; read that size")
    return images


def normalise(images: Tensor, *, order: Literal["rgb", "bgr"]) -> Tensor:
    """uint8 RGB [B N H W 3] -> float32 [B*N 3 H W] (channels-last memory), ImageNet mean 0 and deviation 1.

    "bgr" gives B, G, R, each with the constants of R, G, B: upstreams that normalise an RGB image with `to_rgb=True`,
    which swaps the channels, trained their published weights so.
    """
    mean, std = (torch.tensor(values, device=images.device) for values in (IMAGE_MEAN, IMAGE_STD))
    pixels = images.float() if order == "rgb" else images.float().flip(-1)
    return ((pixels - mean) / std).permute(0, 1, 4, 2, 3).flatten(0, 1)


def over_frames(
    apply: Callable[[dict, dict, int, Train], tuple[dict, dict]],
    params: dict,
    state: dict,
    *,
    order: Sequence[int],
    train: Train,
    learning: Collection[int] = (0,),
    own_statistics: Collection[int] | None = None,
) -> tuple[list[dict], dict]:
    """One network over several frames, one after another: (outputs of the frames by their number, the last state).

    Every frame starts from the statistics that the frame before it left, so in training the running statistics are
    updated once per frame, in this order.

    Args:
        apply: (params, state, frame, train) -> (outputs, new state).
        order: the frames' numbers as they run; 0 is the current key frame.
        learning: frames that send a gradient into the parameters; the others see them detached.
        own_statistics: frames that in training normalise by their own batch and update the running statistics, None is
            all of them; the others run as in evaluation.
    """
    outputs: dict[int, dict] = {}
    for t in order:
        weights = params if t in learning else tree.map(lambda leaf: leaf.detach(), params)
        own = own_statistics is None or t in own_statistics
        outputs[t], state = apply(weights, state, t, train if own else False)
    return [outputs[t] for t in sorted(outputs)], state


def frames_as_samples(batch: Batch, frames: Sequence[int]) -> Batch:
    """T frames of the batch's cameras as T*B samples of one frame each, frame after frame; nothing but cameras and base."""

    def laid_out(x: Any) -> Any:
        return None if x is None else torch.cat([x[:, t] for t in frames])[:, None]

    repeated = {name: torch.cat([getattr(batch, name)] * len(frames)) for name in ("base_aug", "undo_base_aug")}
    return Batch(batch.base, **repeated, **{name: laid_out(getattr(batch, name)) for name in CAMERA_FIELDS})


def as_groups(train: Train, frames: int) -> Train:
    """How a network trains on so many frames in one call: as if they came one after another."""
    if not train or frames == 1:
        return train
    return Groups(frames, train if isinstance(train, Replicas) else None)


def per_frame(outputs: Any, frames: int) -> list[Any]:
    """Outputs of so many frames in one call [frames*M ...], frame after frame, as those of each."""
    return [
        tree.map(lambda x, i=i: x[i * (len(x) // frames) : (i + 1) * (len(x) // frames)], outputs)
        for i in range(frames)
    ]


def total_loss(detection: tuple[Tensor, dict], depth: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Training loss, 0-d float32, and its metrics: loss terms "loss/*", "num_pos", "bad/targets".

    detection: (total, terms) of `centerpoint_loss.loss`. depth: weighted, None where it does not count.
    """
    total, terms = detection
    metrics = {f"loss/{name}": terms[name].detach() for name in ("heatmap", "bbox")}
    metrics |= {"num_pos": terms["num_pos"], "bad/targets": terms["bad_boxes"]}
    if depth is not None:
        total, metrics["loss/depth"] = total + depth, depth.detach()
    return total, {"loss/total": total.detach(), **metrics}


def key_frame_depth_loss(
    outputs: dict, batch: Batch, config: Supervised, replicas: Replicas | None = None
) -> Tensor | None:
    """Weighted depth loss of a detector's current key frame, 0-d, None where its config has no weight for it; raises
    ValueError if the batch has no depth."""
    if not config.depth_loss_weight:
        return None
    p = outputs["frames"][0]["view"]["depth"]
    return depth_loss(p, batch, config.grid, weight=config.depth_loss_weight, replicas=replicas)


def depth_loss(
    p: Tensor, batch: Batch, grid: camera_grid.Config, *, weight: float, replicas: Replicas | None = None
) -> Tensor:
    """Weighted depth loss of the current key frame's distributions p [B*N D H W], 0-d; raises ValueError if the batch has no
    depth."""
    depth = needed(batch.depth, "depth maps")
    labels = depth_net.depth_labels(depth.flatten(0, 1), grid.depth_m, grid.stride)
    return depth_net.depth_loss(p, labels, weight=weight, replicas=replicas)
