"""Batch, layer and group normalisation; statistics are float32.

Source: hicann/ops-nn at e5c3fa93, norm/*/op_graph; torchair's ge_ir.proto.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bevfn.ascend.interpret.node import Invalid, fixed, image, ints, of_dtype, only, same_dtype


def channels(x: Tensor, *values: Tensor) -> list[Tensor]:
    """Per-channel float32 values [C] to stand beside x [N C ...]."""
    for value in values:
        of_dtype(value, torch.float32)
        if value.shape != x.shape[1:2]:
            raise Invalid(f"a value per channel has the shape {list(x.shape[1:2])}, got {list(value.shape)}")
    return [value.reshape([-1] + [1] * (x.dim() - 2)) for value in values]


def _other_axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


@fixed(is_training=True)
def batch_norm_v3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.1,
    image_layout: str,
) -> tuple[Tensor, ...]:
    """-> y, running_mean, running_var, save_mean, save_rstd. The running statistics are written in place."""
    image(image_layout, "NCDHW" if x.dim() == 5 else "NCHW")
    wide = x.float()
    var, mean = torch.var_mean(wide, _other_axes(x), correction=0)
    count = x.numel() // x.shape[1]
    rstd = torch.rsqrt(var + epsilon)
    m, r, w, b = channels(x, mean, rstd, weight.float(), bias.float())
    y = ((wide - m) * r * w + b).to(x.dtype)
    running_mean = torch.lerp(running_mean, mean.to(running_mean.dtype), momentum)
    running_var = torch.lerp(running_var, (var * (count / (count - 1))).to(running_var.dtype), momentum)
    return y, running_mean, running_var, mean, rstd


def bn_training_reduce(x: Tensor, *, image_layout: str) -> tuple[Tensor, Tensor]:
    """-> sum, square_sum of each channel."""
    image(image_layout)
    wide = x.float()
    return wide.sum(_other_axes(x)), (wide * wide).sum(_other_axes(x))


def bn_training_update(
    x: Tensor,
    sum: Tensor,
    square_sum: Tensor,
    scale: Tensor,
    offset: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    factor: float,
    epsilon: float,
    image_layout: str,
) -> tuple[Tensor, ...]:
    """-> y, mean, variance, batch_mean, batch_variance.

    The variance is square_sum / n - (sum / n)^2, n the numbers of a channel; of x itself, without cancellation, where the two are
    BNTrainingReduce's of x, and where they are not, as for rows of which some count, by that formula in float64.
    """
    image(image_layout)
    own = bn_training_reduce(x, image_layout=image_layout)
    if isinstance(x, FakeTensor) or all(
        torch.allclose(given, sums, rtol=1e-6, atol=0, equal_nan=True) for given, sums in zip((sum, square_sum), own)
    ):
        batch_variance, batch_mean = torch.var_mean(x.float(), _other_axes(x), correction=0)
    else:
        mean_of_x, of_squares = (t.double() * x.shape[1] / x.numel() for t in (sum, square_sum))
        batch_mean, batch_variance = mean_of_x.float(), (of_squares - mean_of_x.square()).clamp(min=0).float()
    m, r, s, o = channels(x, batch_mean, torch.rsqrt(batch_variance + epsilon), scale, offset)
    y = ((x.float() - m) * r * s + o).to(x.dtype)
    return y, *updated(x, batch_mean, batch_variance, mean, variance, factor)


def updated(
    x: Tensor, batch_mean: Tensor, batch_variance: Tensor, mean: Tensor, variance: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What BNTrainingUpdate returns beside y: the running statistics, of the unbiased variance, and the batch's."""
    count = x.numel() // x.shape[1]
    unbiased = batch_variance * (count / max(count - 1, 1))
    return torch.lerp(mean, batch_mean, factor), torch.lerp(variance, unbiased, factor), batch_mean, batch_variance


def bn_training_update_grad(
    grads: Tensor, x: Tensor, batch_mean: Tensor, batch_variance: Tensor, *, epsilon: float = 1e-4, image_layout: str
) -> tuple[Tensor, Tensor]:
    """-> diff_scale, diff_offset: gradients of scale and offset. The fourth operand is a variance, not 1 / std."""
    image(image_layout)
    same_dtype(grads, x)
    m, r = channels(x, batch_mean, torch.rsqrt(batch_variance + epsilon))
    g = grads.float()
    return (g * ((x.float() - m) * r)).sum(_other_axes(x)), g.sum(_other_axes(x))


def bn_training_reduce_grad(
    grads: Tensor,
    x: Tensor,
    diff_scale: Tensor,
    diff_offset: Tensor,
    scale: Tensor,
    batch_mean: Tensor,
    batch_variance: Tensor,
    *,
    epsilon: float = 1e-4,
    image_layout: str,
) -> Tensor:
    """Gradient of x."""
    image(image_layout)
    same_dtype(grads, x)
    count = x.numel() // x.shape[1]
    rstd = torch.rsqrt(batch_variance + epsilon)
    ds, do, s, m, r = channels(x, diff_scale / count, diff_offset / count, scale, batch_mean, rstd)
    return (s * r * (grads.float() - do - (x.float() - m) * r * ds)).to(x.dtype)


def bn_infer(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float,
    image_layout: str,
) -> Tensor:
    image(image_layout)
    s, o, m, r = channels(x, scale, offset, mean, torch.rsqrt(variance + epsilon))
    return ((x.float() - m) * r * s + o).to(x.dtype)


def bn_infer_grad(
    grads: Tensor, scale: Tensor, batch_variance: Tensor, *, epsilon: float = 1e-4, image_layout: str
) -> Tensor:
    image(image_layout)
    (factor,) = channels(grads, scale * torch.rsqrt(batch_variance + epsilon))
    return (grads.float() * factor).to(grads.dtype)


def layer_norm_v4(
    x: Tensor,
    normalized_shape: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, mean, rstd over the last axes, those two with axes of size 1."""
    shape = ints(normalized_shape)
    axes = list(range(-len(shape), 0))
    if list(x.shape[-len(shape) :]) != shape:
        raise Invalid(f"normalized_shape {shape} of x {list(x.shape)}")
    wide = x.float()
    var, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + epsilon)
    y = (wide - mean) * rstd
    y = y if gamma is None else y * gamma.float()
    y = y if beta is None else y + beta.float()
    return y.to(x.dtype), mean, rstd


@fixed(output_mask=[True, True, True])
def layer_norm_grad_v3(
    dy: Tensor, x: Tensor, rstd: Tensor, mean: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of x, gamma, beta; rstd comes before mean."""
    same_dtype(dy, x)
    own = list(range(-gamma.dim(), 0))
    others = list(range(x.dim() - gamma.dim()))
    g, wide = dy.float(), x.float()
    normal = (wide - mean.float()) * rstd.float()
    inner = g * gamma.float()
    correction = inner.mean(own, keepdim=True) + normal * (inner * normal).mean(own, keepdim=True)
    dx = (inner - correction) * rstd.float()
    dgamma, dbeta = g * normal, g
    if others:
        dgamma, dbeta = dgamma.sum(others), dbeta.sum(others)
    return dx.to(x.dtype), dgamma.to(gamma.dtype), dbeta.to(gamma.dtype)


def group_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    num_groups: int,
    data_format: str = "NHWC",
    eps: float = 1e-4,
    is_training: bool = True,
    image_layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, mean, variance [N groups]. torchair says data_format NHWC of operands marked NCHW; the mark counts."""
    only("data_format", data_format, "NHWC", "NCHW")
    image(image_layout)
    groups = x.float().reshape(x.shape[0], num_groups, -1)
    var, mean = torch.var_mean(groups, 2, correction=0)
    y = F.group_norm(x.float(), num_groups, gamma.float(), beta.float(), eps)
    return y.to(x.dtype), mean.to(x.dtype), var.to(x.dtype)


OPS: dict[str, Callable] = {
    "BatchNormV3": batch_norm_v3,
    "BNTrainingReduce": bn_training_reduce,
    "BNTrainingUpdate": bn_training_update,
    "BNTrainingUpdateGrad": bn_training_update_grad,
    "BNTrainingReduceGrad": bn_training_reduce_grad,
    "BNInfer": bn_infer,
    "BNInferGrad": bn_infer_grad,
    "LayerNormV4": layer_norm_v4,
    "LayerNormGradV3": layer_norm_grad_v3,
    "GroupNorm": group_norm,
}
