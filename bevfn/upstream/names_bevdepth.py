"""Foreign checkpoint names of BEVDepth's family: the detectors as BEVDepth's Lightning module and its EMA callback write
them (prefix `model.`), and torchvision's ResNet-50.

Source: ../shared/goldens/bevdepth_r50_2key and matrixvt_r50, README.md and manifest.json (keys and shapes); the keys of
depth aggregation, which no golden case has, from BEVDepth bevdepth/layers/backbones/base_lss_fpn.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bevfn.upstream.entries import Entry, Layout, conv_norm, normalisation, weight_bias

_FRAMES = {"bevdepth-1key": 1, "bevdepth-2key": 2, "bevdepth-4key": 4, "bevdepth-2key-da": 2, "matrixvt": 1}
MODELS = (*_FRAMES, "resnet50")


@dataclass(frozen=True)
class Sizes:
    """Widths and depths that decide names, shapes and derived buffers. The defaults are the published models'."""

    resnet: int = 64  # channels of the stem and of the first stage's 3x3
    resnet_blocks: tuple[int, ...] = (3, 4, 6, 3)
    neck: int = 128  # channels of each level of the image neck
    net: int = 512  # channels of the depth net
    net_blocks: int = 3
    atrous: int = 3  # dilated convolutions of the ASPP
    deform_groups: int = 4
    context: int = 80
    image: tuple[int, int] = (256, 704)  # H W, pixels of the network's input
    stride: int = 16
    depth: tuple[float, float, float] = (2.0, 58.0, 0.5)  # lower, upper, step, m
    grid: tuple[tuple[float, float, float], ...] = ((-51.2, 51.2, 0.8), (-51.2, 51.2, 0.8), (-5.0, 3.0, 8.0))  # m
    row: int = 512  # channels of MatrixVT's convolutions along a row
    bev: int = 160  # channels of the BEV backbone's first stage
    bev_blocks: tuple[int, ...] = (2, 2, 2)
    bev_neck: int = 64  # channels of each level of the BEV neck
    head: int = 64
    tasks: tuple[int, ...] = (1, 2, 2, 1, 2, 2)  # classes of each

    @property
    def depth_bins(self) -> int:
        return round((self.depth[1] - self.depth[0]) / self.depth[2])


def entries(model: str, sizes: Sizes) -> list[Entry]:
    """Every leaf and every carried key of `model`, in upstream's order."""
    if model == "resnet50":
        return _resnet(sizes.resnet, sizes.resnet_blocks, 3, True, "image.backbone", "")
    found = _resnet(sizes.resnet, sizes.resnet_blocks, 3, True, "image.backbone", "backbone.img_backbone.")
    stages = [sizes.resnet * 4 * 2**s for s in range(len(sizes.resnet_blocks))]
    found += _second_fpn("image.neck", "backbone.img_neck", stages, sizes.neck, (0.25, 0.5, 1, 2))
    found += _depth_net(sizes)
    if model.endswith("-da"):
        found += _aggregation(sizes)
    if model == "matrixvt":
        found += _matrix(sizes)
    lifted = _FRAMES[model] * sizes.context
    stages = [sizes.bev * 2**s for s in range(len(sizes.bev_blocks))]
    found += _head(sizes, sizes.bev_neck * (1 + len(stages)))
    found += _resnet(sizes.bev, sizes.bev_blocks, lifted, False, "bev.backbone", "head.trunk.")
    return found + _second_fpn("bev.neck", "head.neck", [lifted, *stages], sizes.bev_neck, (1, 2, 4, 8))


def derived(model: str, sizes: Sizes) -> dict[str, Tensor]:
    """Upstream's stored buffers that follow from the configuration, by key."""
    if model == "resnet50":
        return {}
    (image_h, image_w), D = sizes.image, sizes.depth_bins
    H, W = image_h // sizes.stride, image_w // sizes.stride
    x = torch.linspace(0, image_w - 1, W).expand(D, H, W)
    y = torch.linspace(0, image_h - 1, H)[:, None].expand(D, H, W)
    depth = torch.arange(*sizes.depth)[:, None, None].expand(D, H, W)
    cells = [round((upper - lower) / step) for lower, upper, step in sizes.grid]
    found = {
        "backbone.voxel_size": torch.tensor([step for _, _, step in sizes.grid]),
        "backbone.voxel_coord": torch.tensor([lower + step / 2 for lower, _, step in sizes.grid]),
        "backbone.voxel_num": torch.tensor(cells),
        "backbone.frustum": torch.stack((x, y, depth, torch.ones_like(x)), -1),
    }
    if model == "matrixvt":
        axes = [torch.linspace(lower, upper - step, n) + step / 2 for (lower, upper, step), n in zip(sizes.grid, cells)]
        found["backbone.bev_anchors"] = torch.stack(torch.meshgrid(axes[0], axes[1], indexing="ij"), -1)
    return found


# --- one function per module -------------------------------------------------------------------------------------


def _resnet(
    width: int, blocks: tuple[int, ...], channels_in: int, bottleneck: bool, path: str, prefix: str
) -> list[Entry]:
    found = weight_bias(f"{path}.stem.conv", f"{prefix}conv1", (width, channels_in, 7, 7), bias=False)
    found += normalisation(f"{path}.stem.norm", f"{prefix}bn1", width, statistics=True)
    channels = width
    for s, count in enumerate(blocks):
        inner, out = width * 2**s, width * 2**s * (4 if bottleneck else 1)
        for b in range(count):
            ours, key = f"{path}.stages.{s}.{b}", f"{prefix}layer{s + 1}.{b}"
            shapes = [(inner, channels, 1, 1), (inner, inner, 3, 3), (out, inner, 1, 1)]
            if not bottleneck:
                shapes = [(out, channels, 3, 3), (out, out, 3, 3)]
            for i, shape in enumerate(shapes):
                found += _numbered(f"{ours}.layers.{i}", key, i + 1, shape)
            # A basic block's first stage keeps its width at stride 1; a bottleneck's first block always widens.
            if b == 0 and (s > 0 or channels != out):
                found += conv_norm(f"{ours}.shortcut", f"{key}.downsample", (out, channels, 1, 1))
            channels = out
    return found


def _numbered(path: str, key: str, number: int, shape: tuple[int, ...]) -> list[Entry]:
    return conv_norm(path, key, shape, conv=f"conv{number}", norm=f"bn{number}")


def _second_fpn(path: str, key: str, widths: list[int], out: int, strides: tuple[float, ...]) -> list[Entry]:
    found = []
    for b, (width, stride) in enumerate(zip(widths, strides)):
        size = round(max(stride, 1 / stride))
        # Below 1 a strided convolution; else a transposed one, kernel [in out k k], which for k = 1 is ours transposed.
        shape = (width, out, size, size) if stride > 1 else (out, width, size, size)
        layout: Layout = "swapped" if stride == 1 else "same"
        found += conv_norm(f"{path}.blocks.{b}", f"{key}.deblocks.{b}", shape, channels=out, layout=layout)
    return found


def _depth_net(sizes: Sizes) -> list[Entry]:
    path, key, C = "view.depth_net", "backbone.depth_net", sizes.net
    found = conv_norm(f"{path}.reduce", f"{key}.reduce_conv", (C, 4 * sizes.neck, 3, 3), bias=True)
    found += weight_bias(f"{path}.context", f"{key}.context_conv", (sizes.context, C, 1, 1), bias=True)
    found += normalisation(f"{path}.camera_norm", f"{key}.bn", 27, statistics=True)
    for branch in ("depth", "context"):
        for layer, channels in (("fc1", 27), ("fc2", C)):
            found += weight_bias(
                f"{path}.{branch}_mlp.{layer}", f"{key}.{branch}_mlp.{layer}", (C, channels), bias=True
            )
        for layer in ("reduce", "expand"):
            gate = f"{path}.{branch}_gate.{layer}"
            found += weight_bias(gate, f"{key}.{branch}_se.conv_{layer}", (C, C, 1, 1), bias=True)
    for b in range(sizes.net_blocks):
        for i in range(2):
            found += _numbered(f"{path}.blocks.{b}.layers.{i}", f"{key}.depth_conv.{b}", i + 1, (C, C, 3, 3))
    aspp, deform, last = (f"{key}.depth_conv.{sizes.net_blocks + i}" for i in range(3))
    for i in range(1 + sizes.atrous):
        size = 1 if i == 0 else 3
        ours, theirs = f"{path}.aspp.branches.{i}", f"{aspp}.aspp{i + 1}"
        found += conv_norm(ours, theirs, (C, C, size, size), conv="atrous_conv", norm="bn")
    found += conv_norm(f"{path}.aspp.pooled", f"{aspp}.global_avg_pool", (C, C, 1, 1), conv="1", norm="2")
    found += _numbered(f"{path}.aspp.merge", aspp, 1, (C, (sizes.atrous + 2) * C, 1, 1))
    found += weight_bias(f"{path}.deform", deform, (C, C // sizes.deform_groups, 3, 3), bias=False)
    found += weight_bias(f"{path}.deform.offset", f"{deform}.conv_offset", (18, C, 3, 3), bias=True)
    return found + weight_bias(f"{path}.depth", last, (sizes.depth_bins, C, 1, 1), bias=True)


def _aggregation(sizes: Sizes) -> list[Entry]:
    path, key = "view.aggregation", "backbone.depth_aggregation_net"
    shape = (sizes.context, sizes.context, 3, 3)
    found = conv_norm(f"{path}.reduce", f"{key}.reduce_conv", shape)
    for i in range(2):
        found += conv_norm(f"{path}.block.{i}", f"{key}.conv", shape, conv=str(3 * i), norm=str(3 * i + 1))
    return found + weight_bias(f"{path}.out", f"{key}.out_conv.0", shape, bias=True)


def _matrix(sizes: Sizes) -> list[Entry]:
    path, C, width = "view.matrix", sizes.context, sizes.row
    key = "backbone.horiconv"

    def row(ours: str, theirs: str, out: int, channels: int, first: int = 0, bias: bool = False) -> list[Entry]:
        weights = Entry(
            "params", f"{path}.{ours}.conv.weight", f"{key}.{theirs}.{first}.weight", (out, channels, 1, 3), "row"
        )
        shift = [Entry("params", f"{path}.{ours}.conv.bias", f"{key}.{theirs}.{first}.bias", (out,))] if bias else []
        return [
            weights,
            *shift,
            *normalisation(f"{path}.{ours}.norm", f"{key}.{theirs}.{first + 1}", out, statistics=True),
        ]

    found = []
    for i in range(2):
        found += weight_bias(f"{path}.merge.{i}", f"{key}.merger.{2 * i}", (C, C, 1, 1), bias=True)
    found += row("reduce", "reduce_conv", width, C)
    for b in range(2):
        for i in range(2):
            found += row(f"blocks.{b}.{i}", f"conv{b + 1}", width, width, 3 * i)
    found += row("out", "out_conv", C, width, bias=True)
    weigher = "backbone.depth_reducer.vertical_weighter"
    found += conv_norm(f"{path}.rows.hidden", weigher, (C, C, 3, 3), bias=True)
    return found + weight_bias(f"{path}.rows.out", f"{weigher}.3", (1, C, 3, 3), bias=True)


def _head(sizes: Sizes, channels: int) -> list[Entry]:
    C = sizes.head
    found = conv_norm("head.shared", "head.shared_conv", (C, channels, 3, 3), conv="conv", norm="bn")
    for t, classes in enumerate(sizes.tasks):
        for name, count in {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2, "heatmap": classes}.items():
            path, key = f"head.tasks.{t}.{name}", f"head.task_heads.{t}.{name}"
            found += conv_norm(f"{path}.hidden", f"{key}.0", (C, C, 3, 3), conv="conv", norm="bn")
            found += weight_bias(f"{path}.out", f"{key}.1", (count, C, 3, 3), bias=True)
    return found
