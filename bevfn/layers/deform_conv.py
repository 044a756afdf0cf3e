"""A deformable convolution that makes its own offsets (Dai et al. 2017, arXiv 1703.06211), as mmcv's layer `DCN`.

Norm and ReLU go behind it as behind any convolution: `conv_norm.with_norm` and `conv_norm.finish`.
"""

import torch
from torch import Tensor

from bevfn.kernels.deform_conv import deform_conv
from bevfn.layers import conv


def init(
    channels_in: int,
    channels_out: int,
    kernel: int,
    *,
    generator: torch.Generator,
    groups: int = 1,
    deform_groups: int = 1,
) -> dict:
    """{"weight": [C_out C_in/groups k k], "offset": {"weight", "bias"} of the convolution that makes the offsets}.

    As mmcv: weight Kaiming uniform (fan in, gain sqrt 2), offsets 0. There is no bias.
    """
    receptive = channels_in // groups * kernel * kernel
    bound = (6 / receptive) ** 0.5
    weight = torch.empty(channels_out, channels_in // groups, kernel, kernel)
    outputs = 2 * deform_groups * kernel * kernel
    return {
        "weight": weight.uniform_(-bound, bound, generator=generator),
        "offset": {"weight": torch.zeros(outputs, channels_in, kernel, kernel), "bias": torch.zeros(outputs)},
    }


def apply(params: dict, x: Tensor, *, stride: int = 1, padding: int | None = None) -> tuple[Tensor, Tensor]:
    """x [B C_in H W] -> (y [B C_out H' W'], offset [B 2DK H' W'] in pixels), dtype of x.

    The groups, and the deformable groups D, are those that `init` was told. padding: None keeps the size at stride 1.
    """
    padding = params["weight"].shape[-1] // 2 if padding is None else padding
    offset = conv.apply(params["offset"], x, stride=stride, padding=padding)
    return deform_conv(x, offset, None, params["weight"].to(x.dtype), stride=stride, padding=padding), offset
