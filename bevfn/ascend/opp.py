"""The tables of operators that an installed CANN has for Ascend 910B, as `placement.Tables`.

CANN keeps them as JSON below its folder `opp` (the toolkit installs them on a machine without an NPU too):

    built-in/op_impl/ai_core/tbe/config/ascend910b/*ops-info*.json       AI Core: dtypes and formats, a column per kernel
    built-in/op_impl/aicpu/*/config/*.json                               AI CPU
    vendors/*/op_impl/...                                                packages that were added

Format: read from CANN 8.1.RC1's files, none of which is here. In a column `inputN` and `outputN` have "dtype" and "format",
lists of equal length separated by commas, or none where the kernel's own code decides; an AI CPU table has "type", every
dtype that one operand may have. The binaries beside the tables are not read: torchair has static graphs compiled anew.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bevfn.ascend import placement
from bevfn.ascend.placement import Kernel, Tables
from bevfn.files import read_json

CHIP = "ascend910b"
_NAMES = {"float": "float32", "double": "float64", "bf16": "bfloat16"}
_NUMBERED = re.compile(r"(dynamic_)?(input|output)(\d+)$")


def read(folder: Path) -> Tables:
    """The tables below `folder`, a toolkit's or its `opp`.

    Raises ValueError naming what is wrong: no CANN there, one for other chips, or a file that is no table.
    """
    root = next((path for path in (folder / "opp", folder) if (path / "built-in" / "op_impl").is_dir()), None)
    if root is None:
        there = "has no built-in/op_impl" if folder.is_dir() else "is no folder"
        raise ValueError(f"--opp {folder} {there}; give CANN's toolkit folder, or its opp")
    core_files = [
        *sorted((root / "built-in/op_impl/ai_core/tbe/config" / CHIP).glob("*ops-info*.json")),
        *sorted(root.glob(f"vendors/*/op_impl/ai_core/tbe/config/{CHIP}/*ops-info*.json")),
    ]
    if not core_files:
        chips = sorted(p.name for p in (root / "built-in/op_impl/ai_core/tbe/config").glob("*") if p.is_dir())
        others = f", but tables of {', '.join(chips)}" if chips else ""
        raise ValueError(f"--opp {folder} has no table for {CHIP}{others}; install the kernels package of Atlas A2")
    kernels = {name: _kernel(entry) for name, entry in _entries(core_files)}
    core = {name: kernel for name, kernel in kernels.items() if kernel is not None}
    cpu: dict[str, set[str]] = {}
    cpu_files = [
        *root.glob("built-in/op_impl/aicpu/*/config/*.json"),
        *root.glob("vendors/*/op_impl/cpu/config/*.json"),
    ]
    cpu_files = sorted(path for path in cpu_files if not path.name.startswith("host_cpu"))
    if not any("built-in" in path.relative_to(root).parts for path in cpu_files):
        raise ValueError(
            f"--opp {folder} has no list of AI CPU kernels (built-in/op_impl/aicpu/*/config); install CANN's toolkit with them"
        )
    for name, entry in _entries(cpu_files):
        cpu.setdefault(name, set()).update(_cpu_dtypes(entry))
    dtypes = {name: frozenset(names) for name, names in cpu.items()}
    return _completed(Tables(str(folder), core, frozenset(kernels.keys() - core.keys()), dtypes))


def _completed(tables: Tables) -> Tables:
    """With our facts where no table states dtypes, and where GE makes another type of one: each needs the type installed."""
    own, core = placement.own_tables(), dict(tables.core)
    taken = set()
    for name, fact in placement.facts()["types"].items():
        installed = fact.get("becomes", name)
        there = installed in tables.core or installed in tables.open
        if there and name in own.core and (name in tables.open or name != installed):
            core[name] = own.core[name]
            taken.add(name)
    return Tables(tables.source, core, tables.open - set(core), tables.cpu, frozenset(taken))


def _entries(files: list[Path]) -> Iterator[tuple[str, dict]]:
    for path in files:
        try:
            table = read_json(path.read_bytes())
            if not isinstance(table, dict):
                raise ValueError("it is no object of types")
            if not table:
                raise ValueError("no type is in it")
            for name, entry in table.items():
                _check(name, entry)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a table of operators ({error}); install CANN again") from None
        yield from table.items()


def _check(name: str, entry: Any) -> None:
    """Raises ValueError naming the type, and the operand, whose entry cannot be read."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is no object")
    operands = {key: value for key, value in entry.items() if _NUMBERED.match(key)}
    for key, operand in operands.items():
        if not isinstance(operand, dict):
            raise ValueError(f"{key} of {name} is no object")
        for field in ("dtype", "format", "type"):
            value = operand.get(field, "-")
            if not isinstance(value, str) or (field != "format" and not all(map(str.strip, value.split(",")))):
                raise ValueError(f"{field} of {key} of {name} is {value!r}, and not names separated by commas")
    # CANN's own tables have a few without: of memory to clear (MemSet), which no graph of ours asks for.
    if not operands and name in placement.facts()["types"]:
        raise ValueError(f"{name} has neither operands nor results")


def _operands(entry: dict) -> tuple[list[dict], list[dict]]:
    """(inputs, outputs), in order."""
    found: dict[str, list[tuple[int, dict]]] = {"input": [], "output": []}
    for key, value in entry.items():
        if match := _NUMBERED.match(key):
            found[match[2]].append((int(match[3]), value))
    inputs, outputs = ([value for _, value in sorted(found[kind], key=lambda v: v[0])] for kind in ("input", "output"))
    return inputs, outputs


def _kernel(entry: dict) -> Kernel | None:
    """None where the table leaves the dtypes of an operand or result to the kernel, or to another type, or has no operands."""
    inputs, outputs = _operands(entry)
    both = [*inputs, *outputs]
    if not both or any("dtype" not in operand or operand.get("unknownshape_format") == "NULL" for operand in both):
        return None
    dtypes = [[_dtype(name) for name in operand["dtype"].split(",")] for operand in both]
    if len({len(names) for names in dtypes}) > 1:  # which belong together, it does not say
        return None
    return Kernel(
        frozenset(zip(*dtypes)),
        tuple(operand.get("paramType") == "dynamic" for operand in both),
        len(inputs),
        tuple(frozenset(name.strip() for name in operand.get("format", "").split(",")) - {""} for operand in both),
    )


def _cpu_dtypes(entry: dict) -> set[str]:
    inputs, outputs = _operands(entry)
    return {
        _dtype(name.removeprefix("DT_").lower())
        for operand in (*inputs, *outputs)
        for name in operand.get("type", "").replace(" ", "").split(",")
        if name
    }


def _dtype(name: str) -> str:
    name = name.strip()
    return _NAMES.get(name, name)
