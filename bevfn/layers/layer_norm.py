"""Layer norm (Ba et al. 2016) over the last axis, statistics in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def init(channels: int) -> dict:
    """{"weight": ones [C], "bias": zeros [C]}."""
    return {"weight": torch.ones(channels), "bias": torch.zeros(channels)}


def apply(params: dict, x: Tensor, *, eps: float = 1e-5) -> Tensor:
    """x [... C] -> like x."""
    return F.layer_norm(x.float(), x.shape[-1:], params["weight"], params["bias"], eps).to(x.dtype)
