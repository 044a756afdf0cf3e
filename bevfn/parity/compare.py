"""What a parity run measures, with which tolerances, and the table that it prints.

The comparisons that every model shares are here: boundaries, losses, gradients, batch statistics, decoded boxes, and
what has no order (sets of cells, hits). A row's name is the stored tensor's.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from bevfn import tree
from bevfn.parity.golden import Case

EVAL_TOLERANCE = 2e-5
"""relative L2 of a boundary, or 10 x the case's measured noise floor if that is larger"""
TRAIN_TOLERANCE = 1e-4
"""relative error of losses, targets and batch statistics, or 10 x noise"""
GRADIENT_TOLERANCE = (1e-2, 0.99, 1e-3)
"""gradient norms: relative error of the 99 % best parameters, and the median"""
GRADIENT_SLICE_TOLERANCE = 2e-2
"""relative L2, or 10 x noise: ReLUs whose input changes sign within rounding set the floor (READMEs)"""


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


Measure = Callable[[Tensor, Tensor], float]
"""how far ours is from another, as the error of its line"""


@dataclass
class Table:
    """What a case compared."""

    case: str
    lines: list[Line] = field(default_factory=list)
    ours: dict[str, tuple[Tensor, Measure]] = field(default_factory=dict)
    """what a line compared, where its distance from another run can be told"""
    silent: bool = False

    def add(
        self,
        name: str,
        error: float,
        tolerance: float,
        note: str = "",
        *,
        of: Tensor | None = None,
        measure: Measure | None = None,
    ) -> None:
        """Records and prints one line; of: what of ours it compared, by `measure` (relative L2 if None)."""
        line = Line(name, float(error), float(tolerance), note)
        self.lines.append(line)
        if of is not None:
            self.ours[name] = of.detach().cpu().clone(), measure or relative_l2
        if not self.silent:
            print(line, flush=True)

    def allow_rounding(self, other: "Table") -> None:
        """Wider tolerances, 10 x how far our own step moves when rounded otherwise (`other`), for lines that failed, printed
        again: as of a case's measured noise floors, where it has none."""
        for i, line in enumerate(self.lines):
            if line.ok or line.name not in self.ours or line.name not in other.ours:
                continue
            ours, measure = self.ours[line.name]
            floor = measure(other.ours[line.name][0], ours)
            note = f"10 x {floor:.1e}, by which half an ulp in every parameter moves it; {line.tolerance:.0e} without"
            allowed = max(line.tolerance, 10 * floor)
            self.lines[i] = replace(line, tolerance=allowed, note=f"{line.note}; {note}" if line.note else note)
            print(self.lines[i], flush=True)

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


def relative(ours: float, theirs: float, floor: float = 1e-30) -> float:
    """|ours - theirs| / |theirs|, which counts as `floor` at least."""
    return abs(ours - theirs) / max(abs(theirs), floor)


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


# ------------------------------------------------------------------------------------------------ what has an order


def boundary(case: Case, table: Table, name: str, ours: Tensor, floor: float, note: str = "") -> None:
    """A stored tensor, in upstream's shape and sampled as it was; tolerance max(floor, 10 x its noise)."""
    x, shape = ours.detach().cpu(), case.shape(name)
    x = x if shape is None else x.reshape(shape)
    phase, _, rest = name.partition("/")
    tolerance = max(floor, 10 * case.noise(phase, rest))
    x = sliced(x, case.slicing(name))
    table.add(name, relative_l2(x, case.outputs[name]), tolerance, note, of=x)


def dense(case: Case, table: Table, phase: str, paths: Mapping[str, str], outputs: dict, floor: float) -> None:
    """Every boundary of {stored name: path in outputs} that the case stores for the phase."""
    flat = tree.flatten(outputs)
    for name, path in paths.items():
        if f"{phase}/{name}" in case.outputs:
            boundary(case, table, f"{phase}/{name}", flat[path], floor)


def losses(
    case: Case, table: Table, phase: str, ours: Mapping[str, Any], absolute: Mapping[str, float] | None = None
) -> None:
    """Every stored loss term; `absolute` names terms of which that absolute error is allowed too."""
    for key in case.names(f"{phase}/loss/"):
        stored = float(case.outputs[f"{phase}/loss/{key}"])
        tolerance = max(TRAIN_TOLERANCE, 10 * case.loss_noise(key))
        if absolute and key in absolute:
            tolerance = max(tolerance, absolute[key] / max(abs(stored), 1e-12))
        table.add(f"{phase}/loss/{key}", relative(float(ours.get(key, float("nan"))), stored), tolerance)


def gradients(case: Case, table: Table, ours: Mapping[str, Tensor], zero: Collection[str] = ()) -> None:
    """Norms per parameter, by upstream key, then stored slices.

    zero: keys whose gradient is zero in exact arithmetic beside those that the case names; left out.
    """
    stored = case.gradients()
    missing = sorted(set(stored.norms) - set(ours))
    if missing:
        table.add("train/grad_norm/missing", len(missing), 0.0, ", ".join(missing[:3]))
    norms = {key: float(ours[key].double().norm()) for key in stored.norms if key in ours}
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    if stored.total is not None:
        frozen = [norm for key, norm in norms.items() if stored.norms[key] is None]
        table.add("train/grad_norm (frozen)", max(frozen, default=0.0), 0.0, f"{len(frozen)} parameters")
        largest = max((norms[key] for key in stored.zero), default=0.0) / whole
        note = f"{len(stored.zero)} parameters, of the whole norm"
        table.add("train/grad_norm (zero in exact arithmetic)", largest, 1e-6, note)
    zero = stored.zero | set(zero)
    compared = {
        key: norm for key, norm in stored.norms.items() if norm is not None and key in norms and key not in zero
    }
    floor = max(stored.floor, 1e-30)
    measured = torch.tensor([norms[key] for key in compared], dtype=torch.float64)
    wanted = torch.tensor(list(compared.values()), dtype=torch.float64)

    def errors(a: Tensor, b: Tensor) -> np.ndarray:
        return ((a - b).abs() / b.abs().clamp(min=floor)).numpy()

    def most(a: Tensor, b: Tensor) -> float:
        return float(np.quantile(errors(a, b), share, method="higher"))

    def middle(a: Tensor, b: Tensor) -> float:
        return float(np.median(errors(a, b)))

    limit, share, median = GRADIENT_TOLERANCE
    each = errors(measured, wanted)
    worst = f"{len(compared)} parameters, worst {list(compared)[int(each.argmax())]} {each.max():.1e}"
    name = f"train/grad_norm ({share * 100:.0f} % of parameters)"
    table.add(name, most(measured, wanted), limit, worst, of=measured, measure=most)
    table.add("train/grad_norm (median)", middle(measured, wanted), median, of=measured, measure=middle)
    if stored.total is not None:
        table.add("train/grad_norm (whole)", relative(whole, stored.total), limit)
    for key in case.names("train/grad/"):
        if key not in zero:
            name = f"train/grad/{key}"
            error = relative_l2(sliced(ours[key].cpu(), case.slicing(name)), case.outputs[name])
            table.add(name, error, max(GRADIENT_SLICE_TOLERANCE, 10 * case.gradient_noise(key)))


def statistics(case: Case, table: Table, ours: Mapping[str, Tensor]) -> None:
    """Batch norms' running statistics after one training step, by upstream key."""
    for prefix in ("train/bn/", "train/bn_after/"):
        for key in case.names(prefix):
            if not key.endswith("num_batches_tracked"):  # bevfn does not count
                boundary(case, table, prefix + key, ours[key], TRAIN_TOLERANCE)


# --------------------------------------------------------------------------------------------- what has no order


def overflow(table: Table, outputs: Mapping[str, Any]) -> None:
    """What did not fit into static capacities: nothing may be dropped in a comparison."""
    for name, count in outputs.get("overflow", {}).items():
        table.add(f"overflow/{name}", float(count), 0.0, f"{int(count):,} dropped")


def differing(table: Table, name: str, ours: Tensor, stored: Tensor, what: str, *, limit: float = 0.0) -> None:
    """How many integers, which are `what`, differ from the stored ones."""
    wrong = int((ours.cpu() != stored).sum())
    table.add(name, wrong, limit, f"{wrong:,} of {stored.numel():,} {what} differ")


def same_set(case: Case, table: Table, name: str, ours: Tensor) -> None:
    """Stored integer rows, in any order."""
    error, note = set_difference(ours, case.outputs[name])
    table.add(name, error, 0.0, note)


def nonzero(case: Case, table: Table, name: str, ours: Tensor, floor: float) -> None:
    """A sparse map [...], stored as the places of its nonzero elements ("<name>_index" [n axes], of one axis [n]; a set) and
    their values."""
    index = f"{name}_index"
    if index not in case.outputs:
        return
    same_set(case, table, index, torch.nonzero(ours))
    value = ours[tuple(case.outputs[index].long().view(-1, ours.dim()).T)]
    table.add(f"{name}_value", relative_l2(value, case.outputs[f"{name}_value"]), floor)


def detections(
    case: Case,
    table: Table,
    name: str,
    found: Mapping[str, Tensor],
    noise: tuple[float, float] = (0.0, 0.0),
    called: tuple[str, str, str] = ("boxes", "scores", "labels"),
) -> None:
    """Decoded boxes [n D], scores, labels, matched one to one by all of them, since equal scores have no order.

    noise: measured floors of boxes and scores; called: what the case calls the three.
    """
    stored = {key: case.outputs[f"{name}/{theirs}"] for key, theirs in zip(("boxes", "scores", "labels"), called)}
    more = len(found["boxes"]) - len(stored["boxes"])
    if more:
        table.add(f"{name}/count", abs(more), 0.0, f"{len(found['boxes'])} boxes")
        return

    def joined(each: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([each["boxes"], each["scores"][:, None], each["labels"][:, None]], 1).double()

    pairs = linear_sum_assignment(torch.cdist(joined(found), joined(stored)).numpy())
    order = torch.from_numpy(pairs[0][np.argsort(pairs[1])])
    for key, floor in zip(("boxes", "scores"), noise):
        error = relative_l2(found[key][order], stored[key])
        table.add(f"{name}/{key}", error, max(EVAL_TOLERANCE, 10 * floor))
    differing(table, f"{name}/labels", found["labels"][order], stored["labels"], "labels")
