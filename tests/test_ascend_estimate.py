"""The roofline of a lowered step by hand, and by a profile as msprof writes it (no real one is here)."""

import csv
import json

import ge_graphs
import pytest
import torch

from bevfn import catalogue
from bevfn.ascend import estimate as module
from bevfn.ascend import report
from bevfn.ascend.estimate import Profile, Task, calibrated, estimate, read_profile, seconds, tasks_of
from bevfn.ascend.lower import lower
from bevfn.ascend.placement import own_tables
from bevfn.ascend.rates import LARGE_COPIES, PUBLISHED, SCENARIOS
from bevfn.ascend.uses import FAMILIES, used_by
from bevfn.commands import lowering
from bevfn.commands.graph import graph
from bevfn.kernels import batch_norm as kernel

ge_graphs.need_torchair()
ROWS, WIDTH, COUNT = 1000, 64, 5000


def step(table, index, weight):
    """A gather, two products of one shape, an addition by index, a sort of integers, views."""
    rows = table[index].half()  # gathered
    product = (rows @ weight) @ weight
    added = torch.zeros(ROWS, WIDTH).index_add(0, index, product.float())
    return added.view(WIDTH, ROWS), torch.sort(index)[0]


ARGUMENTS = (torch.zeros(ROWS, WIDTH), torch.zeros(COUNT, dtype=torch.int64), torch.zeros(WIDTH, WIDTH).half())


@pytest.fixture(scope="module")
def lowered():
    made = lower(step, ARGUMENTS)
    return made, list(used_by(made))


@pytest.fixture(scope="module")
def tasks(lowered):
    return list(tasks_of(*lowered, own_tables()))


def guess(lowered, **other):
    return estimate(*lowered, batch=4, memory={"batch": 2**30}, **other)


def test_tasks_are_counted_by_hand(lowered, tasks):
    made = guess(lowered, published=5.0)
    groups = made.groups
    assert (groups["gather"].tasks, groups["gather"].million_rows) == (1, COUNT / 1e6)
    assert (groups["index_add"].tasks, groups["index_add"].million_rows) == (1, COUNT / 1e6)
    assert groups["cube"].tasks == 2 and groups["cube"].gflop == pytest.approx(2 * 2 * COUNT * WIDTH * WIDTH / 1e9)
    assert groups["AI CPU"].tasks == 1  # the sort of int64
    assert not {"Reshape", "Const", "Data"} & {
        kind for kind in {use.kind for use in lowered[1] if use.name in {t.name for t in tasks}}
    }
    assert made.tasks == len(tasks) and made.compilations == made.tasks - 1  # the products are one operator
    assert made.small_tasks == sum(task.bytes < 65_536 for task in tasks)
    assert made.samples_per_second["middle"] == pytest.approx(4 / made.seconds["middle"])
    shown = made.text()
    assert (
        "published 5.00 per NPU" in shown
        and f"operators to compile: {made.compilations}; memory 1.0 of 64 GiB" in shown
    )
    assert made.seconds["optimistic"] < made.seconds["middle"] < made.seconds["pessimistic"]
    assert json.loads(json.dumps(made.to_json()))["groups"]["cube"]["tasks"] == 2


def test_a_constant_that_is_written_in_place_is_copied_in_every_step(lowered, tasks):
    """GE folds none that is, and keeps the copy: of the zeros that rows are added to, of batch norm's running statistics."""
    kinds = {use.name: use.kind for use in lowered[1]}
    (move,) = [task for task in tasks if kinds[task.name] == "TensorMove"]
    assert (move.group, move.bytes) == ("copies", 2 * 4 * ROWS * WIDTH)
    (zeros,) = [use for use in lowered[1] if use.kind == "Fill"]
    assert zeros.constant and report.report("step", *lowered[:1], None, lowered[1]).bytes["folded"] >= 4 * ROWS * WIDTH

    made = lower(lambda x, w: kernel.batch_norm(x, w, w, 1e-5)[0], (torch.zeros(2, 7, 4, 4), torch.ones(7)))
    uses = list(used_by(made))
    moves = [use.traffic for use in uses if use.kind == "TensorMove" and not use.constant]
    assert moves == [2 * 4 * 7] * 2
    norm = estimate(made, uses, batch=1, memory={}).groups["batch norm"]
    assert norm.tasks == 4  # the two copies, BNTrainingReduce and BNTrainingUpdate

    counts = lambda x: x + torch.zeros(5).index_add(0, torch.arange(3), torch.ones(3))  # noqa: E731
    uses = list(used_by(lower(counts, (torch.zeros(5),))))
    assert {use.kind for use in uses if not use.constant} == {"Add"}  # where all is constant nothing is copied


def test_a_task_takes_the_largest_of_its_bounds():
    rates = SCENARIOS["middle"]

    def took(group, flops=0, size=0, rows=0, half=True):
        return seconds(Task("t", group, flops, size, rows, half), rates) - rates.launch

    assert took("cube", flops=10**12) == pytest.approx(10**12 / rates.half)
    assert took("cube", flops=10**12, half=False) == pytest.approx(10**12 / rates.single)
    assert took("cube", flops=1, size=10**12) == pytest.approx(10**12 * rates.traffic / LARGE_COPIES)
    assert took("vector", flops=10**15) == 0  # the bound of vectors is their traffic
    assert took("gather", rows=10**9) == pytest.approx(10**9 * rates.gather)
    assert took("index_add", rows=10**9, size=1) == pytest.approx(10**9 * rates.index_add)
    assert took("AI CPU", size=10**9) + rates.launch == pytest.approx(rates.cpu_launch + 10**9 / rates.cpu_bytes)


COLUMNS = ("Op Name", "OP Type", "Task Type", "Task Duration(us)", "Output Shapes")


def written(path, rows, columns=COLUMNS):
    """rows: (name, microseconds) or (name, microseconds, shapes) or (name, microseconds, shapes, formats)."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([name, "T", "AI_CORE", took, *(shapes or ["N/A"])] for name, took, *shapes in rows)
    return path


def test_a_profile_replaces_what_was_assumed(lowered, tasks, tmp_path):
    (gather,) = [task for task in tasks if task.group == "gather"]
    first, second = [task for task in tasks if task.group == "cube"]
    rows = [
        (gather.name, 100),
        (gather.name, "300 "),
        (first.name, 50, f"{COUNT},{WIDTH};"),
        ("trans_TransData_7", 1000),
    ]  # two steps
    profile = read_profile(written(tmp_path / "op_summary_1.csv", rows))
    assert profile.seconds[gather.name] == pytest.approx(200e-6) and profile.written == {first.name: COUNT * WIDTH}
    made = guess(lowered, profile=profile)
    assert made.groups["gather"].seconds["profile"] == pytest.approx(200e-6)
    assert made.groups["cube"].seconds["profile"] == pytest.approx(100e-6)  # the other takes as long
    assert made.groups["of GE alone"].seconds == {**dict.fromkeys(SCENARIOS, 0), "profile": pytest.approx(1e-3)}
    copies = [task for task in tasks if task.group == "copies"]
    assumed = {task.name: seconds(task, SCENARIOS["middle"]) for task in tasks}
    share = 250e-6 / (assumed[gather.name] + assumed[first.name])
    assert made.groups["copies"].seconds["profile"] == pytest.approx(share * sum(assumed[t.name] for t in copies))
    assert "profile" in made.text() and second.name not in profile.seconds


@pytest.mark.parametrize(
    "rows, columns, said",
    [
        ([("a", 1)], ("Name", "b", "c", "Task Duration(us)"), "has no column 'Op Name'; give an op_summary_"),
        ([("a", "N/A")], None, r"line 2: Task Duration\(us\) is 'N/A', not microseconds"),
        ([("a", -1)], None, "is '-1', not microseconds"),
        ([("a", "inf")], None, "is 'inf', not microseconds"),
        ([], None, "has no task; profile some steps"),
    ],
)
def test_what_is_no_profile_is_one_sentence(tmp_path, rows, columns, said):
    path = written(tmp_path / "p.csv", rows, **({"columns": columns} if columns else {}))
    with pytest.raises(ValueError, match=said):
        read_profile(path)


def test_a_profile_that_is_not_there_or_of_another_graph_is_one_sentence(lowered, tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the profile .*nowhere.csv"):
        read_profile(tmp_path / "nowhere.csv")
    with pytest.raises(
        ValueError, match=r"names 0 of the graph's \d+ tasks: it is of another graph; profile the step of"
    ):
        guess(lowered, profile=Profile({"Conv2D_1": 1.0}, {}))
    assert calibrated([], {}, Profile({"x": 1.0}, {"x": 1})) == {}


def test_a_profile_of_the_same_names_and_other_sizes_is_of_another_graph(lowered, tasks, tmp_path):
    """Names are a type and a number, which graphs have in common: that of another batch, say, names every task."""
    names = [(task.name, 10, f'"{2 * task.written}"') for task in tasks]
    profile = read_profile(written(tmp_path / "other.csv", names))
    said = (
        f"{len(tasks)} of the {len(tasks)} tasks that the profile names write other sizes in it: it is of another graph"
    )
    with pytest.raises(ValueError, match=said):
        guess(lowered, profile=profile)
    half = [(task.name, 10, task.written * (2 - i % 2)) for i, task in enumerate(tasks)]
    said = f"{(len(tasks) + 1) // 2} of the {len(tasks)} tasks that the profile names write other sizes in it"
    with pytest.raises(ValueError, match=said):
        guess(lowered, profile=read_profile(written(tmp_path / "half.csv", half)))
    padded = [  # layouts of the cube
        (task.name, 10, task.written + 16, "NC1HWC0;ND")
        if task.group == "cube"
        else (task.name, 10, task.written, "ND")
        for task in tasks
    ]
    columns = (*COLUMNS, "Output Formats")
    assert guess(lowered, profile=read_profile(written(tmp_path / "same.csv", padded, columns))).seconds["profile"] > 0


def test_a_profile_without_sizes_is_taken_and_said_so(lowered, tasks, tmp_path):
    names = [(task.name, 10) for task in tasks]
    made = guess(lowered, profile=read_profile(written(tmp_path / "p.csv", names)))
    said = "the profile has no Output Shapes: whether it is of this batch and scale could not be compared"
    assert made.unsized and said in made.text()
    sized = [(task.name, 10, task.written) for task in tasks]
    assert said not in guess(lowered, profile=read_profile(written(tmp_path / "q.csv", sized))).text()
    assert said not in guess(lowered).text()


def test_a_mark_in_front_of_a_profile_is_read_over(tmp_path):
    """As spreadsheets write it."""
    columns = [f"{name} " for name in COLUMNS]  # as a table that was pasted may have them
    path = written(tmp_path / "p.csv", [("a", 1), ("", 5)], columns)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_profile(path).seconds == {"a": pytest.approx(1e-6)}
    path.write_bytes(b"\xff\xfe" + path.read_bytes())
    with pytest.raises(ValueError, match=r"cannot read the profile .*p.csv"):
        read_profile(path)


def test_rows_without_a_duration_are_left_out_and_said_so(lowered, tasks, tmp_path):
    rows = [(task.name, 0 if i == 0 else 10, task.written) for i, task in enumerate([*tasks, *tasks])]
    made = guess(lowered, profile=read_profile(written(tmp_path / "p.csv", rows)))
    assert made.instant == 1 and made.seconds["profile"] == pytest.approx(len(tasks) * 10e-6)
    assert "1 rows of the profile have a duration of 0, and are left out" in made.text()
    assert "of the profile" not in guess(lowered).text()
    with pytest.raises(ValueError, match=r"p.csv has no task but 2 of a duration of 0; profile some steps"):
        read_profile(written(tmp_path / "p.csv", [("a", 0), ("b", "0.0")]))


def test_the_command_prints_it(monkeypatch, capsys, tmp_path):
    def train(train_state, batch):
        return train_state @ batch, {}

    monkeypatch.setattr(lowering, "steps", lambda *_, **__: {"train": (train, (torch.ones(3, 3), torch.ones(3, 3)))})
    assert graph("bevdepth", estimate=True, json_file=tmp_path / "g.json") == 0
    assert "published 4.04 per NPU" in capsys.readouterr().out
    made = json.loads((tmp_path / "g.json").read_text())["steps"]["train"]["estimate"]
    assert made["batch"] == 8 and made["tasks"] == 1
    with pytest.raises(ValueError, match="--calibrate is of the estimate; add --estimate"):
        graph("bevdepth", calibrate=tmp_path / "p.csv")


@pytest.mark.parametrize(
    "experiment, stage, published",
    [("bevfusion", None, "4.10"), ("matrixvt", None, "5.77"), ("bevnext", 1, "2.07"), ("bevnext", 2, "0.95")],
)
def test_what_is_published_is_of_the_model(experiment, stage, published, monkeypatch, capsys):
    one = (lambda train_state, batch: (train_state @ batch, {}), (torch.ones(3, 3), torch.ones(3, 3)))
    monkeypatch.setattr(lowering, "steps", lambda *_, **__: {"train": one})
    assert graph(experiment, stage=stage, estimate=True) == 0
    assert f"published {published} per NPU" in capsys.readouterr().out
    assert PUBLISHED.keys() <= catalogue.MODELS.keys()


def test_groups_and_reports_agree(lowered):
    assert set(module.GATHERS) | set(module.ADDS) <= FAMILIES["gather and scatter"]
    made = report.report("step", *lowered[:1], None, lowered[1])
    assert made.families["matrix products"].nodes == guess(lowered).groups["cube"].tasks
