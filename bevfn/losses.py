"""Detection losses in float32, each already reduced to one number by its own normaliser."""

import torch
from torch import Tensor

from bevfn.distributed import Replicas, Train

# mmdet adds float32's epsilon to every normaliser; kept, since goldens compare to 1e-4 with few positives.
NORMALISER_EPS = torch.finfo(torch.float32).eps


def positives(marked: Tensor, train: Train = True) -> Tensor:
    """0-d float32 normaliser: the sum of the 0/1 tensor `marked`, at least 1.

    With `Replicas` as `train` it is that sum over all replicas divided by their number, so that the mean over replicas
    of a loss is the loss of their one big batch. Upstream normalises by each process' own count, as `True` does.
    """
    count = marked.sum()
    if isinstance(train, Replicas):
        return train.sum(count).clamp(min=1.0) / train.count
    return count.clamp(min=1.0)


def gaussian_focal(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 2.0,
    gamma: float = 4.0,
    train: Train = True,
    normaliser: Tensor | None = None,
) -> Tensor:
    """Penalty-reduced focal loss of a centre heatmap (CornerNet, Law & Deng 2018, equation 1).

    L = -sum( [t == 1] (1-p)^alpha log p + (1-t)^gamma p^alpha log(1-p) ) / max(#[t == 1], 1),
    p = clip(sigmoid(logits), 1e-4, 1 - 1e-4).

    Args:
        logits, target: same shape; target in [0, 1], exactly 1 at centre cells.
        train: whose centres are counted, see `positives`.
        normaliser: 0-d, instead of that count.
    Source: mmdet GaussianFocalLoss and the `clip_sigmoid` before it, golden case bevfusion_lidar.
    """
    p = torch.sigmoid(logits.float()).clamp(1e-4, 1 - 1e-4)
    centre = (target == 1).float()
    positive = -(p + 1e-12).log() * (1 - p).pow(alpha) * centre
    negative = -(1 - p + 1e-12).log() * p.pow(alpha) * (1 - target).pow(gamma)
    count = positives(centre, train) if normaliser is None else normaliser
    return (positive + negative).sum() / (count + NORMALISER_EPS)


def sigmoid_focal(
    logits: Tensor,
    target: Tensor,
    normaliser: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
    counted: Tensor | None = None,
) -> Tensor:
    """Focal loss (Lin et al. 2017, equation 5) of one-vs-all `logits` against 0/1 `target`, same shape.

    Summed, where `counted` (bool, same shape) is not False, and divided by `normaliser` (0-d, see `positives`).
    """
    logits = logits.float()
    p = torch.sigmoid(logits)
    wrong = (1 - p) * target + p * (1 - target)  # probability given to the wrong answer
    weight = (alpha * target + (1 - alpha) * (1 - target)) * wrong.pow(gamma)
    # log(1 + exp(-|x|)) + max(x, 0) - x t: the stable binary cross-entropy, spelled so that it reaches an NPU graph
    entropy = logits.clamp(min=0) - logits * target + torch.log1p(torch.exp(-logits.abs()))
    terms = weight * entropy
    if counted is not None:
        terms = torch.where(counted, terms, 0.0)
    return terms.sum() / (normaliser + NORMALISER_EPS)


def weighted_l1(prediction: Tensor, target: Tensor, weight: Tensor, normaliser: Tensor) -> Tensor:
    """sum(weight |prediction - target|) / normaliser; `weight` broadcasts, `normaliser` is 0-d, see `positives`."""
    return (weight * (prediction.float() - target).abs()).sum() / (normaliser + NORMALISER_EPS)
