"""Foreign names of mmdetection3d's projects/BEVFusion and of a Swin image backbone on its own, whose file is in the
naming of the original Swin repository or in mmdet's.

Source: state dicts of mmdetection3d 1.4.0's projects/BEVFusion, with cameras and without.
"""

import torch
from torch import Tensor

from bevfn.models import bevfusion
from bevfn.upstream.buffers import frustum, grid
from bevfn.upstream.entries import Named, Names, Naming, WeightLayout, conv_norm

UNUSED_OF_SWIN = (
    (r".*\.attn_mask", "shift mask for the pre-training image size; bevfn computes its own"),
    (r"head\..*", "classification head of the pre-training"),
    (r"norm\.(weight|bias)", "norm of the classification head"),
    (r"norm0\.(weight|bias)", "norm of the first stage, whose output the detector does not use"),
)


def detector(params: dict, *, view: str = "") -> Names:
    """A BEVFusion of any sensors, in upstream's order; `view` is in front of the numbers of the view transform's layers."""
    if "camera" in params:
        yield from swin(params, "mmdet", "img_backbone.")
        yield from _lss_fpn(params["camera"]["neck"])
        yield from _view(params["camera"]["view"], view)
    if "lidar" in params:
        yield from _sparse_encoder(params["lidar"])
    if "fuser" in params:
        yield from conv_norm("fuser", "fusion_layer")
    if "bev" in params:
        yield from _bev(params["bev"])
    yield from _head(params["head"])


def swin(params: dict, naming: Naming, prefix: str = "") -> Names:
    """The image backbone, on its own or below a detector's `prefix`."""
    mmdet, path = naming == "mmdet", "camera.backbone"
    stage, attention, projection = ("stages", "attn.w_msa", "projection") if mmdet else ("layers", "attn", "proj")
    fc1, fc2 = ("ffn.layers.0.0", "ffn.layers.1") if mmdet else ("mlp.fc1", "mlp.fc2")
    merged: WeightLayout = "same" if mmdet else "merged"
    yield Named(f"{path}.patch_embed.conv", f"{prefix}patch_embed.{projection}")
    yield Named(f"{path}.patch_embed.norm", f"{prefix}patch_embed.norm")
    backbone = params["camera"]["backbone"]
    for i, made in enumerate(backbone["stages"]):
        for j in range(len(made["blocks"])):
            ours, key = f"{path}.stages.{i}.blocks.{j}", f"{prefix}{stage}.{i}.blocks.{j}"
            yield Named(f"{ours}.norm1", f"{key}.norm1")
            yield Named(f"{ours}.attn.bias_table", f"{key}.{attention}.relative_position_bias_table")
            yield Named(f"{ours}.attn.qkv", f"{key}.{attention}.qkv")
            yield Named(f"{ours}.attn.proj", f"{key}.{attention}.proj")
            yield Named(f"{ours}.norm2", f"{key}.norm2")
            yield Named(f"{ours}.mlp.fc1", f"{key}.{fc1}")
            yield Named(f"{ours}.mlp.fc2", f"{key}.{fc2}")
        for part in ("norm", "reduction"):  # the last stage has none
            yield Named(f"{path}.stages.{i}.downsample.{part}", f"{prefix}{stage}.{i}.downsample.{part}", merged)
    for k in range(len(backbone["out_norms"])):  # an ImageNet classifier has none: they stay at 1 and 0
        yield Named(f"{path}.out_norms.{k}", f"{prefix}norm{k + 1}", optional=prefix == "")


def _lss_fpn(neck: dict) -> Names:
    for ours, theirs in (("laterals", "lateral_convs"), ("outputs", "fpn_convs")):
        for l in range(len(neck[ours])):
            yield from conv_norm(f"camera.neck.{ours}.{l}", f"img_neck.{theirs}.{l}", "conv", "bn")


def _view(view: dict, inside: str) -> Names:
    for ours, theirs in (("depth_transform", "dtransform"), ("depth_net", "depthnet"), ("downsample", "downsample")):
        for k in range(len(view[ours])):
            yield from conv_norm(
                f"camera.view.{ours}.{k}", f"view_transform.{theirs}", f"{inside}{3 * k}", f"{inside}{3 * k + 1}"
            )


def _bev(bev: dict) -> Names:
    for b, block in enumerate(bev["backbone"]["blocks"]):
        for l in range(len(block)):  # upstream's Sequential is conv, norm, ReLU, conv, norm, ReLU, ...
            path, key = f"bev.backbone.blocks.{b}.{l}", f"pts_backbone.blocks.{b}"
            yield from conv_norm(path, key, str(3 * l), str(3 * l + 1))
    for b in range(len(bev["neck"]["blocks"])):
        yield from conv_norm(f"bev.neck.blocks.{b}", f"pts_neck.deblocks.{b}")


def _sparse_encoder(lidar: dict) -> Names:
    prefix = "pts_middle_encoder"
    yield from conv_norm("lidar.conv_input", f"{prefix}.conv_input", layout="sparse")
    for i, stage in enumerate(lidar["stages"]):
        path, key = f"lidar.stages.{i}", f"{prefix}.encoder_layers.encoder_layer{i + 1}"
        for j in range(len(stage["blocks"])):
            for n in "12":
                pair = f"conv{n}", f"bn{n}"
                yield from conv_norm(
                    f"{path}.blocks.{j}", f"{key}.{j}", *pair, layout="sparse", names=f"conv{n} norm{n}"
                )
        yield from conv_norm(
            f"{path}.down", f"{key}.{len(stage['blocks'])}", layout="sparse"
        )  # the last stage has none
    yield from conv_norm("lidar.conv_out", f"{prefix}.conv_out", layout="sparse")


def _head(head: dict) -> Names:
    prefix = "bbox_head"
    yield Named("head.shared", f"{prefix}.shared_conv")
    yield from conv_norm("head.heatmap.hidden", f"{prefix}.heatmap_head.0", "conv", "bn")
    yield Named("head.heatmap.out", f"{prefix}.heatmap_head.1")
    yield Named("head.class_encoding", f"{prefix}.class_encoding", "sequence")
    for i in range(len(head["decoder"])):
        yield from _decoder_layer(f"head.decoder.{i}", f"{prefix}.decoder.{i}")
    for i, tasks in enumerate(head["predict"]):
        for task in tasks:
            path, key = f"head.predict.{i}.{task}", f"{prefix}.prediction_heads.{i}.{task}"
            yield from conv_norm(f"{path}.hidden", f"{key}.0", "conv", "bn", layout="sequence")
            yield Named(f"{path}.out", f"{key}.1", "sequence")


def _decoder_layer(path: str, key: str) -> Names:
    for attention in ("self_attn", "cross_attn"):
        ours, theirs = f"{path}.{attention}", f"{key}.{attention}.attn"
        yield Named(f"{ours}.in_proj.weight", f"{theirs}.in_proj_weight")
        yield Named(f"{ours}.in_proj.bias", f"{theirs}.in_proj_bias")
        yield Named(f"{ours}.out_proj", f"{theirs}.out_proj")
    yield Named(f"{path}.ffn.fc1", f"{key}.ffn.layers.0.0")
    yield Named(f"{path}.ffn.fc2", f"{key}.ffn.layers.1")
    for k in range(3):
        yield Named(f"{path}.norms.{k}", f"{key}.norms.{k}")
    for ours, theirs in (("self_position", "self_posembed"), ("cross_position", "cross_posembed")):
        place, embed = f"{path}.{ours}", f"{key}.{theirs}.position_embedding_head"
        yield from conv_norm(place, embed, layout="sequence", names="fc1 norm")
        yield Named(f"{place}.fc2", f"{embed}.3", "sequence")


# --- buffers that follow from the configuration ------------------------------------------------------------------


def detector_buffers(config: bevfusion.Config) -> dict[str, Tensor]:
    """Swin's and the view transform's."""
    if config.camera is None:
        return {}
    view = config.camera.view.grid
    low, _, step = view.depth_m
    depth = low + step * torch.arange(view.depth_bins)
    step_m, centre_m, count = grid(view)
    made = {"dx": step_m, "bx": centre_m, "nx": count, "frustum": frustum(view, depth)}
    return swin_buffers(config, "mmdet", "img_backbone.") | {f"view_transform.{k}": v for k, v in made.items()}


def swin_buffers(config: bevfusion.Config, naming: Naming, prefix: str = "") -> dict[str, Tensor]:
    """Per block [T T] int64, T = window^2 row-major tokens: row of the bias table for query q and key k."""
    assert config.camera is not None
    backbone = config.camera.backbone
    stage, attention = ("stages", "attn.w_msa") if naming == "mmdet" else ("layers", "attn")
    window = backbone.window
    row, column = torch.arange(window * window) // window, torch.arange(window * window) % window
    down = row[:, None] - row[None, :] + window - 1
    index = (2 * window - 1) * down + column[:, None] - column[None, :] + window - 1
    return {
        f"{prefix}{stage}.{i}.blocks.{j}.{attention}.relative_position_index": index.clone()
        for i, depth in enumerate(backbone.depths)
        for j in range(depth)
    }
