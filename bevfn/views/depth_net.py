"""Camera-aware depth net of BEVDepth (Li et al. 2022, arXiv 2206.10092, section 4): a distribution over depth and a
context vector per pixel, both gated by what is known about the camera, the depth supervised by LiDAR.

    context = 1x1(gate(reduce(x), camera))
    depth   = 1x1(deformable 3x3(ASPP(3 residual blocks(gate(reduce(x), camera)))))

BEVNeXt has the deformable convolution, with norm and ReLU, before the context's 1x1 instead.

Sources: BEVDepth bevdepth/layers/backbones/base_lss_fpn.py, exps/nuscenes/base_exp.py; BEVNeXt
mmdet3d/models/necks/depthnet.py and view_transformer.py (behaviour); golden cases bevdepth_r50_2key, bevnext_stage1.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from bevfn import rng, tree
from bevfn.backbones import resnet
from bevfn.data.batch import Batch, needed
from bevfn.distributed import Replicas, Train
from bevfn.kernels import derivatives
from bevfn.layers import batch_norm, conv, conv_norm, deform_conv, linear, remat
from bevfn.views.camera_grid import Bounds

CAMERA_NUMBERS = 27


@dataclass(frozen=True)
class Config:
    """The defaults are BEVDepth's."""

    channels_in: int = 512
    channels: int = 512
    context: int = 80
    """channels lifted to the BEV map"""
    depth_bins: int = 112
    blocks: int = 3
    dilations: tuple[int, ...] = (6, 12, 18)
    """of the ASPP's 3x3 convolutions, beside its 1x1 and its average over the image"""
    dropout: float = 0.5
    """behind the ASPP"""
    deform: Literal["depth", "context"] = "depth"
    """branch of the deformable convolution: last but one of the depth's, or with norm and ReLU the context's"""
    weight_groups: int = 4
    """groups of the deformable convolution's weight; one set of offsets moves them all"""
    recompute: bool = False
    """the residual blocks and the ASPP once more for the gradient, see `layers.remat`"""


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state) as trained from scratch upstream: torch's defaults, the ASPP Kaiming normal, offsets 0."""
    C = config.channels
    made: dict = {
        "reduce": conv_norm.init(config.channels_in, C, 3, bias=True, generator=generator),
        "camera_norm": batch_norm.init(CAMERA_NUMBERS),
    }
    for branch in ("context", "depth"):
        made[f"{branch}_mlp"] = {
            "fc1": linear.init(CAMERA_NUMBERS, C, bias=True, generator=generator),
            "fc2": linear.init(C, C, bias=True, generator=generator),
        }
        made[f"{branch}_gate"] = {
            name: conv.init(C, C, 1, bias=True, generator=generator) for name in ("reduce", "expand")
        }
    made["context"] = conv.init(C, config.context, 1, bias=True, generator=generator)
    made["blocks"] = [resnet.init_basic(C, C, generator=generator) for _ in range(config.blocks)]
    made["aspp"] = _init_aspp(config, generator)
    deform = deform_conv.init(C, C, 3, groups=config.weight_groups, generator=generator)
    made["deform"] = deform if config.deform == "depth" else conv_norm.with_norm(deform, C)
    made["depth"] = conv.init(C, config.depth_bins, 1, bias=True, generator=generator)
    return tree.unzip(made)


def _init_aspp(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    C, count = config.channels, len(config.dilations)
    layer = partial(conv_norm.init, channels_out=C, generator=generator, kaiming="fan_in")
    return tree.unzip(
        {
            "branches": [layer(C, kernel=kernel) for kernel in (1, *(3,) * count)],
            "pooled": layer(C, kernel=1),
            "merge": layer(C * (count + 2), kernel=1),
        }
    )


def camera_vectors(batch: Batch) -> Tensor:
    """[B*N 27] float32: what the gates know of a camera, always the KEY frame's, whichever frame is processed.

    fx, fy, cx, cy; image_aug's two rows without the depth column; base_aug's 2x2 part and z scale; base_from_camera's
    first three rows, row by row.
    """
    named = (
        (batch.intrinsics, "intrinsics"),
        (batch.image_aug, "image_aug"),
        (batch.base_from_camera, "base_from_camera"),
    )
    K, image, pose = (needed(matrices, name)[:, 0] for matrices, name in named)  # B N 4 4
    bev = batch.base_aug[:, None].expand(-1, K.shape[1], -1, -1)
    picked = [K[..., 0, 0], K[..., 1, 1], K[..., 0, 2], K[..., 1, 2]]
    picked += [image[..., i, j] for i in (0, 1) for j in (0, 1, 3)]
    picked += [bev[..., i, j] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 2))]
    return torch.cat([torch.stack(picked, -1), pose[..., :3, :].flatten(2)], -1).flatten(0, 1)


def apply(
    params: dict,
    state: dict,
    x: Tensor,
    cameras: Tensor,
    *,
    config: Config,
    train: Train,
    key: Tensor | None = None,
) -> tuple[dict, dict]:
    """Image features to depth and context.

    Args:
        x: [M C_in H W] in the compute dtype, M = B*N images of one frame.
        cameras: [M 27] float32, see `camera_vectors`.
        key: randomness of the dropout; None switches it off.

    Returns:
        outputs with "logits" [M D H W] and "context" [M C H W] in the compute dtype, and every boundary before them;
        and the new state.
    """
    new: dict = {}
    reduced, new["reduce"] = conv_norm.apply(params["reduce"], state["reduce"], x, train=train)
    camera, new["camera_norm"] = batch_norm.apply(params["camera_norm"], state["camera_norm"], cameras, train=train)
    out: dict = {"camera_raw": cameras, "camera": camera, "reduce": reduced}
    for branch in ("context", "depth"):
        out[f"{branch}_mlp"] = _mlp(params[f"{branch}_mlp"], camera.to(x.dtype))
        out[f"{branch}_gated"] = _gate(params[f"{branch}_gate"], reduced, out[f"{branch}_mlp"])
    y = out["context_gated"]
    if config.deform == "context":
        out["deform"], out["offset"] = deform_conv.apply(params["deform"]["conv"], y)
        y, new["deform"] = conv_norm.finish(params["deform"], state["deform"], out["deform"], train=train)
    out["context"] = conv.apply(params["context"], y)
    y, out["blocks"], new["blocks"] = out["depth_gated"], [], []
    for block, statistics in zip(params["blocks"], state["blocks"]):
        through = partial(resnet.apply_block, train=train)
        y, seen = remat.apply(through, block, statistics, y, recompute=config.recompute)
        out["blocks"].append(y)
        new["blocks"].append(seen)
    through = partial(_aspp, config=config, train=train)
    y, new["aspp"] = remat.apply(through, params["aspp"], state["aspp"], y, recompute=config.recompute)
    out["aspp"] = y = rng.dropout(y, config.dropout, key)
    if config.deform == "depth":
        out["deform"], out["offset"] = deform_conv.apply(params["deform"], y)
        y = out["deform"]
    out["logits"] = conv.apply(params["depth"], y)
    return out, {name: new[name] for name in state}  # in the old order: it is part of a tree's structure


def _mlp(params: dict, x: Tensor) -> Tensor:
    """[M 27] -> [M C]."""
    return linear.apply(params["fc2"], torch.relu(linear.apply(params["fc1"], x)))


def _gate(params: dict, x: Tensor, camera: Tensor) -> Tensor:
    """x [M C H W] times a number in 0..1 per image and channel, from camera [M C] (squeeze and excitation)."""
    g = torch.relu(conv.apply(params["reduce"], camera[..., None, None]))
    return x * torch.sigmoid(conv.apply(params["expand"], g))


def _aspp(params: dict, state: dict, x: Tensor, *, config: Config, train: Train) -> tuple[Tensor, dict]:
    """Atrous spatial pyramid pooling (Chen et al. 2017): x [M C H W] -> [M C H W]."""

    branches, seen = [], []
    for layer, old, dilation in zip(params["branches"], state["branches"], (1, *config.dilations)):
        y, new = conv_norm.apply(layer, old, x, train=train, dilation=dilation)
        branches.append(y)
        seen.append(new)
    mean = x.float().mean((2, 3), keepdim=True).to(x.dtype)  # M C 1 1
    pooled, pooled_state = conv_norm.apply(params["pooled"], state["pooled"], mean, train=train)
    y = torch.cat([*branches, pooled.expand(-1, -1, *x.shape[2:])], 1)
    y, merge_state = conv_norm.apply(params["merge"], state["merge"], y, train=train)
    return y, {"branches": seen, "pooled": pooled_state, "merge": merge_state}


# ------------------------------------------------------------------------------------------------ depth supervision


def depth_labels(depth: Tensor, depth_m: Bounds, stride: int) -> Tensor:
    """The depth bin of every feature pixel: int64 [... H/stride W/stride], -1 where there is none.

    Of the points in a feature pixel's stride x stride image pixels the nearest counts. Bin k holds
    [low + k step, low + (k + 1) step); nearer and farther points have no bin.

    Args:
        depth: [... H W] float32, m, 0 where no point falls.
    """
    low, high, step = depth_m
    bins = round((high - low) / step)
    far = torch.where(depth > 0, depth, 1e5)
    blocks = rearrange(far, "... (h i) (w j) -> ... h w (i j)", i=stride, j=stride)
    nearest = -(-blocks).max(-1)[0]  # max with a dim reaches an NPU graph, min does not
    place = (nearest - (low - step)) / step
    # label 0 upstream means "none", and place < 1 is nearer than the first bin
    return torch.where((place >= 0) & (place < bins + 1), place, 0.0).to(torch.int64) - 1


def depth_loss(p: Tensor, labels: Tensor, *, weight: float = 3.0, replicas: Replicas | None = None) -> Tensor:
    """Binary cross-entropy of the distribution over bins against one-hot labels, per labelled pixel, times `weight`; 0-d.

    Args:
        p: [M D H W] float32; labels: [M H W] int64, -1 where there is no label, see `depth_labels`.
        replicas: count the labelled pixels of all of them, so that the mean of their losses is the loss of their one
            big batch; upstream counts each process' own.
    """
    target = (labels[:, None] == torch.arange(p.shape[1], device=labels.device)[:, None, None]).float()
    labelled = (labels >= 0).float()
    count = labelled.sum()
    if replicas is not None:
        count = replicas.sum(count) / replicas.count
    entropy = _binary_cross_entropy(p, target) * labelled[:, None]
    return weight * entropy.sum() / count.clamp(min=1.0)


class _CrossEntropy(torch.autograd.Function):
    """torch's, without its check that raises (on CUDA: aborts) when an overflowing fp16 step brings NaN.

    Logarithms are bounded by -100, and the slope's denominator p (1 - p) by 1e-12.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, target: Tensor) -> Tensor:
        return -(target * p.log().clamp(min=-100.0) + (1 - target) * (1 - p).log().clamp(min=-100.0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        derivatives.save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        p, target = derivatives.saved(ctx)
        return grad * ((p - target) / (p * (1 - p)).clamp(min=1e-12)), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return derivatives.pushforward(_CrossEntropy.apply, derivatives.saved(ctx), tangents)


@derivatives.one_node
def _binary_cross_entropy(p: Tensor, target: Tensor) -> Tensor:
    return _CrossEntropy.apply(p, target)
