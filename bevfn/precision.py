"""Precision policy and dynamic loss scaling, both as plain values.

Parameters, statistics and optimizer state are always float32. A model casts its *input* to the policy's compute dtype
(`policy.cast`); from there the activation's dtype is the compute dtype and every layer casts its weights to it.
These places compute in float32 whatever the policy says, and hand back the activation's dtype:

- geometry: projection, frustum, transforms, voxelization, box coding;
- statistics and normalisation of batch norm and layer norm;
- the softmax of attention, and in `layers.attention` its product with the values; depth softmax;
- scatter accumulation: voxel pooling, sums over the offsets of a sparse convolution, heatmap drawing;
- target assignment and all losses;
- gradients of parameters (they arrive float32 through the cast), their norm, clipping, optimizer, EMA.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bevfn import choices, tree

# Below it the small gradients that the scale is for are lost, and at 0 every gradient is 0 / 0. As DeepSpeed's and
# Megatron's; GradScaler has none.
LOWEST_SCALE = 1.0

Precision = choices.Precision
_NAMES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Policy:
    """What a step computes in: float32, float16 (with a loss scale) or bfloat16 (without)."""

    compute: torch.dtype = torch.float32

    @staticmethod
    def of(name: str) -> "Policy":
        """The policy of "fp32", "fp16" or "bf16"."""
        if name not in _NAMES:
            raise ValueError(f"precision {name!r} is unknown; choose one of {', '.join(_NAMES)}")
        return Policy(_NAMES[name])

    def cast(self, x: Tensor) -> Tensor:
        """x in the compute dtype; integer and bool tensors as they are."""
        return x.to(self.compute) if x.is_floating_point() else x

    @property
    def scales_loss(self) -> bool:
        """Only float16 needs it: bfloat16 has float32's range."""
        return self.compute == torch.float16


@tree.register
@dataclass
class LossScale:
    """State of dynamic loss scaling; None in a train state without it."""

    scale: Tensor  # float32 [], the loss is multiplied with it
    good_steps: Tensor  # int64 [], finite steps since the last change


def init_loss_scale(initial: float = 2.0**16) -> LossScale:
    """torch.amp.GradScaler's (and so mmengine's AmpOptimWrapper "dynamic") first state."""
    return LossScale(torch.tensor(float(initial)), torch.tensor(0))


def update_loss_scale(
    state: LossScale, finite: Tensor, *, growth: float = 2.0, backoff: float = 0.5, interval: int = 2000
) -> LossScale:
    """The next state, `finite` bool []: halved at once by an overflow, doubled after `interval` finite steps in a row.

    Never below LOWEST_SCALE. Source: torch/amp/grad_scaler.py, aten _amp_update_scale_ (which also keeps the scale if
    doubling would overflow, but has no lower end).
    """
    grown = torch.where(torch.isfinite(state.scale * growth), state.scale * growth, state.scale)
    good = state.good_steps + 1
    full = good >= interval
    scale = torch.where(finite, torch.where(full, grown, state.scale), state.scale * backoff)
    scale = scale.clamp(min=LOWEST_SCALE)
    zero = torch.zeros_like(good)
    return LossScale(scale, torch.where(finite & ~full, good, zero))
