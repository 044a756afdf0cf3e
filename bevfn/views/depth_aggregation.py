"""BEVDepth's depth refinement ("da", Li et al. 2022, section 4): convolutions over the lifted volume before pooling.

Each image row of the volume is a map of columns and depths, on which 3x3 convolutions run with shared weights: depth
that is wrong by some bins is moved along its ray. All in float32, as upstream; the volume is stored (150 MB a frame).

Source: BEVDepth bevdepth/layers/backbones/base_lss_fpn.py, `DepthAggregation`; no golden case has it.
"""

import torch
from torch import Tensor

from bevfn import tree
from bevfn.distributed import Train
from bevfn.layers import conv, conv_norm


def init(channels: int, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state) of 3x3 convolutions with torch's default initialisation."""
    layers = [conv_norm.init(channels, channels, 3, generator=generator) for _ in range(3)]
    out = conv.init(channels, channels, 3, bias=True, generator=generator)
    return tree.unzip({"reduce": layers[0], "block": layers[1:], "out": out})


def apply(params: dict, state: dict, depth: Tensor, context: Tensor, *, train: Train) -> tuple[Tensor, dict]:
    """depth [M D H W], context [M C H W] -> (refined volume [M C D H W], new state), float32."""
    volume = torch.einsum("mdhw,mchw->mhcwd", depth, context)
    M, H, C, W, D = volume.shape
    rows = volume.reshape(M * H, C, W, D)
    x, reduced = conv_norm.apply(params["reduce"], state["reduce"], rows, train=train)
    y, seen = conv_norm.chain(params["block"], state["block"], x, train=train)
    y = conv.apply(params["out"], y + x)  # M*H C W D
    return y.view(M, H, C, W, D).permute(0, 2, 4, 1, 3), {"reduce": reduced, "block": seen}
