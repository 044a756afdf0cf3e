"""Checks of batches on the host: shapes, dtypes and finite values of a dataclass of tensors."""

import dataclasses
from typing import Any

import torch
from torch import Tensor


def fields(batch: Any) -> dict[str, Any]:
    """A dataclass's values by name, not copied."""
    return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}


def check(batch: Any, layout: dict[str, tuple[str, torch.dtype]]) -> None:
    """Every tensor of a batch has the layout of its name, as ("B N 4 4", dtype), and no NaN or infinity.

    A letter must mean the same size in every field, a digit exactly that size. Fields that are None are not looked at.
    Raises ValueError naming the first field that is wrong.
    """
    kind = type(batch).__name__
    values = {name: value for name, value in fields(batch).items() if value is not None}
    sizes: dict[str, int] = {}
    for name, value in values.items():
        _check_layout(f"{kind}.{name}", value, *layout[name], sizes)
    for name, value in values.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{kind}.{name} has NaN or infinite values; drop or replace them when reading.")


def _check_layout(name: str, value: Tensor, letters: str, dtype: torch.dtype, sizes: dict[str, int]) -> None:
    """Of one field; `sizes` collects what the letters mean."""
    wanted = letters.split()
    fits = value.dim() == len(wanted) and all(
        size == (int(letter) if letter.isdigit() else sizes.setdefault(letter, size))
        for letter, size in zip(wanted, value.shape)
    )
    if not fits:
        known = ", ".join(f"{letter} {size}" for letter, size in sizes.items() if letter in wanted)
        raise ValueError(f"{name} has shape {list(value.shape)} but must be [{letters}] (here {known}).")
    if value.dtype != dtype:
        raise ValueError(f"{name} is {value.dtype} but must be {dtype}; convert it when reading.")
