"""Foreign names of BEVNeXt's detectors, as mmcv writes them and the EMA hook's files.

Source: state dicts of BEVNeXt's published models of both stages.
"""

from bevfn.upstream.entries import Named, Names, conv_norm
from bevfn.upstream.names_bevdepth import branch, depth_net, residual_block, resnet_below


def detector(params: dict) -> Names:
    """Either stage, in upstream's order."""
    image, view, bev, head = (params[part] for part in ("image", "view", "bev", "head"))
    yield from _centerpoint(head["bbox"], "head.bbox", "pts_bbox_head")
    yield from resnet_below(image["backbone"], "image.backbone", "img_backbone.")
    for i in range(len(image["neck"]["laterals"])):
        yield Named(f"image.neck.laterals.{i}", f"img_neck.lateral_convs.{i}.conv")
    yield Named("image.neck.out", "img_neck.fpn_convs.0.conv")
    yield from depth_net(view["depth_net"], "img_view_transformer.depth_net")
    yield Named("view.crf.strength", "img_view_transformer.crf.ws.0")
    yield from _backbone(bev["backbone"])
    for i in range(2):
        yield from conv_norm(f"bev.neck.merge.{i}", "img_bev_encoder_neck.conv", str(3 * i), str(3 * i + 1))
    yield from conv_norm("bev.neck.up", "img_bev_encoder_neck.up2", "1", "2")
    yield Named("bev.neck.out", "img_bev_encoder_neck.up2.4")
    yield from _stages(view["pre_process"], "view.pre_process", "pre_process_net")
    yield from _refinement()
    yield from _centerpoint(head["proposal"], "head.proposal", "proposal_head")
    yield from conv_norm("head.depth_embedding.hidden", "depth_emb")
    yield Named("head.depth_embedding.out", "depth_emb.3")


def image_backbone(params: dict) -> Names:
    """The ResNet of a detector of mmdetection (FCOS3D, Cascade Mask R-CNN on nuImages)."""
    return resnet_below(params["image"]["backbone"], "image.backbone", "")


def _centerpoint(params: dict, path: str, key: str) -> Names:
    yield from conv_norm(f"{path}.shared", f"{key}.shared_conv", "conv", "bn")
    for t, task in enumerate(params["tasks"]):
        for name in task:
            yield from branch(f"{path}.tasks.{t}.{name}", f"{key}.task_heads.{t}.{name}")


def _backbone(params: dict) -> Names:
    """A CustomResNet, or Res2Fusion."""
    path, key = "bev.backbone", "img_bev_encoder_backbone"
    if "fusion" not in params:
        yield from _stages(params, path, key)
        return
    for s, blocks in enumerate(params["stages"]):
        for b, block in enumerate(blocks):
            yield from _res2_block(block, f"{path}.stages.{s}.{b}", f"{key}.layers.{s}.0.{b}")
    yield from _res2_block(params["fusion"], f"{path}.fusion", f"{key}.fusion_layer")


def _stages(params: dict, path: str, key: str) -> Names:
    for s, blocks in enumerate(params["stages"]):
        for b, block in enumerate(blocks):
            yield from residual_block(block, f"{path}.stages.{s}.{b}", f"{key}.layers.{s}.{b}")


def _res2_block(params: dict, path: str, key: str) -> Names:
    for ours, number in (("reduce", 1), ("expand", 3)):
        yield from conv_norm(f"{path}.{ours}", key, f"conv{number}", f"bn{number}")
    yield from conv_norm(f"{path}.shortcut", f"{key}.downsample", "1", "2")  # where a block has one
    for ours, theirs in (("conv", "convs"), ("norm", "bns")):
        for i in range(len(params["scales"])):
            yield Named(f"{path}.scales.{i}.{ours}", f"{key}.{theirs}.{i}")


def _refinement() -> Names:
    path, key = "head.refine", "transformer_neck"
    layer = f"{key}.decoder.layers.0"
    attention = f"{layer}.attentions.0"
    for ours, theirs in (("offsets", "sampling_offsets"), ("weights", "attention_weights"), ("value", "value_proj")):
        yield Named(f"{path}.attention.{ours}", f"{attention}.deformable_attention.{theirs}")
    yield Named(f"{path}.attention.out", f"{attention}.output_proj")
    yield Named(f"{path}.ffn.fc1", f"{layer}.ffns.0.layers.0.0")
    yield Named(f"{path}.ffn.fc2", f"{layer}.ffns.0.layers.1")
    for i in range(2):
        yield Named(f"{path}.norms.{i}", f"{layer}.norms.{i}")
    yield Named(f"{path}.embedding", f"{key}.bev_embedding.weight")
    yield Named(f"{path}.rows", f"{key}.positional_encoding.row_embed.weight")
    yield Named(f"{path}.columns", f"{key}.positional_encoding.col_embed.weight")
    yield from conv_norm(f"{path}.shared", f"{key}.shared_conv", "conv", "bn")
