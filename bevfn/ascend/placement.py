"""Where an Atlas A2 (Ascend 910B) computes a node: on its AI Core, there after a cast, on its AI CPU, or nowhere.

By the tables of an installed CANN (`opp.read`), or by the facts of `a2.json` for the types that our graphs are made of, each
with its source. The rule for dtypes is GE's default (hicann/ge ffdcbc9f, SubOpsStore::CheckPrecisionReduce and
OpDtypeSelectionStrategyDefaultMode): the kernel of the node's own dtypes, else of float32 in place of float16 or bfloat16,
behind a cast. What GE decides beyond dtypes (fusion, a kernel's refusal of a shape) is not in any table: this is what to
expect and to look for in a profile, not a verdict.

Dtypes are torch's names ("float32"); a rule in `a2.json` is "operand operand -> result", where T is one of those after
"for", "a/b" is a choice, and "T*" any number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

from bevfn.files import read_json

Place = Literal["AI Core", "AI Core with a cast", "AI CPU", "GE", "HCCL", "none", "unknown"]
FACTS = Path(__file__).with_name("a2.json")
HIGHER = {"float16": "float32", "bfloat16": "float32"}


@dataclass(frozen=True)
class Kernel:
    """The combinations of dtypes that one type's kernels take."""

    columns: frozenset[tuple[str, ...]]
    """of operands, then results; one entry stands for all tensors of a dynamic one"""
    dynamic: tuple[bool, ...] = ()
    """of operands, then results"""
    operands: int = 1
    """how many of them are operands"""
    layouts: tuple[frozenset[str], ...] = ()
    """GE's formats that each takes; empty: any"""


@dataclass(frozen=True)
class Tables:
    """What is known about a chip's kernels."""

    source: str
    core: Mapping[str, Kernel]
    open: frozenset[str]
    """types on the AI Core whose dtypes no table states"""
    cpu: Mapping[str, frozenset[str]]
    """dtypes of all operands and results"""
    facts: frozenset[str] = frozenset()
    """types whose dtypes come from `a2.json`, because the installed table leaves them to the kernel"""


@dataclass(frozen=True)
class Placed:
    """Of one node."""

    place: Place
    reason: str = ""
    casts: tuple[str, ...] = ()
    """"float16 to float32" for every operand and result that GE casts, constants left out"""
    layout: bool = False
    """whether the kernel takes an operand in another layout only (the cube's), so that GE moves data before it"""


@dataclass(frozen=True)
class Tensor:
    """What matters of an operand or result here."""

    dtype: str
    layout: str = "ND"
    constant: bool = False


@cache
def facts() -> dict[str, Any]:
    """The content of `a2.json`."""
    return read_json(FACTS.read_bytes())


@cache
def own_tables() -> Tables:
    """The tables of `a2.json`."""
    types = facts()["types"]
    return Tables(
        source=f"{FACTS.name} ({facts()['chip']}, CANN {facts()['release']})",
        core={name: kernel_of(fact["core"]) for name, fact in types.items() if "core" in fact},
        open=frozenset(),
        cpu={name: frozenset(fact["cpu"].split()) for name, fact in types.items() if "cpu" in fact},
    )


def kernel_of(rules: Sequence[str]) -> Kernel:
    """The kernel that `a2.json`'s rules describe."""
    columns: set[tuple[str, ...]] = set()
    words: list[str] = []
    operands = 0
    for rule in rules:
        signature, _, bound = rule.partition(" for ")
        before, _, after = signature.partition("->")
        operands, words = len(before.split()), [*before.split(), *after.split()]
        for dtype in bound.split() or [""]:
            choices = [[dtype if choice == "T" else choice for choice in word.rstrip("*").split("/")] for word in words]
            columns.update(product(*choices))
    return Kernel(frozenset(columns), tuple(word.endswith("*") for word in words), operands)


def place(tables: Tables, kind: str, operands: Sequence[Tensor | None], results: Sequence[Tensor | None]) -> Placed:
    """Where a node of type `kind` runs; None: an operand that is not given, or a result that has no dtype."""
    if kind in facts()["ge"]["types"]:
        return Placed("GE")
    if kind in facts()["hccl"]["types"]:
        return Placed("HCCL")
    if kind == "Cast" and operands[0] and results[0] and operands[0].dtype == results[0].dtype:
        return Placed("GE")  # which takes it out
    kernel, cpu = tables.core.get(kind), tables.cpu.get(kind)
    given = [x.dtype for x in (*operands, *results) if x is not None]
    if kernel is not None and (found := _nearest(kernel, operands, results)) and not (kind == "Cast" and found.casts):
        return found
    if cpu is not None and cpu.issuperset(given):
        if kind in facts()["accepted"]:
            return Placed("AI CPU", f"accepted: {facts()['accepted'][kind]}")
        return Placed("AI CPU", f"no AI Core kernel for {_shown(given)}" if kernel else "no AI Core kernel")
    if kind in tables.open:
        return Placed("unknown", "the table leaves its dtypes to the kernel")
    if kernel is None and cpu is None and tables is own_tables() and kind not in facts()["types"]:
        return Placed("unknown", f"not in {FACTS.name}, which has the types that were looked up")
    return Placed("none", f"no kernel takes {_shown(given)}" if kernel or cpu else "in no list of kernels")


def _shown(dtypes: Sequence[str]) -> str:
    return " ".join(dict.fromkeys(dtypes))


def _nearest(kernel: Kernel, operands: Sequence[Tensor | None], results: Sequence[Tensor | None]) -> Placed | None:
    """By the column that wants the fewest casts; None if none fits."""
    wanted = _assigned(kernel, operands, results)
    if wanted is None:
        return None
    fits = [casts for column in kernel.columns if (casts := _casts(wanted, column, kernel.operands)) is not None]
    if not fits:
        return None
    casts = min(fits, key=lambda casts: (len(casts), casts))
    moved = bool(kernel.layouts) and any(
        layouts and x.layout not in layouts and not (x.layout == "ND" and layouts & {"NCHW", "NHWC", "NCDHW"})
        for position, x in wanted
        if (layouts := kernel.layouts[position]) is not None
    )
    return Placed("AI Core with a cast" if casts else "AI Core", casts=casts, layout=moved)


def _assigned(
    kernel: Kernel, operands: Sequence[Tensor | None], results: Sequence[Tensor | None]
) -> list[tuple[int, Tensor]] | None:
    """(position in a column, tensor) of all that is given; None if there is more than the kernel has."""
    made: list[tuple[int, Tensor]] = []
    for start, end, tensors in ((0, kernel.operands, operands), (kernel.operands, len(kernel.dynamic), results)):
        positions = list(range(start, end))
        if repeated := [p for p in positions if kernel.dynamic[p]]:
            each = len(tensors) - len(positions) + 1
            positions = [p for p in positions for _ in range(each if p == repeated[0] else 1)]
        if len(tensors) > len(positions):
            return None
        made += [(p, x) for p, x in zip(positions, tensors) if x is not None]
    return made


def _casts(wanted: Sequence[tuple[int, Tensor]], column: Sequence[str], operands: int) -> tuple[str, ...] | None:
    """Those between the tensors and what the column takes; None if a tensor cannot be cast to it."""
    casts: dict[tuple[int, str], str] = {}
    for position, x in wanted:
        own, read = column[position], position < operands
        if own == x.dtype:
            continue
        if own != HIGHER.get(x.dtype):
            return None
        if not x.constant:  # GE casts a constant once, while it compiles
            casts[position, x.dtype] = f"{x.dtype} to {own}" if read else f"{own} to {x.dtype}"
    return tuple(casts.values())
