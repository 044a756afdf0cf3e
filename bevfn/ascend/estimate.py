"""How long a lowered step would take on an Atlas A2: a roofline per node, before there is a device, or by a profile of one.

    seconds of a task = max(FLOPs / cube, bytes / bandwidth, rows x cost of a row) + launch

by the constants of `rates`, in three scenarios: a span to plan by, not a prediction to be held to. Tasks are the nodes that
GE leaves: no views, no cast of a dtype to itself, nothing that is computed from constants. What GE fuses beyond that is in
the scenarios' share of traffic, not in the number of tasks. Collectives are left out (docs/distributed.md).

A profile (msprof's op_summary_*.csv) replaces the assumptions: tasks that it names take what they took, the rest of a group is
scaled as the tasks of that group that it names, and tasks that only GE knows (TransData, fused ones) are a row of their own.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bevfn.ascend import placement
from bevfn.ascend.interpret.node import BOOKKEEPING
from bevfn.ascend.lower import Lowered
from bevfn.ascend.rates import LARGE_COPIES, MEMORY, SCENARIOS, SMALL_TASK, Rates
from bevfn.ascend.report import places
from bevfn.ascend.uses import FAMILIES, Use, flops

GATHERS = {
    "Gather": 1,
    "GatherV2": 1,
    "GatherElements": 1,
    "GatherNd": 1,
    "IndexByTensor": 1,
}  # {type: place of the index}
ADDS = {"InplaceIndexAdd": 1, "ScatterElements": 1, "TensorScatterAdd": 1, "TensorScatterUpdate": 1, "ScatterNdAdd": 1}
GROUPS = (
    *("cube", "gather", "index_add", "sort", "batch norm", "random numbers", "vector", "copies", "AI CPU"),
    "of GE alone",
)
NAMED = 0.1  # share of a graph's tasks that a profile of it names at least: GE renames what it fuses
# Share of those that write as many elements as the profile says. Names are a type and a number in any graph, and what
# has a parameter's size has it at any batch size: in a step, up to half of the tasks.
ALIKE = 0.9
COLUMNS = ("Op Name", "Task Duration(us)")
SIZES, LAYOUTS = "Output Shapes", "Output Formats"
"""of msprof, where it was asked for them: axes by commas, outputs by semicolons, as in "4,64,128,128;64" and "NCHW;ND" """
PLAIN = ("ND", "NCHW", "NHWC", "NCDHW", "NDHWC")  # others are padded


@dataclass(frozen=True)
class Task:
    """A node that the device is asked to run."""

    name: str
    group: str
    flops: int
    bytes: int
    rows: int
    """gathered, added or sorted"""
    half: bool
    """whether products are of 16 bits"""
    written: int = 0
    """elements of the first result"""


@dataclass(frozen=True)
class Profile:
    """What a device took for the tasks that it named."""

    seconds: dict[str, float]
    written: dict[str, int]
    """elements of the first output; of those whose sizes are in the file, in a layout that does not pad"""
    instant: int = 0
    """rows of a duration of 0, which are left out: a task that ran took time"""


@dataclass(frozen=True)
class Group:
    """The tasks of one kind."""

    tasks: int
    gigabytes: float
    gflop: float
    million_rows: float
    seconds: dict[str, float]
    """by scenario, and "profile" if there is one"""


@dataclass(frozen=True)
class Estimate:
    """Of one step."""

    batch: int
    groups: dict[str, Group]
    seconds: dict[str, float]
    small_tasks: int
    """of less than 64 KB"""
    compilations: int
    """distinct operators that GE compiles: type, shapes, dtypes and attributes"""
    memory: int
    """bytes of inputs, outputs, activations, workspace and folded constants"""
    published: float | None
    """samples a second and NPU"""
    instant: int = 0
    """rows of the profile that are left out"""
    unsized: bool = False
    """whether a profile says no sizes of the tasks that it names: it may be of another batch"""

    @property
    def tasks(self) -> int:
        """Of all groups that the graph has."""
        return sum(group.tasks for group in self.groups.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "tasks": self.tasks, "samples_per_second": self.samples_per_second}

    @property
    def samples_per_second(self) -> dict[str, float]:
        """By scenario."""
        return {name: self.batch / seconds for name, seconds in self.seconds.items()}

    def text(self) -> str:
        """For the terminal."""
        names = list(self.seconds)
        columns = "".join(f"{name:>13}" for name in names)
        lines = [
            "  estimated, never measured (bevfn/ascend/rates.py), ms:",
            f"  {'':<16}{columns}{'tasks':>9}{'M rows':>10}{'GB':>9}{'GFLOP':>11}",
        ]
        for name, g in self.groups.items():
            times = "".join(f"{g.seconds[scenario] * 1e3:>13.1f}" for scenario in names)
            lines.append(f"  {name:<16}{times}{g.tasks:>9}{g.million_rows:>10.1f}{g.gigabytes:>9.1f}{g.gflop:>11.1f}")
        sums = "".join(f"{self.seconds[name] * 1e3:>13.1f}" for name in names)
        rates = "".join(f"{rate:>13.2f}" for rate in self.samples_per_second.values())
        published = f"   published {self.published:.2f} per NPU" if self.published else ""
        rows = {name: group.million_rows for name, group in self.groups.items()}
        if self.instant:
            lines.insert(1, f"  {self.instant} rows of the profile have a duration of 0, and are left out")
        if self.unsized:
            lines.insert(
                1, f"  the profile has no {SIZES}: whether it is of this batch and scale could not be compared"
            )
        return "\n".join(
            [
                *lines,
                f"  {'sum':<16}{sums}{self.tasks:>9}",
                f"  {'samples/s':<16}{rates}{published}",
                f"  rows: {rows.get('gather', 0):.1f} M gathered, {rows.get('index_add', 0):.1f} M added; tasks under "
                f"64 KB: {self.small_tasks}; operators to compile: {self.compilations}; memory "
                f"{self.memory / 2**30:.1f} of {MEMORY / 2**30:.0f} GiB",
            ]
        )


def estimate(
    lowered: Lowered,
    uses: Sequence[Use],
    *,
    batch: int,
    memory: Mapping[str, int],
    tables: placement.Tables | None = None,
    published: float | None = None,
    profile: Profile | None = None,
    scenarios: Mapping[str, Rates] = SCENARIOS,
) -> Estimate:
    """The estimate of a step over `batch` samples.

    uses: `used_by(lowered)`, complete. memory: `Report.bytes`. profile: `read_profile`.
    scenarios: "middle" among them. Raises ValueError if `profile` is of another graph.
    """
    tasks = list(tasks_of(lowered, uses, tables or placement.own_tables()))
    times = {name: {task.name: seconds(task, rates) for task in tasks} for name, rates in scenarios.items()}
    alone = 0.0
    if profile is not None:
        times["profile"] = calibrated(tasks, times["middle"], profile)
        alone = sum(took for name, took in profile.seconds.items() if name not in times["profile"])
    groups: dict[str, Group] = {}
    for name in GROUPS:
        members = [task for task in tasks if task.group == name]
        own = {scenario: sum(took[task.name] for task in members) for scenario, took in times.items()}
        if name == "of GE alone" and profile is not None:
            own["profile"] = alone
        if members or any(own.values()):
            size = (sum(task.bytes for task in members), sum(task.flops for task in members if task.group == "cube"))
            rows = sum(task.rows for task in members)
            groups[name] = Group(len(members), size[0] / 1e9, size[1] / 1e9, rows / 1e6, own)
    return Estimate(
        batch=batch,
        groups=groups,
        seconds={scenario: sum(group.seconds[scenario] for group in groups.values()) for scenario in times},
        small_tasks=sum(task.bytes < SMALL_TASK for task in tasks),
        compilations=len(_compiled(lowered, uses, {task.name for task in tasks})),
        memory=sum(memory.values()),
        published=published,
        instant=profile.instant if profile else 0,
        unsized=profile is not None and not any(task.name in profile.written for task in tasks),
    )


def tasks_of(lowered: Lowered, uses: Sequence[Use], tables: placement.Tables) -> Iterator[Task]:
    """The nodes that become tasks, in order."""
    for use, where in zip(uses, places(lowered, list(uses), tables)):
        if use.constant or where.place in ("GE", "HCCL") or (use.kind in FAMILIES["views"]):
            continue
        group = "AI CPU" if where.place == "AI CPU" else _group(use, str(lowered.sources.get(use.name, ("", None))[1]))
        floats = [x for x in use.operands if isinstance(x, Tensor) and x.is_floating_point()]
        half = bool(floats) and all(x.element_size() == 2 for x in floats)
        written = use.results[0].numel() if use.results and isinstance(use.results[0], Tensor) else 0
        yield Task(use.name, group, flops(use), use.traffic, _rows(use), half, written)


def seconds(task: Task, rates: Rates) -> float:
    """Of one task, by a scenario."""
    if task.group == "AI CPU":
        return rates.cpu_launch + task.bytes / rates.cpu_bytes
    moved = task.bytes * rates.traffic / LARGE_COPIES
    cube = task.flops / (rates.half if task.half else rates.single) if task.group == "cube" else 0.0
    row = {"gather": rates.gather, "index_add": rates.index_add, "sort": rates.sort}.get(task.group, 0.0)
    return max(moved, cube, task.rows * row) + rates.launch


def read_profile(path: Path) -> Profile:
    """Of msprof's op_summary_*.csv, the mean over its steps. Raises ValueError if it is none."""
    took: dict[str, list[float]] = defaultdict(list)
    written: dict[str, int] = {}
    instant = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # a spreadsheet may have put a mark in front
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            missing = [name for name in COLUMNS if name not in reader.fieldnames]
            if missing:
                raise ValueError(f"{path} has no column {missing[0]!r}; give an op_summary_*.csv of msprof")
            for row in reader:
                microseconds = _microseconds(row[COLUMNS[1]], f"{path}, line {reader.line_num}")
                if microseconds == 0:
                    instant += 1
                    continue
                if not (name := (row[COLUMNS[0]] or "").strip()):
                    continue
                took[name].append(microseconds * 1e-6)
                if (elements := _elements(row.get(SIZES), row.get(LAYOUTS))) is not None:
                    written[name] = elements
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read the profile {path} ({error}); give an op_summary_*.csv of msprof") from None
    if not took:
        nothing = f"no task but {instant} of a duration of 0" if instant else "no task"
        raise ValueError(f"{path} has {nothing}; profile some steps")
    # A task runs once a step in a static graph, so that its mean is a step's; msprof may have lost some.
    return Profile({name: sum(times) / len(times) for name, times in took.items()}, written, instant)


def _microseconds(text: str | None, where: str) -> float:
    try:
        number = float((text or "").strip())
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{where}: {COLUMNS[1]} is {text!r}, not microseconds")
    return number


def _elements(shapes: str | None, layouts: str | None) -> int | None:
    """Of the first output; None where the file does not say, or its layout may be padded."""
    if layouts and layouts.strip().strip('"').split(";")[0].removeprefix("FORMAT_") not in PLAIN:
        return None
    axes = (shapes or "").strip().strip('"').split(";")[0].split(",")
    return math.prod(map(int, axes)) if all(axis.strip().isdecimal() for axis in axes) else None


def calibrated(tasks: Sequence[Task], guessed: Mapping[str, float], profile: Profile) -> dict[str, float]:
    """Seconds of every task: those of the profile, or the guess scaled as the named tasks of the same group were.

    Raises ValueError if the profile is of another graph: it names few of the tasks, or they write other sizes in it.
    """
    took = profile.seconds
    named = [task for task in tasks if task.name in took]
    sized = [task for task in named if task.name in profile.written]
    other = sum(profile.written[task.name] != task.written for task in sized)
    again = "it is of another graph; profile the step of the same commit, experiment, precision, scale and batch size"
    if len(named) < NAMED * len(tasks):
        raise ValueError(f"the profile names {len(named)} of the graph's {len(tasks)} tasks: {again}")
    if len(sized) - other < ALIKE * len(sized):
        raise ValueError(f"{other} of the {len(sized)} tasks that the profile names write other sizes in it: {again}")
    real: defaultdict[str, float] = defaultdict(float)
    thought: defaultdict[str, float] = defaultdict(float)
    for task in named:
        for key in (task.group, ""):
            real[key] += took[task.name]
            thought[key] += guessed[task.name]
    factor = {key: real[key] / thought[key] for key in thought}
    return {t.name: took.get(t.name, guessed[t.name] * factor.get(t.group, factor[""])) for t in tasks}


def _group(use: Use, source: str) -> str:
    if use.kind in FAMILIES["matrix products"] | FAMILIES["convolutions"]:
        return "cube"
    if use.kind in GATHERS:
        return "gather"
    if use.kind in ADDS:
        return "index_add"
    if use.kind in FAMILIES["sorting"]:
        return "sort"
    if "batch_norm." in source and use.kind not in ("Relu", "ReluGrad"):
        return "batch norm"
    if "rng." in source:
        return "random numbers"
    return "copies" if use.kind in FAMILIES["data movement"] | FAMILIES["casts"] else "vector"


def _rows(use: Use) -> int:
    place = {**GATHERS, **ADDS, "Sort": 0, "TopKV2": 0}.get(use.kind)
    index = use.operands[place] if place is not None else None
    return index.numel() if isinstance(index, Tensor) else 0


def _compiled(lowered: Lowered, uses: Sequence[Use], tasks: set[str]) -> set[tuple]:
    """What GE compiles once each: it takes operators that agree in these for one."""
    ops = {op.name: op for op in lowered.graph.op}
    return {
        (
            use.kind,
            tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else None for x in (*use.operands, *use.results)),
            tuple(
                (name, value.SerializeToString(deterministic=True))
                for name, value in sorted(ops[use.name].attr.items())
                if name not in BOOKKEEPING and not name.startswith("_")
            ),
        )
        for use in uses
        if use.name in tasks
    }
