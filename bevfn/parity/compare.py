"""The measures and tolerances of a parity run, and the table that it prints."""

import re
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

EVAL_TOLERANCE = 2e-5
"""relative L2 of a boundary, or 10 x the case's measured noise floor if that is larger"""
TRAIN_TOLERANCE = 1e-4
"""relative error of losses, targets and batch statistics, or 10 x noise"""
GRADIENT_TOLERANCE = (1e-2, 0.99, 1e-3)
"""gradient norms: relative error of the 99 % best parameters, and the median"""


@dataclass(frozen=True)
class Line:
    """One compared boundary."""

    name: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return bool(self.error <= self.tolerance)  # NaN is not

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAIL"
        return f"{self.name:<44} {self.error:>10.2e} {self.tolerance:>10.2e}  {verdict:<4} {self.note}".rstrip()


@dataclass
class Table:
    """What a case compared."""

    case: str
    lines: list[Line] = field(default_factory=list)

    def add(self, name: str, error: float, tolerance: float, note: str = "") -> None:
        """Records and prints one line."""
        line = Line(name, float(error), float(tolerance), note)
        self.lines.append(line)
        print(line, flush=True)

    @property
    def ok(self) -> bool:
        return bool(self.lines) and all(line.ok for line in self.lines)

    def to_json(self) -> dict:
        return {"case": self.case, "ok": self.ok, "lines": [{**asdict(line), "ok": line.ok} for line in self.lines]}


def relative_l2(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs|| in float64; infinite if the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    a, b = ours.detach().double(), theirs.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30)) if b.numel() else 0.0


def relative(ours: float, theirs: float) -> float:
    """|ours - theirs| / |theirs|."""
    return abs(ours - theirs) / max(abs(theirs), 1e-30)


def sliced(x: Tensor, slicing: str | None) -> Tensor:
    """x[slicing] for a case's slicing text, such as "[:, ::8, ::4, ::4]" (parsed, not evaluated)."""
    if not slicing:
        return x
    parts = slicing.strip()[1:-1].split(",")
    if not all(re.fullmatch(r"\s*(-?\d*):?(-?\d*):?(-?\d*)\s*", part) and ":" in part for part in parts):
        raise ValueError(f"slicing {slicing!r} of a golden case is not of the form [::2, :, ::4]")
    return x[tuple(slice(*[int(n) if n.strip() else None for n in part.strip().split(":")]) for part in parts)]


def rows(x: Tensor) -> np.ndarray:
    """Integer rows [n k] as one sortable key each."""
    array = x.cpu().numpy().astype(np.int64)
    array = array[:, None] if array.ndim == 1 else array
    return np.ascontiguousarray(array).view([("", np.int64)] * array.shape[1]).ravel()


def set_difference(ours: Tensor, theirs: Tensor) -> tuple[float, str]:
    """(share of rows in only one of two sets of integer rows, a note with the counts)."""
    a, b = rows(ours), rows(theirs)
    only = len(np.setxor1d(a, b)) + abs(len(a) - len(np.unique(a)))
    return only / max(len(b), 1), f"set of {len(b)}" + (f", {only} differ" if only else "")


def order_like(ours: Tensor, theirs: Tensor) -> Tensor:
    """For each row of `theirs` [n k] the index of the equal row of `ours`, which must hold it."""
    a, b = rows(ours), rows(theirs)
    order = np.argsort(a, kind="stable")
    return torch.from_numpy(order[np.searchsorted(a[order], b).clip(max=len(a) - 1)])
