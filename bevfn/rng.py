"""Counter-based randomness: numbers are a pure function of (key, index).

No generator and no hidden state: the same key gives the same numbers in eager mode, under every compiler and on every
device, a resumed run repeats the run that was never stopped, and a seed is not baked into a compiled graph (which is
what happens to torch's random operators on Ascend, shared/npu/COVERAGE.md).

A key is an int64 scalar tensor in [0, 2^32). `fold` derives the key of a step, a layer, a site:

    key = rng.fold(rng.key(seed), step)
    x = rng.dropout(x, 0.1, rng.fold(key, 3))
"""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
Integers = TypeVar("Integers", int, Tensor)


def key(seed: int) -> Tensor:
    """int64 [] from any Python integer."""
    # Not 0 for seed 0: _mix(0) is 0.
    return _mix(torch.tensor((seed ^ 0x9E3779B9) & _MASK) ^ _mix(torch.tensor((seed >> 32) & _MASK)))


def fold(key: Tensor, site: int | Tensor) -> Tensor:
    """The key of `site` under `key`: a Python int or an int64 [] tensor (such as the step), 0 <= site < 2^32."""
    number: Any = site  # the arithmetic is the same for both
    folded = _mix(key ^ _mix(number ^ 0x5BD1E995))
    return torch.stack([folded, folded])[0]  # stored, see _mix


def uniform(key: Tensor, shape: tuple[int, ...], *, first_row: int = 0) -> Tensor:
    """float32 of `shape`, uniform in [0, 1) in steps of 2^-24; at most 2^32 rows and columns.

    first_row: where `shape` is a piece of a larger draw, the rows (of the last axis) before it, whose numbers it has.
    A number is a hash of its row's key and its column's: half the work of a hash of its index under the key, and nothing
    of the mask's size but the result of it is a constant, which a compiler would store.
    """
    columns = shape[-1] if shape else 1
    rows = math.prod(shape) // max(columns, 1)
    row = _mix(_mix(torch.arange(first_row, first_row + rows, device=key.device)) ^ key)
    column = _mix(torch.arange(columns, device=key.device) ^ 0x2545F491)
    row, column = torch.cat([row, column]).split([rows, columns])  # stored, see _mix
    # The upper 24 bits: exact in float32, as 0xFFFFFF00 clears the others.
    return ((_mix(row[:, None] ^ column) & 0xFFFFFF00).float() * 2.0**-32).view(shape)


def dropout(
    x: Tensor, rate: float, key: Tensor | None, *, shape: tuple[int, ...] | None = None, first_row: int = 0
) -> Tensor:
    """x with elements zeroed with probability `rate` and the others scaled by 1 / (1 - rate); x itself without a key.

    `shape` is the shape of the mask, broadcast against x: (B, 1, 1) drops whole samples (stochastic depth); `first_row`: see
    `uniform`.
    """
    if key is None or rate == 0.0:
        return x
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate {rate} is outside [0, 1)")
    keep = uniform(key, tuple(x.shape) if shape is None else shape, first_row=first_row) >= rate
    return torch.where(keep, x * (1.0 / (1.0 - rate)), torch.zeros((), dtype=x.dtype, device=x.device))


def _mix(x: Integers) -> Integers:
    # A bijection of 32-bit integers with almost no bias (lowbias32, Chris Wellons, nullprogram.com/blog/2018/07/31).
    # int64 so that nothing overflows into undefined behaviour: the second factor is 0x846CA68B - 2^32.
    # Inductor writes x out at each of its two uses, which is 8 times the work of compiling x, and 8 times that for a hash
    # of a hash, unless x is stored before: on a CPU what `cat` or `stack` makes is.
    x = ((x ^ _right(x, 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ _right(x, 15)) * -0x7B935975) & _MASK
    return x ^ _right(x, 16)


def _right(x: Integers, bits: int) -> Integers:
    """x >> bits of integers in [0, 2^32). The mask tells `ascend.fixes.rewrites.shifts` that they are."""
    return (x & (_MASK << bits & _MASK)) >> bits
