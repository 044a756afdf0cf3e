"""Foreign names of BEVDepth's family: the detectors as BEVDepth's Lightning module and its EMA callback write them
(prefix `model.`), and torchvision's ResNet-50.

Source: state dicts of BEVDepth's and MatrixVT's published models; the keys of
depth aggregation, which no golden case has, from BEVDepth bevdepth/layers/backbones/base_lss_fpn.py.
"""

import torch
from torch import Tensor

from bevfn.models import bevdepth
from bevfn.upstream.buffers import frustum, grid
from bevfn.upstream.entries import Named, Names, WeightLayout, conv_norm

UNUSED_OF_RESNET = ((r"fc\.(weight|bias)", "classification head of the pre-training"),)


def detector(params: dict) -> Names:
    """A BEVDepth or MatrixVT, in upstream's order."""
    image, view, bev = params["image"], params["view"], params["bev"]
    yield from resnet_below(image["backbone"], "image.backbone", "backbone.img_backbone.")
    yield from _second_fpn(image["neck"], "image.neck", "backbone.img_neck")
    yield from depth_net(view["depth_net"], "backbone.depth_net")
    if "aggregation" in view:
        yield from _aggregation()
    if "matrix" in view:
        yield from _matrix(view["matrix"])
    yield from conv_norm("head.shared", "head.shared_conv", "conv", "bn")
    for t, task in enumerate(params["head"]["tasks"]):
        for name in task:
            yield from branch(f"head.tasks.{t}.{name}", f"head.task_heads.{t}.{name}")
    yield from resnet_below(bev["backbone"], "bev.backbone", "head.trunk.")
    yield from _second_fpn(bev["neck"], "bev.neck", "head.neck")


def resnet(params: dict) -> Names:
    """torchvision's ResNet as the image backbone."""
    return resnet_below(params["image"]["backbone"], "image.backbone", "")


def resnet_below(params: dict, path: str, prefix: str) -> Names:
    """A ResNet in torchvision's names."""
    yield Named(f"{path}.stem.conv", f"{prefix}conv1")
    yield Named(f"{path}.stem.norm", f"{prefix}bn1")
    for s, stage in enumerate(params["stages"]):
        for b, block in enumerate(stage):
            yield from residual_block(block, f"{path}.stages.{s}.{b}", f"{prefix}layer{s + 1}.{b}")


def residual_block(params: dict, path: str, key: str) -> Names:
    """A block of a ResNet; its shortcut has a norm or none."""
    for i in range(len(params["layers"])):
        yield from numbered(f"{path}.layers.{i}", key, i + 1)
    yield Named(f"{path}.shortcut", f"{key}.downsample")  # a convolution alone
    yield from conv_norm(f"{path}.shortcut", f"{key}.downsample")


def branch(path: str, key: str) -> Names:
    """A prediction branch of a CenterPoint head."""
    yield from conv_norm(f"{path}.hidden", f"{key}.0", "conv", "bn")
    yield Named(f"{path}.out", f"{key}.1")


def numbered(path: str, key: str, number: int) -> Names:
    """conv1 and bn1, conv2 and bn2, ..."""
    return conv_norm(path, key, f"conv{number}", f"bn{number}")


def _second_fpn(params: dict, path: str, key: str) -> Names:
    for b, block in enumerate(params["blocks"]):
        # Upstream also makes the level that keeps its size as a transposed convolution, kernel [in out 1 1].
        layout: WeightLayout = "swapped" if block["conv"]["weight"].shape[-1] == 1 else "same"
        yield from conv_norm(f"{path}.blocks.{b}", f"{key}.deblocks.{b}", layout=layout)


def depth_net(params: dict, key: str) -> Names:
    """The depth net, whose deformable convolution is in the depth's or in the context's branch."""
    path, in_context = "view.depth_net", "norm" in params["deform"]
    yield from conv_norm(f"{path}.reduce", f"{key}.reduce_conv")
    if not in_context:
        yield Named(f"{path}.context", f"{key}.context_conv")
    yield Named(f"{path}.camera_norm", f"{key}.bn")
    for branch in ("depth", "context"):
        for layer in ("fc1", "fc2"):
            yield Named(f"{path}.{branch}_mlp.{layer}", f"{key}.{branch}_mlp.{layer}")
        for layer in ("reduce", "expand"):
            yield Named(f"{path}.{branch}_gate.{layer}", f"{key}.{branch}_se.conv_{layer}")
    blocks = len(params["blocks"])
    for b in range(blocks):
        for i in range(2):
            yield from numbered(f"{path}.blocks.{b}.layers.{i}", f"{key}.depth_conv.{b}", i + 1)
    aspp, *deform, last = (f"{key}.depth_conv.{blocks + i}" for i in range(2 if in_context else 3))
    for i in range(len(params["aspp"]["branches"])):
        yield from conv_norm(f"{path}.aspp.branches.{i}", f"{aspp}.aspp{i + 1}", "atrous_conv", "bn")
    yield from conv_norm(f"{path}.aspp.pooled", f"{aspp}.global_avg_pool", "1", "2")
    yield from numbered(f"{path}.aspp.merge", aspp, 1)
    for place in deform:
        yield from _deform_conv(f"{path}.deform", place)
    yield Named(f"{path}.depth", last)
    if in_context:
        yield from _deform_conv(f"{path}.deform.conv", f"{key}.context_conv.0")
        yield Named(f"{path}.deform.norm", f"{key}.context_conv.1")
        yield Named(f"{path}.context", f"{key}.context_conv.3")


def _deform_conv(path: str, key: str) -> Names:
    yield Named(path, key)
    yield Named(f"{path}.offset", f"{key}.conv_offset")


def _aggregation() -> Names:
    path, key = "view.aggregation", "backbone.depth_aggregation_net"
    yield from conv_norm(f"{path}.reduce", f"{key}.reduce_conv")
    for i in range(2):
        yield from conv_norm(f"{path}.block.{i}", f"{key}.conv", str(3 * i), str(3 * i + 1))
    yield Named(f"{path}.out", f"{key}.out_conv.0")


def _matrix(params: dict) -> Names:
    path, key = "view.matrix", "backbone.horiconv"
    for i in range(2):
        yield Named(f"{path}.merge.{i}", f"{key}.merger.{2 * i}")
    yield from conv_norm(f"{path}.reduce", f"{key}.reduce_conv", layout="row")
    for b, block in enumerate(params["blocks"]):
        for i in range(len(block)):
            place = f"{path}.blocks.{b}.{i}", f"{key}.conv{b + 1}"
            yield from conv_norm(*place, str(3 * i), str(3 * i + 1), layout="row")
    yield from conv_norm(f"{path}.out", f"{key}.out_conv", layout="row")
    weigher = "backbone.depth_reducer.vertical_weighter"
    yield from conv_norm(f"{path}.rows.hidden", weigher)
    yield Named(f"{path}.rows.out", f"{weigher}.3")


def detector_buffers(config: bevdepth.Config) -> dict[str, Tensor]:
    """The view transform's buffers, which follow from the configuration."""
    view = config.grid
    step, first, count = grid(view)
    points = frustum(view, torch.arange(*view.depth_m))
    found = {"voxel_size": step, "voxel_coord": first, "voxel_num": count}
    found["frustum"] = torch.cat((points, torch.ones_like(points[..., :1])), -1)  # homogeneous
    if config.matrix is not None:
        x, y = (
            torch.linspace(low, high - step, round((high - low) / step)) + step / 2
            for low, high, step in (view.x_m, view.y_m)
        )
        found["bev_anchors"] = torch.stack(torch.meshgrid(x, y, indexing="ij"), -1)
    return {f"backbone.{name}": buffer for name, buffer in found.items()}
