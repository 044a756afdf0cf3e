"""`deform_conv` at BEVDepth's size against its torch reference, torchvision's operator and the machine's GEMM rate."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bevfn.bench import machine
from bevfn.kernels.deform_conv import deform_conv, reference

ROWS, COLUMNS, GROUPS = 16, 44, 4  # of the depth net: 3 x 3 taps, groups of the weight, one set of offsets


def measure(
    *,
    images: int = 6,
    channels: int = 512,
    repeats: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    gemm_gflops: float | None = None,
) -> dict:
    """Milliseconds of forward, and of forward and backward: on a CPU with threads as torch is set, on a GPU of its clock.

    gemm_gflops: of this device and dtype in the same run; None: measured here.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, channels, ROWS, COLUMNS, generator=generator).contiguous(memory_format=torch.channels_last)
    offset = 2 * torch.randn(images, 18, ROWS, COLUMNS, generator=generator)  # pixels
    weight = torch.randn(channels, channels // GROUPS, 3, 3, generator=generator) / (9 * channels // GROUPS) ** 0.5
    x, offset, weight = (t.to(device, dtype) for t in (x, offset, weight))
    peers: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ours": _ours, "reference": _Reference.apply}
    figures: dict = {"gemm_gflops": gemm_gflops or machine.gemm_gflops(device=device, dtype=dtype)}
    try:
        import torchvision
        from torchvision.ops import deform_conv2d

        deform_conv2d(x[:1, :1], offset[:1], weight[:1, :1], padding=1)  # its library may be of another device
        figures["peer"] = f"torchvision {torchvision.__version__}"
        peers["torchvision"] = lambda x, offset, weight: deform_conv2d(x, offset, weight, padding=1)
    except (ImportError, OSError, RuntimeError) as missing:  # RuntimeError: its library does not load
        extra = "bench" if device == "cpu" else "bench-cuda"
        figures["peer"] = f"omitted, torchvision is not usable here ({missing}): pip install -e '.[{extra}]'"
    for name, peer in peers.items():
        figures[name] = _figures(peer, (x, offset, weight), repeats, device)
    product = 2e-9 * weight.numel() * images * ROWS * COLUMNS  # GFLOP, and twice that in the backward pass
    ours = figures["ours"]
    ours["forward_share_of_gemm_peak"] = product / (1e-3 * ours["forward_ms"]) / figures["gemm_gflops"]
    ours["train_share_of_gemm_peak"] = 3 * product / (1e-3 * ours["train_ms"]) / figures["gemm_gflops"]
    y = _ours(x, offset, weight)
    for name, peer in list(peers.items())[1:]:
        for what in ("forward", "train"):
            ours[f"{what}_speedup_over_{name}"] = figures[name][f"{what}_ms"] / ours[f"{what}_ms"]
        difference = peer(x, offset, weight).float() - y.float()
        figures[name]["relative_difference"] = float(difference.norm() / y.float().norm())
    return figures


def _ours(x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return deform_conv(x, offset, None, weight, padding=1)


class _Reference(torch.autograd.Function):
    """The plain-torch reference with its own backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, offset, weight)
        return reference.forward(x, offset, None, weight, 1, 1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, offset, weight = ctx.saved_tensors
        grad_x, grad_offset, _, grad_weight = reference.backward(grad, x, offset, None, weight, 1, 1, 1)
        return grad_x, grad_offset, grad_weight


def _figures(peer: Callable, operands: tuple[Tensor, ...], repeats: int, device: str) -> dict[str, float]:
    leaves = [t.detach().requires_grad_() for t in operands]

    def forward() -> Tensor:
        with torch.no_grad():
            return peer(*leaves)

    def train() -> tuple[Tensor, ...]:
        y = peer(*leaves)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    seconds = machine.seconds_on(device, forward, train, repeats=repeats)
    return {name: 1e3 * s for name, s in zip(("forward_ms", "train_ms"), seconds)}
