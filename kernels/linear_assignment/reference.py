"""What `linear_assignment` means: scipy on the valid columns of each sample, on the host whatever the device."""

import numpy as np
import scipy  # whose rooms are imported when they are entered
import torch
from torch import Tensor

LIMIT = 1e300  # larger magnitudes count as infinite, so that sums of costs stay finite


def linear_assignment(cost: Tensor, valid: Tensor) -> Tensor:
    """cost [B Q G] float, valid [B G] bool -> [B G] int64, query of each box or -1."""
    match = np.full(valid.shape, -1, dtype=np.int64)  # B G
    for sample, (values, used) in enumerate(zip(cost.double().cpu().numpy(), valid.cpu().numpy())):
        boxes = np.flatnonzero(used)
        queries, columns = scipy.optimize.linear_sum_assignment(finite(values[:, boxes]))
        match[sample, boxes[columns]] = queries
    return torch.from_numpy(match).to(cost.device)


def finite(cost: np.ndarray) -> np.ndarray:
    """cost [Q G] with NaN and infinities replaced by a number that no set of finite costs can outweigh."""
    known = np.abs(cost) <= LIMIT  # False for NaN
    if known.all():
        return cost
    low, high = (cost[known].min(), cost[known].max()) if known.any() else (0.0, 0.0)
    return np.where(known, cost, high + (min(cost.shape) + 1) * (high - low + 1))
