"""Foreign checkpoint names: one explicit list per published model, generated module by module.

An `Entry` joins one leaf of ours to one upstream key and says how the layouts differ. The detectors are those of
mmdetection3d's projects/BEVFusion; `swin-nuimages` is a Swin image backbone on its own, whose file is in the naming of
the original Swin repository or in mmdet's. BEVDepth's family is in `names_bevdepth`.

Source: ../shared/goldens/bevfusion_lidar_cam/README.md part C and both manifest.json (keys and shapes).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bevfn.upstream import names_bevdepth
from bevfn.upstream.entries import Entry, Layout, Naming
from bevfn.upstream.entries import conv_norm as _conv_norm
from bevfn.upstream.entries import normalisation as _norm
from bevfn.upstream.entries import weight_bias as _weight_bias

MODELS = ("bevfusion-lidar", "bevfusion-lidar-camera", "swin-nuimages", *names_bevdepth.MODELS)


@dataclass(frozen=True)
class Sizes:
    """Widths and depths that decide names, shapes and derived buffers. The defaults are the published models'."""

    point_channels: int = 5
    sparse: tuple[int, ...] = (16, 32, 64, 128)  # channels of the sparse encoder's stages
    sparse_blocks: int = 2
    sparse_out: int = 256  # channels of the LiDAR BEV map: channels of conv_out x 2 heights
    swin: int = 96  # channels of the first Swin stage
    swin_depths: tuple[int, ...] = (2, 2, 6, 2)
    swin_heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7  # tokens
    neck: int = 256  # channels of the image neck
    depth_transform: tuple[int, ...] = (8, 32, 64)
    context: int = 80  # channels lifted to the BEV grid
    image: tuple[int, int] = (256, 704)  # H W, pixels of the network's input
    feature: tuple[int, int] = (32, 88)  # H W of the neck's finest map
    depth: tuple[float, float, float] = (1.0, 60.0, 0.5)  # lower, upper, step, m
    grid: tuple[tuple[float, float, float], ...] = ((-54.0, 54.0, 0.3), (-54.0, 54.0, 0.3), (-10.0, 10.0, 20.0))  # m
    fused: int = 256  # channels of the fused map
    second: tuple[int, ...] = (128, 256)
    second_layers: int = 6  # per block, the strided one included
    second_fpn: tuple[int, ...] = (256, 256)
    head: int = 128
    head_ffn: int = 256
    head_hidden: int = 64
    classes: int = 10
    bevdepth: names_bevdepth.Sizes = field(default_factory=names_bevdepth.Sizes)
    """of BEVDepth, MatrixVT and the ResNet; nothing above concerns them"""

    @property
    def depth_bins(self) -> int:
        return round((self.depth[1] - self.depth[0]) / self.depth[2])


PUBLISHED = Sizes()


def entries(model: str, sizes: Sizes, naming: Naming = "mmdet") -> list[Entry]:
    """Every leaf and every carried key of `model`, in upstream's order; `naming` concerns the lone Swin only."""
    if model in names_bevdepth.MODELS:
        return names_bevdepth.entries(model, sizes.bevdepth)
    if model == "swin-nuimages":
        return _swin(sizes, "camera.backbone", "", naming)
    camera = model == "bevfusion-lidar-camera"
    found = []
    if camera:
        found += _swin(sizes, "camera.backbone", "img_backbone.", "mmdet")
        found += _lss_fpn(sizes) + _view(sizes)
    found += _sparse_encoder(sizes)
    if camera:
        found += _conv_norm("fuser", "fusion_layer", (sizes.fused, sizes.context + sizes.sparse_out, 3, 3))
    return found + _second(sizes) + _second_fpn(sizes) + _head(sizes)


def has_sparse_kernels(model: str) -> bool:
    """Whether a file of `model` has kernels in one of two layouts (see Entry)."""
    return any(entry.layout == "sparse" for entry in entries(model, PUBLISHED))


def derived(model: str, sizes: Sizes, naming: Naming = "mmdet") -> dict[str, Tensor]:
    """Upstream's stored buffers that follow from the configuration, by key: ours are computed, never loaded."""
    if model in names_bevdepth.MODELS:
        return names_bevdepth.derived(model, sizes.bevdepth)
    if model == "bevfusion-lidar":
        return {}
    stage, attention = ("stages", "attn.w_msa") if naming == "mmdet" else ("layers", "attn")
    prefix = "" if model == "swin-nuimages" else "img_backbone."
    index = _relative_position_index(sizes.window)
    found = {
        f"{prefix}{stage}.{i}.blocks.{j}.{attention}.relative_position_index": index.clone()
        for i, depth in enumerate(sizes.swin_depths)
        for j in range(depth)
    }
    if model == "bevfusion-lidar-camera":
        found["view_transform.dx"] = torch.tensor([step for _, _, step in sizes.grid])
        found["view_transform.bx"] = torch.tensor([lower + step / 2 for lower, _, step in sizes.grid])
        found["view_transform.nx"] = torch.tensor([round((upper - lower) / step) for lower, upper, step in sizes.grid])
        found["view_transform.frustum"] = _frustum(sizes)
    return found


def _relative_position_index(window: int) -> Tensor:
    """[T T] int64, T = window^2 row-major tokens: row of the bias table for query q and key k."""
    row, column = torch.arange(window * window) // window, torch.arange(window * window) % window
    span = 2 * window - 1
    down = row[:, None] - row[None, :] + window - 1
    return span * down + column[:, None] - column[None, :] + window - 1


def _frustum(sizes: Sizes) -> Tensor:
    """[D H W 3] float32: pixel x, pixel y, depth m; the outer cells' centres lie on the image's border pixels."""
    (image_h, image_w), (H, W) = sizes.image, sizes.feature
    depth = sizes.depth[0] + sizes.depth[2] * torch.arange(sizes.depth_bins)
    shape = (sizes.depth_bins, H, W)
    x = torch.linspace(0, image_w - 1, W).expand(shape)
    y = torch.linspace(0, image_h - 1, H)[:, None].expand(shape)
    return torch.stack((x, y, depth[:, None, None].expand(shape)), -1)


# --- one function per module -------------------------------------------------------------------------------------


def _swin(sizes: Sizes, path: str, prefix: str, naming: Naming) -> list[Entry]:
    mmdet = naming == "mmdet"
    stage, attention = ("stages", "attn.w_msa") if mmdet else ("layers", "attn")
    projection = "projection" if mmdet else "proj"
    fc1, fc2 = ("ffn.layers.0.0", "ffn.layers.1") if mmdet else ("mlp.fc1", "mlp.fc2")
    C = sizes.swin
    found = _weight_bias(f"{path}.patch_embed.conv", f"{prefix}patch_embed.{projection}", (C, 3, 4, 4), bias=True)
    found += _norm(f"{path}.patch_embed.norm", f"{prefix}patch_embed.norm", C)
    for i, (depth, heads) in enumerate(zip(sizes.swin_depths, sizes.swin_heads)):
        C = sizes.swin * 2**i
        for j in range(depth):
            ours, key = f"{path}.stages.{i}.blocks.{j}", f"{prefix}{stage}.{i}.blocks.{j}"
            table = ((2 * sizes.window - 1) ** 2, heads)
            found += _norm(f"{ours}.norm1", f"{key}.norm1", C)
            bias_table = f"{key}.{attention}.relative_position_bias_table"
            found += [Entry("params", f"{ours}.attn.bias_table", bias_table, table)]
            found += _weight_bias(f"{ours}.attn.qkv", f"{key}.{attention}.qkv", (3 * C, C), bias=True)
            found += _weight_bias(f"{ours}.attn.proj", f"{key}.{attention}.proj", (C, C), bias=True)
            found += _norm(f"{ours}.norm2", f"{key}.norm2", C)
            found += _weight_bias(f"{ours}.mlp.fc1", f"{key}.{fc1}", (4 * C, C), bias=True)
            found += _weight_bias(f"{ours}.mlp.fc2", f"{key}.{fc2}", (C, 4 * C), bias=True)
        if i + 1 < len(sizes.swin_depths):
            ours, key = f"{path}.stages.{i}.downsample", f"{prefix}{stage}.{i}.downsample"
            layout: Layout = "same" if mmdet else "merged"
            found += _norm(f"{ours}.norm", f"{key}.norm", 4 * C, layout=layout)
            found += _weight_bias(f"{ours}.reduction", f"{key}.reduction", (2 * C, 4 * C), bias=False, layout=layout)
    for k in range(1, len(sizes.swin_depths)):  # an ImageNet classifier has none: they stay at 1 and 0
        found += _norm(f"{path}.out_norms.{k - 1}", f"{prefix}norm{k}", sizes.swin * 2**k, optional=prefix == "")
    return found


def _lss_fpn(sizes: Sizes) -> list[Entry]:
    levels = [sizes.swin * 2**k for k in range(1, len(sizes.swin_depths))]
    laterals: list[Entry] = []
    outputs: list[Entry] = []
    for l, channels in enumerate(levels[:-1]):
        coarser = sizes.neck if l + 2 < len(levels) else levels[-1]  # the level above, already reduced unless the last
        for found, ours, key, shape in (
            (laterals, "laterals", "lateral_convs", (sizes.neck, channels + coarser, 1, 1)),
            (outputs, "outputs", "fpn_convs", (sizes.neck, sizes.neck, 3, 3)),
        ):
            found += _conv_norm(f"camera.neck.{ours}.{l}", f"img_neck.{key}.{l}", shape, conv="conv", norm="bn")
    return laterals + outputs


def _view(sizes: Sizes) -> list[Entry]:
    found = []

    def sequence(ours: str, key: str, shapes: Iterable[tuple[int, ...]], bias: bool) -> None:
        for k, shape in enumerate(shapes):  # upstream's Sequential is conv, norm, ReLU, conv, norm, ReLU, ...
            path = f"camera.view.{ours}.{k}"
            found.extend(
                _conv_norm(path, f"view_transform.{key}", shape, conv=str(3 * k), norm=str(3 * k + 1), bias=bias)
            )

    a, b, c = sizes.depth_transform
    C = sizes.neck
    sequence("depth_transform", "dtransform", ((a, 1, 1, 1), (b, a, 5, 5), (c, b, 5, 5)), True)
    sequence("depth_net", "depthnet", ((C, C + c, 3, 3), (C, C, 3, 3)), True)
    out = (sizes.depth_bins + sizes.context, C, 1, 1)
    found += _weight_bias("camera.view.depth_net.2.conv", "view_transform.depthnet.6", out, bias=True)
    sequence("downsample", "downsample", [(sizes.context, sizes.context, 3, 3)] * 3, False)
    return found


def _sparse_encoder(sizes: Sizes) -> list[Entry]:
    prefix, channels = "pts_middle_encoder", sizes.sparse
    found = _conv_norm(
        "lidar.conv_input", f"{prefix}.conv_input", (3, 3, 3, sizes.point_channels, channels[0]), layout="sparse"
    )
    for i, C in enumerate(channels):
        key = f"{prefix}.encoder_layers.encoder_layer{i + 1}"
        for j in range(sizes.sparse_blocks):
            for n in ("1", "2"):
                found += _conv_norm(
                    f"lidar.stages.{i}.blocks.{j}",
                    f"{key}.{j}",
                    (3, 3, 3, C, C),
                    conv=f"conv{n}",
                    norm=f"bn{n}",
                    layout="sparse",
                    names=(f"conv{n}", f"norm{n}"),
                )
        if i + 1 < len(channels):
            path, down = f"lidar.stages.{i}.down", f"{key}.{sizes.sparse_blocks}"
            found += _conv_norm(path, down, (3, 3, 3, C, channels[i + 1]), layout="sparse")
    out = (1, 1, 3, channels[-1], sizes.sparse_out // 2)
    return found + _conv_norm("lidar.conv_out", f"{prefix}.conv_out", out, layout="sparse")


def _second(sizes: Sizes) -> list[Entry]:
    found, channels = [], sizes.fused
    for b, width in enumerate(sizes.second):
        for l in range(sizes.second_layers):
            path, key = f"bev.backbone.blocks.{b}.{l}", f"pts_backbone.blocks.{b}"
            found += _conv_norm(path, key, (width, channels, 3, 3), conv=str(3 * l), norm=str(3 * l + 1))
            channels = width
    return found


def _second_fpn(sizes: Sizes) -> list[Entry]:
    found = []
    for b, (width, out) in enumerate(zip(sizes.second, sizes.second_fpn)):
        # The finest level is a plain 1x1 convolution, the others transposed: kernel [in out k k].
        shape = (out, width, 1, 1) if b == 0 else (width, out, 2**b, 2**b)
        found += _conv_norm(f"bev.neck.blocks.{b}", f"pts_neck.deblocks.{b}", shape, channels=out)
    return found


def _head(sizes: Sizes) -> list[Entry]:
    C, prefix = sizes.head, "bbox_head"
    found = _weight_bias("head.shared", f"{prefix}.shared_conv", (C, sum(sizes.second_fpn), 3, 3), bias=True)
    found += _conv_norm("head.heatmap.hidden", f"{prefix}.heatmap_head.0", (C, C, 3, 3), conv="conv", norm="bn")
    found += _weight_bias("head.heatmap.out", f"{prefix}.heatmap_head.1", (sizes.classes, C, 3, 3), bias=True)
    encoding = (C, sizes.classes)
    found += _weight_bias("head.class_encoding", f"{prefix}.class_encoding", encoding, bias=True, layout="sequence")
    found += _decoder_layer(sizes, "head.decoder.0", f"{prefix}.decoder.0")
    outputs = {"center": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2, "heatmap": sizes.classes}
    for task, count in outputs.items():
        path, key = f"head.predict.0.{task}", f"{prefix}.prediction_heads.0.{task}"
        hidden, out = (sizes.head_hidden, C), (count, sizes.head_hidden)
        found += _conv_norm(f"{path}.hidden", f"{key}.0", hidden, conv="conv", norm="bn", layout="sequence")
        found += _weight_bias(f"{path}.out", f"{key}.1", out, bias=True, layout="sequence")
    return found


def _decoder_layer(sizes: Sizes, path: str, key: str) -> list[Entry]:
    C, found = sizes.head, []
    for attention in ("self_attn", "cross_attn"):
        ours, theirs = f"{path}.{attention}", f"{key}.{attention}.attn"
        found += [
            Entry("params", f"{ours}.in_proj.weight", f"{theirs}.in_proj_weight", (3 * C, C)),
            Entry("params", f"{ours}.in_proj.bias", f"{theirs}.in_proj_bias", (3 * C,)),
        ]
        found += _weight_bias(f"{ours}.out_proj", f"{theirs}.out_proj", (C, C), bias=True)
    found += _weight_bias(f"{path}.ffn.fc1", f"{key}.ffn.layers.0.0", (sizes.head_ffn, C), bias=True)
    found += _weight_bias(f"{path}.ffn.fc2", f"{key}.ffn.layers.1", (C, sizes.head_ffn), bias=True)
    for k in range(3):
        found += _norm(f"{path}.norms.{k}", f"{key}.norms.{k}", C)
    for ours, theirs in (("self_position", "self_posembed"), ("cross_position", "cross_posembed")):
        ours, theirs = f"{path}.{ours}", f"{key}.{theirs}.position_embedding_head"
        found += _conv_norm(ours, theirs, (C, 2), bias=True, layout="sequence", names=("fc1", "norm"))
        found += _weight_bias(f"{ours}.fc2", f"{theirs}.3", (C, C), bias=True, layout="sequence")
    return found
