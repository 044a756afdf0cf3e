"""What the lowerings for CUDA (`kernels/<op>/cuda.py`, in Triton) have in common: when they run, and sorted intervals.

bevfn imports without Triton, and Triton only when an operator first meets a CUDA tensor. A lowering adds floats in an
order that its operands alone decide: no atomics. float64 (gradient checks) takes the reference.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OLDEST = (8, 0)  # compute capability that Triton and the asynchronous copies in the kernels ask for: Ampere


def lowering(load: Callable[[], Any], name: str, reference: Callable, *, float64: bool = False) -> Callable:
    """A lowering for `Library.impl(..., "CUDA")`.

    Where it cannot run, `reference` does, after one warning that says why and what would help.

    Args:
        load: imports `kernels/<op>/cuda.py` and returns it.
        name: the function in it.
        reference: the same in plain torch.
        float64: the function takes float64 too.
    """

    def run(*operands: Any) -> Any:
        first = next(x for x in operands if isinstance(x, Tensor))
        if first.dtype == torch.float64 and not float64:
            return reference(*operands)
        if why := unusable(first.device):
            _warn(why)
            return reference(*operands)
        with torch.cuda.device(first.device):  # Triton launches on the current device
            return getattr(load(), name)(*operands)

    return run


def unusable(device: torch.device) -> str | None:
    """Why the Triton lowerings cannot run on this CUDA device, one sentence; None if they can."""
    if not _has_triton():
        return (
            "bevfn's CUDA kernels need Triton, which is not installed, so their plain-torch references run, slower and "
            "not bit-reproducible: pip install -e '.[cuda]'."
        )
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        return (
            f"bevfn's CUDA kernels need compute capability {OLDEST[0]}.{OLDEST[1]} (Ampere) and "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}, so their plain-torch references run, "
            "slower and not bit-reproducible: use a newer GPU."
        )
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn(why: str) -> None:
    warnings.warn(why, stacklevel=2)


def float32_products() -> str:
    """Triton's precision of a product of float32 operands, as `torch.set_float32_matmul_precision` says for torch's."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def intervals(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which entries belong to each row, in ascending order.

    Args:
        rows: [N] int32 row of each entry; those outside 0 .. count - 1 belong to none.
        count: number of rows.

    Returns:
        order [N] int32, the entries sorted by row; starts [count + 1] int32, where each row's begin in it.
    """
    rows = torch.where((rows < 0) | (rows >= count), count, rows)
    keys, order = torch.sort(rows, stable=True)
    bounds = torch.arange(count + 1, dtype=keys.dtype, device=keys.device)
    return order.to(torch.int32), torch.searchsorted(keys, bounds, out_int32=True)
