"""Fourier features: every number of a known range as cosines and sines of doubling frequency (Tancik et al. 2020, arXiv
2006.10739), for layers that would not tell close values of a small range apart.

Source: AWML projects/BEVFusion/bevfusion/sparse_encoder.py (behaviour).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    lower: tuple[float, ...]
    """of every feature, what becomes 0"""
    upper: tuple[float, ...]
    """what becomes half a turn of the lowest frequency"""
    frequencies: int

    def __post_init__(self) -> None:
        if len(self.lower) != len(self.upper) or any(l >= u for l, u in zip(self.lower, self.upper)):
            raise ValueError(f"Fourier features need lower < upper for every feature: {self.lower}, {self.upper}")

    @property
    def channels(self) -> int:
        """Of the result."""
        return 2 * len(self.lower) * self.frequencies


def apply(x: Tensor, config: Config) -> Tensor:
    """x [... F] -> [... 2*F*K], float32: the cosines (feature by feature, frequencies pi, 2 pi, 4 pi ...), then the sines."""
    lower, upper = (x.new_tensor(bound, dtype=torch.float32) for bound in (config.lower, config.upper))
    turn = (x.float() - lower) / (upper - lower) * math.pi
    angle = torch.stack([turn * 2.0**k for k in range(config.frequencies)], dim=-1).flatten(-2)  # ... F*K
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)
