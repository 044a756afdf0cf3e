"""Counter-based randomness: numbers are a pure function of (key, index).

No generator and no hidden state: the same key gives the same numbers in eager mode, under every compiler and on every
device, a resumed run repeats the run that was never stopped, and a seed is not baked into a compiled graph (which is
what happens to torch's random operators on Ascend, by torchair of torch_npu 2.13.0).

A key is an int64 scalar tensor in [0, 2^32). `fold` derives the key of a step, a layer, a site:

    key = rng.fold(rng.key(seed), step)
    x = rng.dropout(x, 0.1, rng.fold(key, 3))
"""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_SIGN = 1 << 31
Integers = TypeVar("Integers", int, Tensor)


def key(seed: int) -> Tensor:
    """int64 [] from any Python integer."""
    # Not 0 for seed 0: _mix(0) is 0.
    return _mix(torch.tensor((seed ^ 0x9E3779B9) & _MASK) ^ _mix(torch.tensor((seed >> 32) & _MASK)))


def fold(key: Tensor, site: int | Tensor) -> Tensor:
    """The key of `site` under `key`: a Python int or an int64 [] tensor (such as the step), 0 <= site < 2^32."""
    number: Any = site  # the arithmetic is the same for both
    return stored(_mix(key ^ _mix(number ^ 0x5BD1E995)))


def stored(x: Tensor) -> Tensor:
    """The same numbers, few of them, which a compiler keeps instead of drawing them again where they are used."""
    return torch.stack([x, torch.zeros_like(x)])[0]  # see _mix; of twice x inductor makes x again


def uniform(key: Tensor, shape: tuple[int, ...], *, first_row: int = 0) -> Tensor:
    """float32 of `shape`, uniform in [0, 1) in steps of 2^-24; at most 2^31 rows and columns.

    first_row: where `shape` is a piece of a larger draw, the rows (of the last axis) before it, whose numbers it has.
    """
    return (_right(_bits(key, shape, first_row), 8).float() * 2.0**-24).view(shape)


def _bits(key: Tensor, shape: tuple[int, ...], first_row: int) -> Tensor:
    """int32 [rows, columns] of 32 random bits each: those of `shape`, all axes but the last one being rows.

    An element's are a hash of its row's key and its column's: half the work of a hash of its index under the key, and nothing
    of the mask's size but the result of it is a constant, which a compiler would store.
    """
    columns = shape[-1] if shape else 1
    rows = math.prod(shape) // max(columns, 1)
    row = torch.arange(first_row, first_row + rows, dtype=torch.int32, device=key.device)
    row = _mix(_mix(row) ^ ((key ^ _SIGN) - _SIGN).to(torch.int32))
    column = _mix(torch.arange(columns, dtype=torch.int32, device=key.device) ^ 0x2545F491)
    row, column = torch.cat([row, column]).split([rows, columns])  # stored, see _mix
    return _mix(row[:, None] ^ column)


def dropout(x: Tensor, rate: float, key: Tensor | None, *, first_row: int = 0) -> Tensor:
    """x with elements zeroed with probability `rate` and the others scaled by 1 / (1 - rate); x itself without a key.

    `first_row`: see `uniform`.
    """
    if key is None or rate == 0.0:
        return x
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate {rate} is outside [0, 1)")
    # uniform(...) >= rate, of whole numbers: int32 is compared exactly, and three arrays of the mask's size are never made.
    least = math.ceil(rate * 2.0**24) << 8
    keep = ((_bits(key, tuple(x.shape), first_row) ^ -_SIGN) >= least - _SIGN).view(x.shape)
    return torch.where(keep, x * (1.0 / (1.0 - rate)), torch.zeros((), dtype=x.dtype, device=x.device))


def _mix(x: Integers) -> Integers:
    # A bijection of 32-bit integers with almost no bias (lowbias32, Chris Wellons, nullprogram.com/blog/2018/07/31).
    # Of Python's numbers and int64 tensors in [0, 2^32), which keys are, and of int32 tensors, which hold the same bits as
    # negative numbers from 2^31 on: products of theirs keep the lower 32 bits. The second factor is 0x846CA68B - 2^32.
    # Inductor writes x out at each of its two uses, which is 8 times the work of compiling x, and 8 times that for a hash
    # of a hash, unless x is stored before: on a CPU what `cat` or `stack` makes is.
    x = _low((x ^ _right(x, 16)) * 0x7FEB352D)
    x = _low((x ^ _right(x, 15)) * -0x7B935975)
    return x ^ _right(x, 16)


def _low(x: Integers) -> Integers:
    return x if _is_int32(x) else x & _MASK


def _right(x: Integers, bits: int) -> Integers:
    """x >> bits of 32 bits, zeros from above. The first mask tells `ascend.fixes.rewrites.shifts` how many bits stay."""
    high = _MASK << bits & _MASK
    if _is_int32(x):
        return ((x & (high - (_MASK + 1))) >> bits) & (_MASK >> bits)  # int32's own shift repeats the sign
    return (x & high) >> bits


def _is_int32(x: Integers) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.int32
