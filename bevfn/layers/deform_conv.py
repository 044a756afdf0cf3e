"""A deformable convolution that makes its own offsets (Dai et al. 2017, arXiv 1703.06211), as mmcv's layer `DCN`.

Norm and ReLU go behind it as behind any convolution: `conv_norm.with_norm` and `conv_norm.finish`.
"""

import torch
from torch import Tensor

from bevfn.kernels.deform_conv import deform_conv
from bevfn.layers import conv


def init(channels_in: int, channels_out: int, kernel: int, *, generator: torch.Generator, groups: int = 1) -> dict:
    """{"weight": [C_out C_in/groups k k], "offset": {"weight", "bias"} of the convolution that makes the offsets}.

    As mmcv: weight Kaiming uniform (fan in, gain sqrt 2), offsets 0. There is no bias.
    """
    receptive = channels_in // groups * kernel * kernel
    bound = (6 / receptive) ** 0.5
    weight = torch.empty(channels_out, channels_in // groups, kernel, kernel)
    outputs = 2 * kernel * kernel
    return {
        "weight": weight.uniform_(-bound, bound, generator=generator),
        "offset": {"weight": torch.zeros(outputs, channels_in, kernel, kernel), "bias": torch.zeros(outputs)},
    }


def apply(params: dict, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B C_in H W] -> (y [B C_out H W], offset [B 2k^2 H W] in pixels), dtype of x.

    One set of offsets moves the channels of all `groups` that `init` was told.
    """
    padding = params["weight"].shape[-1] // 2
    offset = conv.apply(params["offset"], x, stride=1, padding=padding)
    return deform_conv(x, offset, None, params["weight"].to(x.dtype), stride=1, padding=padding), offset
