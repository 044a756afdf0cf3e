"""Foreign state dicts to our trees and back, every key accounted for."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bevfn import tree
from bevfn.upstream import checkpoints, recognise
from bevfn.upstream.entries import Entry, Naming, WeightLayout, impossible
from bevfn.upstream.recognise import SparseLayout

DEEPEST = 100  # levels of a tree


@dataclass
class Account:
    """What became of every upstream key and of every leaf of ours."""

    model: str
    what: str  # what the file looks like
    prefix: str  # in front of the model's keys
    naming: Naming
    sparse: SparseLayout
    used: dict[str, str] = field(default_factory=dict)  # upstream key: our name
    unused: dict[str, str] = field(default_factory=dict)  # upstream key: reason
    unknown: list[str] = field(default_factory=list)  # upstream keys that this model should not have
    missing: dict[str, str] = field(default_factory=dict)  # our name: the upstream key that is not there
    initial: dict[str, str] = field(default_factory=dict)  # our name: the optional upstream key that is not there
    mismatched: dict[str, str] = field(default_factory=dict)  # upstream key: what it is that the model's leaf cannot be
    warnings: list[str] = field(default_factory=list)
    carried: dict[str, Tensor] = field(default_factory=dict)  # upstream key: tensor kept for an exact export

    def problem(self) -> str | None:
        """One sentence that names what keeps the file from being this model, None if it is."""
        parts = [f"it lacks {key} (our {name})" for name, key in self.missing.items()]
        parts += [f"{key} is {what}" for key, what in self.mismatched.items()]
        parts += [f"it holds {key}, which this model does not have" for key in self.unknown]
        if not parts:
            return None
        more = f"; and {len(parts) - 3} more" if len(parts) > 3 else ""
        return f"the checkpoint does not fit --model {self.model}: {'; '.join(parts[:3])}{more}."

    def text(self, *, every_key: bool = False) -> str:
        """The report for a terminal; unused keys are grouped by reason unless `every_key`."""
        lines = [f"{self.what}, read as {self.model}"]
        kernels = f"sparse kernels {self.sparse}, " if checkpoints.has_sparse_kernels(self.model) else ""
        lines += [f"  layout     {kernels}{self.naming} naming, key prefix {self.prefix!r}"]
        lines += [f"  used       {len(self.used)} tensors"]
        lines += [f"  unused     {count} {reason}" for reason, count in Counter(self.unused.values()).items()]
        lines += [f"  at init    {name} (no {key})" for name, key in self.initial.items()]
        lines += [f"  missing    {name} (no {key})" for name, key in self.missing.items()]
        lines += [f"  mismatched {key}: {what}" for key, what in self.mismatched.items()]
        lines += [f"  unknown    {key}" for key in self.unknown]
        lines += [f"  warning    {line}" for line in self.warnings]
        if every_key:
            lines += [f"  {key} -> {name}" for key, name in self.used.items()]
            lines += [f"  {key}: {reason}" for key, reason in self.unused.items()]
        return "\n".join(lines)


class Refused(ValueError):
    """The state dict is not the model that was asked for; `report` says all about it."""

    def __init__(self, message: str, report: Account):
        super().__init__(message)
        self.report = report


def import_state(upstream: Mapping[str, Tensor], model: str, *, config: Any = None) -> tuple[dict, dict, Account]:
    """(params, state, report) of a foreign state dict; floating tensors become float32.

    Raises ValueError if it looks like another model or mixes sparse layouts, Refused (a ValueError) if keys are
    missing, unknown, of another shape, or hold what none can (`entries.impossible`). `params` of a lone Swin lacks the leaves of `report.initial`. `config` is the
    configuration whose shapes the leaves must have, by default that of the release which the file is of.
    """
    if model not in checkpoints.CHECKPOINTS:
        raise ValueError(f"unknown model {model!r}: choose one of {', '.join(checkpoints.CHECKPOINTS)}.")
    source = recognise.recognise(upstream)
    if source.model != model and model not in source.alike:
        remedy = f"use --model {source.model}" if source.model else f"bevfn reads {', '.join(checkpoints.CHECKPOINTS)}"
        raise ValueError(f"the checkpoint looks like {source.what}, not like {model}: {remedy}.")
    inside = {key.removeprefix(source.prefix): t for key, t in upstream.items() if key.startswith(source.prefix)}
    release = checkpoints.fitted(model, inside) if config is None else config
    entries = checkpoints.entries(model, source.naming, config=release)
    layout = recognise.sparse_layout(inside, entries)
    report = Account(model, source.what, source.prefix, source.naming, layout)
    if config is None:
        report.warnings += _other_release(entries, checkpoints.entries(model, source.naming))
    flat: dict[str, dict[str, Tensor]] = {"params": {}, "state": {}, "upstream": {}}
    for entry in entries:
        leaf = _take(entry, inside, report)
        if leaf is not None:
            flat[entry.tree][entry.path] = leaf
    report.carried.update(flat["upstream"])
    _account_for_the_rest(inside, entries, checkpoints.buffers(model, source.naming, config=release), report)
    for key in upstream:
        if not key.startswith(source.prefix):
            report.unused[key] = f"outside {source.prefix!r}, where the model is"
    problem = report.problem()
    if problem:
        raise Refused(problem, report)
    return nest(flat["params"]), nest(flat["state"]), report


def _other_release(entries: list[Entry], published: list[Entry]) -> list[str]:
    """A warning if a file's leaves are not those of the published configuration."""
    other = sorted({entry.key for entry in set(entries) ^ set(published)})
    if not other:
        return []
    more = f" and {len(other) - 1} more tensors are" if len(other) > 1 else " is"
    return [f"of another release than the published configuration: {other[0]}{more} not as there"]


def _take(entry: Entry, upstream: Mapping[str, Tensor], report: Account) -> Tensor | None:
    """The entry's leaf in our layout, or None with the reason in the report."""
    source = upstream.get(entry.key)
    if source is None:
        if entry.tree != "upstream":  # a missing batch count changes nothing
            (report.initial if entry.optional else report.missing)[entry.name] = entry.key
        return None
    expected = _upstream_shape(entry, report.sparse)
    if tuple(source.shape) != expected:
        hint = " (another window size)" if entry.key.endswith("relative_position_bias_table") else ""
        report.mismatched[entry.key] = f"{list(source.shape)} where the model has {list(expected)}{hint}"
        return None
    if entry.tree == "upstream":
        if source.is_floating_point() or source.is_complex() or source.dtype == torch.bool or (source < 0).any():
            report.mismatched[entry.key] = (
                f"{_dtype(source)} {source.tolist()}, where a batch norm's count of batches belongs"
            )
        report.unused[entry.key] = "batch counts of batch norms, kept for export"
        return source.detach().clone()
    # As it becomes: what is infinite in float32 only is no weight either.
    leaf = source.detach().to(entry.dtype) if source.is_floating_point() else source.detach()
    if what := impossible(entry.name, leaf):
        report.mismatched[entry.key] = what
        return None
    if source.dtype != entry.dtype:
        report.warnings.append(f"{entry.key} is {_dtype(source)} and becomes {str(entry.dtype)[6:]}")
    report.used[entry.key] = entry.name
    return _to_ours(leaf, entry, report.sparse).clone(memory_format=torch.contiguous_format)


def _account_for_the_rest(
    upstream: Mapping[str, Tensor], entries: list[Entry], computed: Mapping[str, Tensor], report: Account
) -> None:
    """Files every key that no entry names under unused or unknown; keeps what the export could not recompute."""
    named = {entry.key for entry in entries}
    for key, source in upstream.items():
        if key in named:
            continue
        if key in computed:
            report.unused[key] = "derived from the configuration"
            difference = _difference(source, computed[key])
            if difference:
                report.unused[key] += ", not equal"
                report.warnings.append(f"{key} {difference}, bevfn uses its own")
            if not _same_bits(source, computed[key]):
                report.carried[key] = source.detach().clone()
            continue
        reason = checkpoints.reason_unused(key, report.model)
        if reason is None:
            report.unknown.append(key)
        else:
            report.unused[key] = reason
            report.carried[key] = source.detach().clone()


def export_state(
    params: dict,
    state: dict,
    model: str,
    carried: Mapping[str, Tensor],
    *,
    config: Any = None,
    sparse: SparseLayout = "spconv2",
    naming: Naming = "mmdet",
    prefix: str = "",
) -> dict[str, Tensor]:
    """The upstream state dict, in upstream's order: the inverse of `import_state`, bit for bit.

    Derived buffers are recomputed and batch counts are 0 unless `carried` (Account.carried) holds them. Leaves that a
    lone Swin may lack are left out. Raises ValueError that names a leaf which is missing, unknown or of another shape.
    """
    flat = {f"params.{path}": leaf for path, leaf in tree.flatten(params).items()}
    flat |= {f"state.{path}": leaf for path, leaf in tree.flatten(state).items()}
    found: dict[str, Tensor] = {}
    release = checkpoints.fitted(model, flat) if config is None else config
    entries = checkpoints.entries(model, naming, config=release)
    unknown = sorted(set(flat) - {entry.name for entry in entries})
    if unknown:
        raise ValueError(f"{model} has no {unknown[0]} (nor {len(unknown) - 1} more): export it as the model it is.")
    for entry in entries:
        if entry.tree == "upstream":
            found[entry.key] = carried.get(entry.key, torch.zeros(entry.shape, dtype=entry.dtype)).clone()
        elif entry.name in flat:
            leaf = flat[entry.name].detach().cpu()
            if tuple(leaf.shape) != entry.shape:
                raise ValueError(f"{entry.name} is {list(leaf.shape)} where {model} has {list(entry.shape)}.")
            found[entry.key] = _to_upstream(leaf, entry, sparse).clone(memory_format=torch.contiguous_format)
        elif not entry.optional:
            raise ValueError(f"{entry.name} is missing: {model} cannot be exported without it.")
    found |= {
        key: carried.get(key, buffer).clone()
        for key, buffer in checkpoints.buffers(model, naming, config=release).items()
    }
    found |= {key: kept.clone() for key, kept in carried.items() if key not in found}
    return {prefix + key: leaf for key, leaf in found.items()}


def nest(flat: Mapping[str, Tensor]) -> dict:
    """Nested dicts and lists from dotted paths; a level whose names are all numbers is a list, without gaps.

    Raises ValueError, naming the path, for what is no such tree.
    """
    root: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = root
        if len(parents) > DEEPEST:
            raise ValueError(
                f"the path {path[:60]!r} has {len(parents) + 1} levels, where none has more than {DEEPEST}."
            )
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path[:60]!r} lies below a path that is a leaf itself.")
        if last in node:
            raise ValueError(f"{path[:60]!r} is a leaf, and other leaves lie below it.")
        node[last] = leaf
    return _lists(root, "")


def _lists(node: Any, path: str) -> Any:
    if not isinstance(node, dict):
        return node
    children = {name: _lists(child, f"{path}{name}.") for name, child in node.items()}
    if not children or not all(name.isdecimal() for name in children):
        return children
    if set(children) != {str(i) for i in range(len(children))}:
        raise ValueError(f"the list {path[:-1]} has gaps: its items are {', '.join(sorted(children))[:60]}.")
    return [children[str(i)] for i in range(len(children))]


# --- layouts -----------------------------------------------------------------------------------------------------


def _merged_to_ours(x: Tensor) -> Tensor:
    # Original Swin stacks blocks of C: (row, column) = (0,0) (1,0) (0,1) (1,1). Ours takes C channels of row-major
    # 2x2 patches, as torch's unfold.
    return x.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2)  # ... C*4


def _merged_to_upstream(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)  # ... 4*C


_LAYOUTS: dict[
    WeightLayout, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
] = {  # (to ours, to upstream)
    "same": (lambda x: x, lambda x: x),
    "sparse": (lambda x: x.permute(1, 2, 3, 4, 0), lambda x: x.permute(4, 0, 1, 2, 3)),  # spconv 2: out kx ky kz in
    "sequence": (lambda x: x.squeeze(-1), lambda x: x.unsqueeze(-1)),
    "row": (lambda x: x.unsqueeze(2), lambda x: x.squeeze(2)),
    "swapped": (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1)),
    "merged": (_merged_to_ours, _merged_to_upstream),
}


def _layout(entry: Entry, sparse: SparseLayout) -> WeightLayout:
    """mmcv's sparse kernels are laid out as ours."""
    return "same" if entry.layout == "sparse" and sparse == "mmcv" else entry.layout


def _to_ours(x: Tensor, entry: Entry, sparse: SparseLayout) -> Tensor:
    return _LAYOUTS[_layout(entry, sparse)][0](x)


def _to_upstream(x: Tensor, entry: Entry, sparse: SparseLayout) -> Tensor:
    return _LAYOUTS[_layout(entry, sparse)][1](x)


def _upstream_shape(entry: Entry, sparse: SparseLayout) -> tuple[int, ...]:
    return tuple(_to_upstream(torch.empty(entry.shape, device="meta"), entry, sparse).shape)


# --- small things ------------------------------------------------------------------------------------------------


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _difference(stored: Tensor, computed: Tensor) -> str | None:
    """How a stored buffer differs from the configuration's, None if only by rounding."""
    if stored.shape != computed.shape or stored.is_complex():
        return f"is {tree.describe(stored)} where the configuration gives {tree.describe(computed)}"
    error = (stored.double() - computed.double()).abs().max().item()
    # 1e-4: float32 rounding of pixel coordinates up to 703 is 6e-5
    return None if error <= 1e-4 else f"differs from the configuration's by up to {error:.3g}"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
