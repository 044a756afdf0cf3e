"""Swin transformer (Liu et al. 2021, arXiv 2103.14030), numerically mmdetection's, tokens kept as [M T C].

M images, T = H W tokens of a stage, S = window^2 tokens of a window, L windows of an image, A heads.
Tokens that are used twice have no four axes: on the way to a convolution inductor takes [M H W C] for channels, rows and columns
and stores them with the rows innermost, which made a third of the fused kernels several times as slow (docs/benchmarks.md).
Source: mmdetection mmdet/models/backbones/swin.py; golden case bevfusion_lidar_cam.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from bevfn import rng
from bevfn.distributed import Train
from bevfn.layers import conv, layer_norm, linear, remat


@dataclass(frozen=True)
class Config:
    """The defaults are Swin-T as BEVFusion uses it."""

    patch: int = 4  # pixels per side of a token of stage 0
    channels: int = 96  # of stage 0; every later stage has twice as many
    depths: tuple[int, ...] = (2, 2, 6, 2)  # blocks per stage
    heads: tuple[int, ...] = (3, 6, 12, 24)  # per stage
    window: int = 7  # tokens per side
    mlp_ratio: int = 4
    drop_path: float = 0.2  # rate of the last block; the first has 0, linear in between
    out_stages: tuple[int, ...] = (1, 2, 3)
    recompute: bool = False  # every block once more for the gradient, see `layers.remat`

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.heads):
            raise ValueError(f"heads {self.heads} must give one number per stage of depths {self.depths}")
        for stage, heads in enumerate(self.heads):
            if self.width(stage) % heads:
                raise ValueError(
                    f"heads[{stage}] = {heads} does not divide the {self.width(stage)} channels of its stage"
                )
        if any(not 0 <= stage < len(self.depths) for stage in self.out_stages):
            raise ValueError(f"out_stages {self.out_stages} must lie in 0..{len(self.depths) - 1}")

    def width(self, stage: int) -> int:
        """Channels of a stage."""
        return self.channels * 2**stage

    @property
    def stride(self) -> int:
        """Image pixels per token of the last stage."""
        return self.patch * 2 ** (len(self.depths) - 1)


MINI = Config(channels=16, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=4)  # for tests and small machines


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, {}): upstream's initialisation from scratch."""
    stages: list[dict] = []
    for stage, depth in enumerate(config.depths):
        width = config.width(stage)
        blocks = [_init_block(width, config.heads[stage], config, generator) for _ in range(depth)]
        stages.append({"blocks": blocks})
        if stage + 1 < len(config.depths):
            reduction = linear.init(4 * width, 2 * width, bias=False, generator=generator, std=0.02)
            stages[-1]["downsample"] = {"norm": layer_norm.init(4 * width), "reduction": reduction}
    params = {
        "patch_embed": {
            "conv": conv.init(3, config.channels, config.patch, bias=True, generator=generator),
            "norm": layer_norm.init(config.channels),
        },
        "stages": stages,
        "out_norms": [layer_norm.init(config.width(stage)) for stage in config.out_stages],
    }
    return params, {}


def _init_block(width: int, heads: int, config: Config, generator: torch.Generator) -> dict:
    # Upstream's normal distribution is truncated at +-2, which is 100 standard deviations.
    table = torch.empty((2 * config.window - 1) ** 2, heads).normal_(0, 0.02, generator=generator)
    hidden = config.mlp_ratio * width
    return {
        "norm1": layer_norm.init(width),
        "attn": {
            "qkv": linear.init(width, 3 * width, bias=True, generator=generator, std=0.02),
            "bias_table": table,
            "proj": linear.init(width, width, bias=True, generator=generator, std=0.02),
        },
        "norm2": layer_norm.init(width),
        "mlp": {
            "fc1": linear.init(width, hidden, bias=True, generator=generator, std=0.02),
            "fc2": linear.init(hidden, width, bias=True, generator=generator, std=0.02),
        },
    }


def apply(params: dict, images: Tensor, *, config: Config, train: Train, key: Tensor | None = None) -> list[Tensor]:
    """images [M 3 H W], normalised, any float dtype -> one [M C H/s W/s] per out stage, channels-last in memory.

    `key` drives the drop path of training; None switches it off. Raises ValueError if H or W is no multiple of
    `config.stride`.
    """
    height, width = images.shape[-2:]
    if height % config.stride or width % config.stride:
        raise ValueError(
            f"images of {height}x{width} pixels: choose a height and width that are multiples of {config.stride}"
        )
    x = conv.apply(params["patch_embed"]["conv"], images, stride=config.patch, padding=0)  # M C H W
    size = (x.shape[2], x.shape[3])
    x = layer_norm.apply(params["patch_embed"]["norm"], x.flatten(2).transpose(1, 2))  # M T C
    outputs: list[Tensor] = []
    index, last = 0, max(sum(config.depths) - 1, 1)
    # [blocks 2 M], one draw for all blocks: a draw for each branch was an eighth of the train step's nodes.
    noise = None if key is None or not train else rng.stored(rng.uniform(key, (last + 1, 2, len(images))))
    for stage, stage_params in enumerate(params["stages"]):
        for place, block in enumerate(stage_params["blocks"]):
            shift = config.window // 2 if place % 2 else 0
            rate = config.drop_path * index / last
            through = partial(
                _stateless_block, size=size, heads=config.heads[stage], window=config.window, shift=shift, rate=rate
            )
            drawn = None if noise is None or rate == 0.0 else noise[index]
            x, _ = remat.apply(through, block, {}, x, drawn, recompute=config.recompute)
            index += 1
        if stage in config.out_stages:
            norm = params["out_norms"][config.out_stages.index(stage)]
            outputs.append(layer_norm.apply(norm, x).transpose(1, 2).unflatten(2, size))  # M C H W
        if "downsample" in stage_params:
            x = merge_patches(stage_params["downsample"], x, size)
            size = (size[0] // 2, size[1] // 2)
    return outputs


def _stateless_block(params: dict, state: dict, x: Tensor, noise: Tensor | None, **shape: Any) -> tuple[Tensor, dict]:
    return _block(params, x, noise=noise, **shape), state


def _block(
    params: dict,
    x: Tensor,
    *,
    size: tuple[int, int],
    heads: int,
    window: int,
    shift: int,
    rate: float,
    noise: Tensor | None,  # [2 M] in [0, 1)
) -> Tensor:
    attention, mlp = (None, None) if noise is None else noise
    y = layer_norm.apply(params["norm1"], x).unflatten(1, size)
    y = window_attention(params["attn"], y, heads=heads, window=window, shift=shift).flatten(1, 2)
    x = x + _drop_path(y, rate, attention)
    y = linear.apply(params["mlp"]["fc1"], layer_norm.apply(params["norm2"], x))
    y = linear.apply(params["mlp"]["fc2"], F.gelu(y))
    return x + _drop_path(y, rate, mlp)


def _drop_path(y: Tensor, rate: float, noise: Tensor | None) -> Tensor:
    """y [M T C], of whole images where their `noise` [M] is below the rate 0, of others scaled up (Huang et al. 2016)."""
    if noise is None:
        return y
    return torch.where(
        (noise >= rate)[:, None, None], y * (1.0 / (1.0 - rate)), torch.zeros((), dtype=y.dtype, device=y.device)
    )


def merge_patches(params: dict, x: Tensor, size: tuple[int, int]) -> Tensor:
    """x [M T C] of `size` (H, W) -> [M T/4 2C]; weights are for 4C vectors ordered (channel, row, column) as nn.Unfold's."""
    norm = {name: rearrange(w, "(c p) -> (p c)", p=4) for name, w in params["norm"].items()}
    reduction = {"weight": rearrange(params["reduction"]["weight"], "o (c p) -> o (p c)", p=4)}
    # Not the tokens, whose channels lie together.
    x = rearrange(x, "m (h r w s) c -> m (h w) (r s c)", h=size[0] // 2, w=size[1] // 2, r=2, s=2)
    return linear.apply(reduction, layer_norm.apply(norm, x))


def window_attention(params: dict, x: Tensor, *, heads: int, window: int, shift: int) -> Tensor:
    """Attention of x [M H W C] within windows of the map rolled up and left by `shift` and padded to full windows.

    Padding holds zero tokens at the right and bottom, before the roll, which attend and are attended to like others; so
    their queries, keys and values are the bias, and neither they nor their outputs need a product with a weight.
    """
    M, H, W, C = x.shape
    size, rows, columns = C // heads, -(-H // window), -(-W // window)
    # 1/sqrt(size) scales the queries, as part of the weight.
    scale = torch.where(torch.arange(3 * C, device=x.device) < C, size**-0.5, 1.0)
    qkv = {"weight": params["qkv"]["weight"] * scale[:, None], "bias": params["qkv"]["bias"] * scale}
    y = linear.apply(qkv, x)  # M H W 3C
    fill = qkv["bias"].to(x.dtype)
    y = _roll_and_pad(y, 1, rows * window, shift, fill)
    y = _roll_and_pad(y, 2, columns * window, shift, fill)
    y = rearrange(y, "m (r i) (c j) (qkv a s) -> (qkv m r c a) (i j) s", i=window, j=window, qkv=3, a=heads)
    q, k, v = y.chunk(3)  # MLA S size
    logits = torch.bmm(q, k.transpose(1, 2)).view(M, rows * columns, heads, window**2, window**2)  # M L A S S
    bias = position_bias(params["bias_table"], window)  # A S S
    if shift:
        bias = bias + shift_mask(rows, columns, window, shift, x.device)[:, None]  # L A S S
    weight = torch.softmax(logits + bias, -1).to(x.dtype)  # the bias is float32, and so the sum
    y = torch.bmm(weight.view(-1, window**2, window**2), v)  # MLA S size
    y = rearrange(y, "(m r c a) (i j) s -> m (r i) (c j) (a s)", m=M, r=rows, c=columns, i=window)
    return linear.apply(params["proj"], _crop_and_unroll(_crop_and_unroll(y, 1, H, shift), 2, W, shift))


def position_bias(table: Tensor, window: int) -> Tensor:
    """[A S S] float32 from the table [(2 window - 1)^2 A]: row (2w-1)(qi - ki + w - 1) + (qj - kj + w - 1).

    A product with a 0/1 matrix, which picks the same numbers: its gradient needs no scatter, and inductor of torch 2.13
    writes the scatter of `index_select`'s gradient out of bounds (index arithmetic inside a transposed tile).
    """
    place = torch.arange(window, device=table.device)
    offset = place[:, None] - place + window - 1  # query key
    index = offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]  # qi qj ki kj
    pick = index.reshape(-1, 1) == torch.arange(table.shape[0], device=table.device)  # S*S T
    return torch.mm(table.t(), pick.to(table.dtype).t()).view(-1, window**2, window**2)


def shift_mask(rows: int, columns: int, window: int, shift: int, device: torch.device) -> Tensor:
    """[L S S]: -100 between tokens that the roll brought together from opposite edges of the map, else 0."""
    regions = []
    for count in (rows, columns):
        place = torch.arange(count * window, device=device)
        edge = count * window
        regions.append((place >= edge - window).int() + (place >= edge - shift).int())
    region = regions[0][:, None] * 3 + regions[1]  # H W
    region = rearrange(region, "(r i) (c j) -> (r c) (i j)", i=window, j=window)  # L S
    member = (region[:, :, None] == torch.arange(9, dtype=region.dtype, device=device)).float()  # L S 9
    # A product, which a compiler stores: inductor computed the regions again, by divisions of indices, for every logit.
    return (torch.bmm(member, member.transpose(1, 2)) - 1.0) * 100.0


def _roll_and_pad(x: Tensor, dim: int, size: int, shift: int, fill: Tensor) -> Tensor:
    """x, padded at its end to `size` rows of `fill` [C], moved towards its start by `shift`; of fewer rows than `shift` the
    padding's start comes to the end too."""
    rows = x.shape[dim]
    padding, behind = size - rows, max(0, shift - rows)

    def pad(count: int) -> list[Tensor]:
        return [fill.expand(*x.shape[:dim], count, *x.shape[dim + 1 :])] if count else []

    wrapped, kept = x.split([shift, rows - shift], dim) if 0 < shift < rows else (x, None)
    if not shift:
        wrapped, kept = None, x
    pieces = [
        *([] if kept is None else [kept]),
        *pad(padding - behind),
        *([] if wrapped is None else [wrapped]),
        *pad(behind),
    ]
    return torch.cat(pieces, dim) if len(pieces) > 1 else x


def _crop_and_unroll(x: Tensor, dim: int, size: int, shift: int) -> Tensor:
    """The inverse of `_roll_and_pad`."""
    padding = x.shape[dim] - size
    if 0 < shift < size:
        kept, _, wrapped = x.split([size - shift, padding, shift], dim)
        return torch.cat([wrapped, kept], dim)
    return x.narrow(dim, max(0, x.shape[dim] - shift) if shift else 0, size) if padding else x
