"""`bevfn graph`: every experiment's steps are one static graph, or the exit code and a sentence say what is in the way."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import ge_graphs
import pytest
import torch

from bevfn import catalogue, waiting
from bevfn.ascend import execute
from bevfn.commands import lowering
from bevfn.commands.graph import graph
from bevfn.kernels.voxel_pool import voxel_pool
from bevfn.models import bevdepth, bevnext

ge_graphs.need_torchair()
EXPERIMENTS = tuple(name for name in catalogue.EXPERIMENTS if name != "custom")  # whose networks are BEVFusion's


def dynamic(x):
    return x[x > 0].sum()


def tiny_steps(train):
    """Stands in for `steps`: one experiment, whose train step is `train`."""
    return lambda *_, **__: {
        "train": (train, (torch.ones(3), torch.ones(3))), "inference": (lambda params, state, batch: batch, (0, 0, 0)),
    }  # fmt: skip


# Of a step from eager's state. fp32: losses to rounding (measured 1.3e-7); a ReLU at the edge of 0 makes the gradient
# norm 6e-5 and single leaves 2e-3. fp16: the interpreter rounds once where eager rounds between operators, 5e-4 an
# activation; measured 3e-4 and 8e-2.
LIMITS = {
    "fp32": {"loss/total": 1e-5, "grad_norm": 1e-3, "leaves": 1e-2},
    "fp16": {"loss/total": 2e-3, "grad_norm": 5e-2, "leaves": 0.3},
    # BEVNeXt's second stage at this size: parameters moved by 6e-8 change eager's own gradient by 1.6e-2 (three draws: 7.6e-3
    # to 1.6e-2), its norm by 2e-3. Measured: 5.4e-3 and 2.6e-2; the losses as the others'.
    "stage2": {"loss/total": 1e-5, "grad_norm": 2e-2, "leaves": 8e-2},
    # The same in fp16: parameters moved by 6e-8 change eager's own loss by 2e-4, its norm by 5e-2, its gradient by 0.5 and the
    # square of it (optimizer.v) by 0.6; moved by 5e-4, which is an activation's rounding, by 9e-4, 0.2, 0.7 and 1.1. Measured:
    # 7e-4, 5.4e-2, 0.4 and 0.9: of the leaves the limit says no more than their size. The first step overflows, in both.
    "stage2-fp16": {"skipped": 1, "loss/total": 2e-3, "grad_norm": 0.2, "leaves": 1.1},
    # The LiDAR-only detector in fp16: rounding chooses a few of the untrained detector's 200 queries, whose boxes then count.
    # Parameters moved by 6e-8 change eager's own loss/bbox by 1e-2 and matched_iou by 5e-2 (three draws each); moved by 5e-4,
    # which is an activation's rounding, by 3e-2 and 0.55; loss/cls by 3e-3. Measured: 1.1e-2, 3.9e-2 (8.8e-2 in the second
    # step) and 5.7e-3; the loss and the gradient norm do not notice.
    "lidar-fp16": {
        "loss/total": 2e-3,
        "grad_norm": 5e-2,
        "leaves": 0.3,
        "loss/bbox": 5e-2,
        "loss/cls": 2e-2,
        "matched_iou": 0.2,
    },
    # At published size a few of an untrained LiDAR-only detector's 200 queries are chosen by rounding: parameters moved by
    # 1e-7 change eager's own losses by 7e-5, loss/bbox by 2.8 %. Measured: 3.0e-5, 1.3e-2 (leaves); others 2.1e-7, 4e-3.
    "published": {"loss/total": 1e-3, "grad_norm": 1e-2, "leaves": 5e-2},
}

STEPS = 2
KERNELS = {"fp32": "published", "fp16": "a2"}
# Besides, one step of the fp32 cases as an A2's kernels compute, of the graph that is lowered already: of the camera's
# networks, and of BEVFusion's tables in the graph. With HF32's 11 bits in convolutions it is no fp32 step any more, and
# MatrixVT's alone says that it still trains: an operand's rounding, 2.4e-4, is between fp16's and fp32's.
ALSO = {
    "bevfusion_lidar": ("a2",),
    "matrixvt": ("a2", "a2-hf32"),
    "bevnext": ("a2",),
}


@pytest.fixture
def also(monkeypatch):
    """{kernels: comparison} of one more step each, of the case's experiment; fill `also.kernels` before."""
    made = SimpleNamespace(kernels=(), found={})
    run = execute.execute

    def with_others(step, lowered, *arguments, **flags):
        for kernels in made.kernels:
            made.found[kernels] = run(step, lowered, *arguments, steps=1, device=kernels)
        return run(step, lowered, *arguments, **flags)

    monkeypatch.setattr(execute, "execute", with_others)
    return made


@pytest.fixture
def few_pixels(monkeypatch):
    """The camera models' mini size with a quarter of its pixels and cells and one block a stage: the graph's operators are the
    same, and half of the suite's time went into executing them, fp16 convolutions above all."""
    cells = {"cell": (3.2, 3.2), "cells": (32, 32)}

    def smaller(made):
        grid = replace(made.grid, image_size=(64, 192), x_m=(-51.2, 51.2, 3.2), y_m=(-51.2, 51.2, 3.2))
        return {"backbone": replace(made.backbone, blocks=(1, 1, 1, 1)), "grid": grid}

    def small_bevdepth(config, mini=bevdepth.mini):
        made = mini(config)
        return replace(made, head=replace(made.head, **cells), **smaller(made))

    def small_bevnext(config, mini=bevnext.mini):
        made = mini(config)
        head = replace(made.head, head=replace(made.head.head, **cells))
        return replace(made, head=head, random_field=replace(made.random_field, iterations=2), **smaller(made))

    monkeypatch.setattr(bevdepth, "mini", small_bevdepth)
    monkeypatch.setattr(bevnext, "mini", small_bevnext)


# One precision of each in CI, both of the main job: a case takes one to two minutes of a core. BEVNeXt's second stage, below,
# has all operators of its first.
QUICK = {
    (experiment, "fp16" if experiment == "bevdepth" else "fp32")
    for experiment in EXPERIMENTS
    if experiment != "bevnext"
}
QUICK |= {("bevfusion", "fp16")}
STEPS_OF = [
    pytest.param(experiment, None, precision, marks=() if (experiment, precision) in QUICK else pytest.mark.slow)
    for experiment in EXPERIMENTS
    for precision in ("fp32", "fp16")
]
STEPS_OF += [  # with earlier frames, in one call
    ("bevnext", "bevnext-stage2", "fp32"),
    pytest.param("bevnext", "bevnext-stage2", "fp16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("experiment", "model", "precision"), STEPS_OF)
def test_an_experiment_is_one_static_graph_that_trains_like_eager(
    experiment, model, precision, few_pixels, also, tmp_path, capsys
):
    also.kernels = ALSO.get(experiment, ()) if precision == "fp32" else ()
    code = graph(
        experiment, model=model, scale="mini", precision=precision, execute=STEPS, kernels=KERNELS[precision],
        host_tables=experiment != "bevfusion_lidar",  # whose graph makes them
        json_file=tmp_path / "g.json", out=tmp_path / "o",
    )  # fmt: skip
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "g.json").read_text())
    assert code == 0 and "missing converters: none" in printed and "unknown dimensions: none" in printed
    assert set(figures["steps"]) == {"train", "inference"}
    for made in figures["steps"].values():
        assert made["complete"] and (made["graph_breaks"], made["ge_graphs"]) == (0, 1)
        assert made["nodes"] == sum(made["types"].values())
        assert made["families"]["matrix products"]["gflop"] > 0 and made["bytes"]["activations"] > 0
        check_nodes(made)
    files = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert files == [
        f"{model or experiment}_mini_{precision}_{s}.{e}" for s in ("inference", "train") for e in ("air", "pbtxt")
    ]
    compared = figures["steps"]["train"]["execute"]
    assert compared["steps"] == STEPS
    of_stage2 = {"fp32": "stage2", "fp16": "stage2-fp16"}
    own = {("bevfusion_lidar", "fp16"): "lidar-fp16"}.get((experiment, precision), precision)
    case = of_stage2[precision] if model == "bevnext-stage2" else own
    check(compared, case)
    assert also.found.keys() == set(also.kernels)
    for kernels, found in also.found.items():
        check(found.to_json(), "fp16" if kernels == "a2-hf32" else case)
    if "a2-hf32" in also.found:  # the mode does something
        assert also.found["a2-hf32"].metrics["loss/total"] > also.found["a2"].metrics["loss/total"]


def check_nodes(made):
    """None that no unit of an A2 computes, or its AI CPU without a reason (`accepted` in bevfn/ascend/a2.json), or that does
    nothing."""
    assert made["no_kernel"] == made["unlisted"] == []
    assert [line for line in made["off_core"] if ": accepted: " not in line] == []
    assert made["casts"]["idle"] == 0  # torchair's own `mul` makes hundreds


@pytest.fixture
def one_task(few_pixels, monkeypatch):
    """The camera models' heads with one task of all classes: six that are alike have half of a step's nodes, and no other ones
    (types and dtypes; compared once)."""

    def alone(head):
        return replace(head, tasks=(head.classes,), nms=head.kinds[0], nms_thresholds=head.nms_thresholds[:1])

    def smaller_bevdepth(config, mini=bevdepth.mini):
        made = mini(config)
        return replace(made, head=alone(made.head))

    def smaller_bevnext(config, mini=bevnext.mini):
        made = mini(config)
        return replace(made, head=replace(made.head, head=alone(made.head.head)))

    monkeypatch.setattr(bevdepth, "mini", smaller_bevdepth)
    monkeypatch.setattr(bevnext, "mini", smaller_bevnext)


@pytest.mark.parametrize(
    ("experiment", "model", "step"),
    [
        ("bevfusion_lidar", None, "train"),
        (
            "awml",
            "awml-camera-lidar",
            "train",
        ),  # whose kinds of nodes are those of -lidar and -camera, and more: compared once
        ("matrixvt", None, "train"),
        ("bevnext", None, "train"),
        ("matrixvt", None, "inference"),
        ("bevnext", None, "inference"),
    ],
)
def test_in_fp16_too_the_ai_core_has_kernels(experiment, model, step, one_task, monkeypatch, tmp_path):
    """Of the experiments that CI executes in fp32 alone: casts make other nodes of fp16."""
    steps = lowering.steps
    monkeypatch.setattr(lowering, "steps", lambda *given, **how: {step: steps(*given, **how)[step]})
    assert graph(experiment, model=model, scale="mini", precision="fp16", json_file=tmp_path / "g.json") == 0
    check_nodes(json.loads((tmp_path / "g.json").read_text())["steps"][step])


def check(compared, case):
    limits = {"skipped": 0, **LIMITS[case]}
    assert (
        compared["skipped"] == limits.pop("skipped") and compared["metrics"]["skipped"] == 0
    )  # the same steps in both
    errors = {**compared["metrics"], "leaves": compared["worst"]["leaves"][1]}
    for what, limit in limits.items():
        assert errors[what] <= limit, (what, errors[what])


@pytest.mark.slow  # minutes each, 10 GB
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_published_size_trains_like_eager(experiment, tmp_path):
    assert graph(experiment, execute=1, batch_size=1, json_file=tmp_path / "g.json") == 0
    figures = json.loads((tmp_path / "g.json").read_text())
    check(figures["steps"]["train"]["execute"], "published")


@pytest.mark.parametrize("ops, kind", [("stock", "InplaceIndexAdd"), ("drivingsdk", "BEVPoolV3")])
def test_the_choice_of_operators_is_in_the_report(ops, kind, monkeypatch, capsys, tmp_path):
    def train(train_state, batch):
        return voxel_pool(train_state, batch["context"], batch["cell"], 5), {}

    batch = {"context": torch.ones(1, 3, 4, 8), "cell": torch.zeros(1, 2, 3, 4, dtype=torch.int32)}
    monkeypatch.setattr(lowering, "steps", lambda *_, **__: {"train": (train, (torch.ones(1, 2, 3, 4), batch))})
    monkeypatch.setattr(waiting, "EVERY_S", 0.001)
    assert graph("bevfusion", ops=ops, json_file=tmp_path / "g.json") == 0
    told = capsys.readouterr()
    assert f"custom operators: {ops}" in told.out
    assert "lowering the train step: 0 s so far" in told.err and "so far" not in told.out
    figures = json.loads((tmp_path / "g.json").read_text())
    assert figures["ops"] == figures["steps"]["train"]["ops"] == ops and kind in figures["steps"]["train"]["types"]


def test_the_air_file_is_the_graph(tmp_path):
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    from bevfn.ascend import dump, interpret
    from bevfn.ascend.lower import lower

    lowered = lower(torch.neg, (torch.ones(3),))
    readable, air = dump.write(lowered.graph, tmp_path / "new" / "step")
    model = ModelDef()
    model.ParseFromString(air.read_bytes())
    assert torch.equal(interpret.run(model.graph[0], [torch.ones(3)])[0], -torch.ones(3))
    assert 'op: "Neg"' in readable.read_text()


def test_a_dynamic_operator_put_in_on_purpose_is_named(monkeypatch):
    def train(train_state, batch):
        return dynamic(train_state), batch

    monkeypatch.setattr(lowering, "steps", tiny_steps(train))
    with pytest.raises(
        ValueError, match=r"aten.index.Tensor makes the graph depend on values at .*test_graph_command.py"
    ):
        graph("bevfusion")


def test_a_missing_converter_is_exit_code_1(monkeypatch, capsys, tmp_path):
    def train(train_state, batch):
        return torch.linalg.eigvalsh(torch.outer(train_state, batch))

    monkeypatch.setattr(lowering, "steps", lambda *_, **__: {"train": (train, (torch.ones(3), torch.ones(3)))})
    assert graph("bevfusion", json_file=tmp_path / "g.json") == 1
    assert "_linalg_eigh" in capsys.readouterr().out
    assert json.loads((tmp_path / "g.json").read_text())["steps"]["train"]["complete"] is False


def test_a_node_without_a_kernel_is_exit_code_1_and_an_installed_cann_decides(monkeypatch, capsys, tmp_path):
    def train(train_state, batch):
        return torch.sort(train_state, stable=True)[0] * 2, batch

    arguments = {"train": (train, (torch.ones(3), torch.ones(3)))}
    monkeypatch.setattr(lowering, "steps", lambda *_, **__: arguments)
    assert graph("bevfusion") == 0
    table = tmp_path / "built-in/op_impl/ai_core/tbe/config/ascend910b/aic-ascend910b-ops-info.json"
    table.parent.mkdir(parents=True)
    both = {"dtype": "float", "name": "x"}
    table.write_text(json.dumps({"Mul": {"input0": both, "input1": both, "output0": both}}))
    listed = tmp_path / "built-in/op_impl/aicpu/aicpu_kernel/config/aicpu_kernel.json"
    listed.parent.mkdir(parents=True)
    listed.write_text(json.dumps({"Unique": {"input0": {"name": "x", "type": "DT_FLOAT"}}}))
    assert graph("bevfusion", opp=tmp_path, json_file=tmp_path / "g.json") == 1
    assert f"kernels by {tmp_path}: " in capsys.readouterr().out
    made = json.loads((tmp_path / "g.json").read_text())["steps"]["train"]
    assert len(made["no_kernel"]) == 1 and made["no_kernel"][0].startswith("Sort x1: in no list of kernels; at ")
    with pytest.raises(ValueError, match="nowhere is no folder; give CANN's toolkit folder"):
        graph("bevfusion", opp=tmp_path / "nowhere")


def test_the_stage_is_short_for_bevnexts_models(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(lowering, "steps", lambda _, config, **__: asked.append(config.model) or {})
    assert graph("bevnext", stage=2) == graph("bevnext", stage=1, model="bevnext-stage1") == 0
    assert asked == ["bevnext-stage2", "bevnext-stage1"]
    for experiment, model in (("bevdepth", None), ("bevnext", "bevnext-pers-stage2")):
        with pytest.raises(ValueError, match="--stage 2 is short for --model bevnext-stage2 of bevnext; leave it out"):
            graph(experiment, stage=2, model=model)


def test_an_unwritable_output_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot make the output folder .*; choose another --out"):
        graph("bevfusion", out=tmp_path / "file" / "below")


def test_without_torch_npu_the_console_command_says_so(tmp_path):
    """In a process whose torch_npu cannot be found."""
    script = (
        "import importlib.util, sys; real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'torch_npu' else real(name, *a)\n"
        "from bevfn.cli import main; sys.argv = ['bevfn', 'graph', 'bevfusion_lidar', '--scale', 'mini']; main()"
    )
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "make npu" in done.stderr and "Traceback" not in done.stderr


def test_capacities_of_a_model_without_voxels_are_refused_and_so_is_room_for_nothing():
    with pytest.raises(
        ValueError, match="--capacities are voxels and sites, which bevdepth-2key has not; leave them out"
    ):
        graph("bevdepth", scale="mini", capacities=(256, 256))
    with pytest.raises(ValueError, match="--capacities 0 must be at least 1"):
        graph("bevfusion_lidar", scale="mini", capacities=(256, 0))
    for scale, capacities, strided in (
        ("published", (100, 100), 3),
        ("published", (100,) * 6, 3),
        ("mini", (256, 256), 2),
    ):
        said = (
            f"--capacities are {strided + 2} numbers at {scale} scale: voxels, then active sites after each of the encoder's "
            f"{strided} strided convolutions and after its last one; there are {len(capacities)}"
        )
        with pytest.raises(ValueError, match=said):
            graph("bevfusion_lidar", scale=scale, capacities=capacities)


def test_flags_that_would_change_nothing_are_refused():
    for kernels in ("a2", "a2-hf32"):
        with pytest.raises(
            ValueError, match=f"--kernels {kernels} is of the steps that --execute runs; add --execute 5"
        ):
            graph("bevdepth", scale="mini", kernels=kernels)
    for experiment, model in (("bevdepth", "bevdepth-2key"), ("matrixvt", "matrixvt")):
        said = f"--no-host-tables is of BEVFusion and BEVNeXt, and {model} has no tables; leave it out"
        with pytest.raises(ValueError, match=said):
            graph(experiment, scale="mini", host_tables=False)
