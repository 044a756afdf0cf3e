"""A prediction branch over a map: 3x3 convolution, norm and ReLU, then a 3x3 convolution to the predicted channels."""

import torch
from torch import Tensor

from bevfn import tree
from bevfn.distributed import Train
from bevfn.layers import conv, conv_norm


def init(
    channels: int,
    channels_out: int,
    *,
    generator: torch.Generator,
    bias: bool = False,
    kaiming: conv.Kaiming | None = None,
) -> tuple[dict, dict]:
    """({"hidden": {"conv", "norm"}, "out"}, {"hidden"}); bias and kaiming are the hidden layer's, see `conv.init`."""
    return tree.unzip(
        {
            "hidden": conv_norm.init(channels, channels, 3, generator=generator, bias=bias, kaiming=kaiming),
            "out": conv.init(channels, channels_out, 3, bias=True, generator=generator),
        }
    )


def apply(params: dict, state: dict, x: Tensor, *, train: Train) -> tuple[Tensor, dict]:
    """x [B C H W] -> (prediction [B C_out H W], new state), dtype of x."""
    x, hidden = conv_norm.apply(params["hidden"], state["hidden"], x, train=train)
    return conv.apply(params["out"], x), {"hidden": hidden}
