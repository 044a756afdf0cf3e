"""Pytrees: nested dicts, lists and dataclasses whose leaves are tensors (or None: absent, never a leaf).

The dotted path of a leaf, `head.decoder.0.norms.1.weight`, is its name in checkpoints, optimizer groups and errors.
The traversal is torch's own (`torch.utils._pytree`), which Dynamo traces, so all of this works inside a train step.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


def register(cls: type | None = None, *, static: tuple[str, ...] = ()) -> Any:
    """Class decorator: makes a dataclass a pytree node whose children are its fields.

    static: fields that are part of the structure instead (compared by ==, not mapped); trees that differ in them are
    different, and so are their graphs.
    """
    if cls is None:
        return partial(register, static=static)
    if not static:
        pytree.register_dataclass(cls)
        return cls
    names = [field.name for field in dataclasses.fields(cls) if field.name not in static]

    def flatten(node: Any) -> tuple[list, tuple]:
        present = [name for name in names if getattr(node, name) is not None]
        return [getattr(node, name) for name in present], (present, [getattr(node, name) for name in static])

    def flatten_with_keys(node: Any) -> tuple[list, tuple]:
        children, made = flatten(node)
        return [(pytree.GetAttrKey(name), child) for name, child in zip(made[0], children)], made

    def unflatten(children: Iterable[Any], made: tuple) -> Any:
        absent = dict.fromkeys(names)
        return cls(**{**absent, **dict(zip(made[0], children)), **dict(zip(static, made[1]))})

    pytree.register_pytree_node(cls, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys)
    return cls


def map(f: Callable, tree: Any, *rest: Any) -> Any:
    """The tree of f(leaf, *leaves of rest at the same place); None stays None.

    Raises ValueError where a tree of `rest` has other paths (the order of a dict's keys does not matter).
    """
    firsts, spec = pytree.tree_flatten(tree)
    columns = [firsts, *(_aligned(other, tree) for other in rest)]
    return pytree.tree_unflatten([None if row[0] is None else f(*row) for row in zip(*columns)], spec)


def leaves(tree: Any) -> list[Tensor]:
    """The tensors in the order of `flatten`."""
    return [leaf for leaf in pytree.tree_leaves(tree) if leaf is not None]


def flatten(tree: Any) -> dict[str, Any]:
    """{dotted path: leaf}, in traversal order (dicts in insertion order), without None."""
    pairs, _ = pytree.tree_flatten_with_path(tree)
    return {_dotted(path): leaf for path, leaf in pairs if leaf is not None}


def unflatten(flat: dict[str, Any], like: Any) -> Any:
    """The tree shaped `like` with the leaves of `flat` (order free).

    Raises ValueError that names the paths which are missing or unknown.
    """
    pairs, spec = pytree.tree_flatten_with_path(like)  # its order, not that of `flat`: a file may hold any
    names = [None if leaf is None else _dotted(path) for path, leaf in pairs]
    missing = [n for n in names if n is not None and n not in flat]
    known = set(names)
    unknown = [n for n in flat if n not in known]
    if missing or unknown:
        parts = [f"{what}: {_some(paths)}" for what, paths in (("missing", missing), ("unknown", unknown)) if paths]
        raise ValueError("tree.unflatten: " + "; ".join(parts))
    return pytree.tree_unflatten([None if n is None else flat[n] for n in names], spec)


def diff(a: Any, b: Any, names: tuple[str, str] = ("the first", "the second")) -> list[str]:
    """One line per path where the trees differ in structure, shape or dtype; empty if they agree. names: of the two in the lines."""
    first, second = names
    flat_a, flat_b = flatten(a), flatten(b)
    lines = [f"{path}: {describe(leaf)} only in {first}" for path, leaf in flat_a.items() if path not in flat_b]
    lines += [f"{path}: {describe(leaf)} only in {second}" for path, leaf in flat_b.items() if path not in flat_a]
    both = [(path, describe(flat_a[path]), describe(flat_b[path])) for path in flat_a if path in flat_b]
    return lines + [f"{path}: {one} in {first}, {two} in {second}" for path, one, two in both if one != two]


def unzip(made: Any) -> tuple[Any, Any]:
    """(params, state) of nested dicts and lists of what layers' `init` gave: (params, state) pairs, or parameters alone.

    The state has no entry for what has none; a list's stateless layers come last.
    """
    params, state = _unzip(made)
    return params, {} if state is None else state


def _unzip(made: Any) -> tuple[Any, Any]:
    if isinstance(made, tuple):
        return made[0], made[1]
    if isinstance(made, dict):
        pairs = {name: _unzip(part) for name, part in made.items()}
        states = {name: state for name, (_, state) in pairs.items() if state is not None}
        return {name: params for name, (params, _) in pairs.items()}, states or None
    if isinstance(made, list):
        parts = [_unzip(part) for part in made]
        return [params for params, _ in parts], [state for _, state in parts if state is not None] or None
    return made, None


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """Floating-point leaves in `dtype`; integer and bool leaves as they are."""
    return map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)


def to(tree: Any, device: torch.device | str) -> Any:
    """All leaves on `device`."""
    return map(lambda leaf: leaf.to(device), tree)


def num_elements(tree: Any) -> int:
    """Elements of all leaves, e.g. the number of parameters."""
    return sum(leaf.numel() for leaf in leaves(tree))


def describe(leaf: Any) -> str:
    """`float32 [64, 3]` for a tensor, else the type's name."""
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"


def _aligned(other: Any, tree: Any) -> list:
    """The leaves of `other`, None included, in the order of `tree`'s."""
    # The common case first, without paths: a train step maps hundreds of leaves several times.
    leaves, spec = pytree.tree_flatten(tree)
    others, other_spec = pytree.tree_flatten(other)
    if spec == other_spec and all((a is None) == (b is None) for a, b in zip(leaves, others)):
        return others
    if differing := [line for line in diff(tree, other) if " only in the " in line]:
        raise ValueError("tree.map: the trees differ in structure: " + "; ".join(differing[:5]))
    pairs, _ = pytree.tree_flatten_with_path(tree)
    by_path = flatten(other)
    return [by_path.get(_dotted(path)) for path, _ in pairs]


def _dotted(path: tuple) -> str:
    return ".".join(_name(key) for key in path)


def _name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):  # MappingKey, SequenceKey, GetAttrKey
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"no name for pytree key {key!r}")


def _some(paths: Iterable[str], limit: int = 5) -> str:
    paths = list(paths)
    return ", ".join(paths[:limit]) + (f" and {len(paths) - limit} more" if len(paths) > limit else "")
