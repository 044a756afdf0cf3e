"""A step becomes one GE graph that computes what eager does, and says where everything in it comes from."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import ge_graphs
import pytest
import small_net
import torch
from torch.func import grad

from bevfn import tree
from bevfn.ascend import interpret, report, torchair
from bevfn.ascend.lower import lower
from bevfn.ascend.trace import Value
from bevfn.distributed import Replicas
from bevfn.precision import Policy
from bevfn.training import optim, train

ge_graphs.need_torchair()

NAMES = {"takes": ("train_state", "batch"), "returns": ("train_state", "metrics")}
HERE = Path(__file__).name


def line_of(text):
    """`file:line` of the first line of this file that contains `text`."""
    lines = Path(__file__).read_text().splitlines()
    return f"{HERE}:{next(i for i, line in enumerate(lines, 1) if text in line)}"


def execute(lowered, *arguments):
    return lowered.results(interpret.run(lowered.graph, lowered.arguments(*arguments)))


# The interpreter's modes; that of an A2 alone where one is as good.
MODES = {"fp32": ge_graphs.DEVICES, "fp16": ("a2",), "bf16": ("a2",)}


@pytest.mark.parametrize("precision", MODES)
def test_five_lowered_steps_equal_eager_in_every_leaf(precision):
    start, step = small_net.fresh(precision, ema=optim.Ema())
    lowered = lower(step, (start, small_net.batch()), **NAMES)
    for device in MODES[precision]:
        program = interpret.prepare(lowered.graph, device=device)
        ours = theirs = start
        for i in range(5):
            batch = small_net.batch(i)
            theirs, metrics = step(theirs, batch)
            ours, lowered_metrics = lowered.results(interpret.run(program, lowered.arguments(ours, batch)))
            assert tree.diff(ours, theirs) == [] and tree.diff(lowered_metrics, metrics) == []
        # The same kernels in the same order: a leaf that is not updated, or updated twice, is off by 1.
        limit = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}[precision]
        for name, leaf in tree.flatten(theirs).items():
            moved = float((leaf - tree.flatten(start)[name]).double().norm())
            assert float((tree.flatten(ours)[name] - leaf).double().norm()) <= limit * moved + 1e-9, name


class Twins(Replicas):
    """Two replicas that hold the same, in one process."""

    def sum(self, x):
        return 2 * x.detach()

    def stack(self, x):
        return torch.stack([x.detach(), x.detach()])


def doubled(x: torch.Tensor, *, reduction: str, group: str, fusion: int, fusion_id: int) -> torch.Tensor:
    assert reduction == "sum"
    return 2 * x


def repeated(x: torch.Tensor, *, rank_size: int, group: str, fusion: int, fusion_id: int) -> torch.Tensor:
    return torch.cat([x] * rank_size)


@pytest.fixture
def two_replicas():
    """The group's name, in a process that takes itself for the first of two."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield torch.distributed.group.WORLD.group_name
    torch.distributed.destroy_process_group()


def test_a_step_of_two_replicas_is_one_graph_with_hccl_collectives(two_replicas):
    def step_of(kind):
        replicas = kind(two_replicas, 0, 2)
        loss = small_net.loss_fn(Policy.of("fp32"), train=replicas)
        return train.make_step(loss, small_net.recipe(), replicas=replicas)

    start, _ = small_net.fresh("fp32")
    batch = small_net.batch()
    lowered = lower(step_of(Replicas), (start, batch), **NAMES)
    collectives = [op for op in lowered.graph.op if op.type.startswith("Hcom")]
    assert {op.type for op in collectives} == {"HcomAllReduce", "HcomAllGather"}
    assert {op.attr["group"].s for op in collectives} == {b"tag=ptd:0;rank_list=0,1"}
    told = report.report("train", lowered)
    assert told.complete and told.families["collectives"].nodes == len(collectives)
    program = interpret.prepare(lowered.graph, {"HcomAllReduce": doubled, "HcomAllGather": repeated})
    ours, found = lowered.results(interpret.run(program, lowered.arguments(start, batch)))
    theirs, expected = step_of(Twins)(start, batch)
    ge_graphs.assert_same((ours, found), (theirs, expected))


def test_inputs_and_outputs_are_named_and_static_on_the_device():
    start, step = small_net.fresh("fp16")
    lowered = lower(step, (start, small_net.batch()), **NAMES)
    assert lowered.inputs[0] == Value("train_state.params.stem.conv.weight", (8, 3, 3, 3), torch.float32)
    assert Value("batch.y", (4, 4), torch.float32) in lowered.inputs
    assert [v.name for v in lowered.outputs][-1].startswith("metrics.")
    data = {op.name: op for op in lowered.graph.op if op.type == "Data"}
    assert set(data) == {value.name for value in lowered.inputs}
    assert all(op.output_desc[0].device_type == "NPU" for op in data.values())
    assert list(lowered.graph.attr["_input_placements"].list.i) == [1] * len(lowered.inputs)
    for op in lowered.graph.op:
        assert all(size >= 0 for desc in op.output_desc for size in desc.shape.dim)


def test_what_the_step_does_not_use_or_does_not_change():
    def step(state, batch):
        return {
            "kept": state["kept"],
            "view": state["kept"][0],
            "none": None,
            "new": batch * 2,
            "again": batch * 2,
        }, batch

    state = {"kept": torch.randn(3, 2), "unused": torch.randn(5), "none": None}
    lowered = lower(step, (state, torch.randn(4)))
    assert [v.name for v in lowered.inputs] == ["state.kept", "batch"]
    results, batch = execute(lowered, state, torch.ones(4))
    assert results["none"] is None and torch.equal(results["kept"], state["kept"])
    assert torch.equal(results["view"], state["kept"][0]) and torch.equal(results["new"], torch.full((4,), 2.0))
    assert torch.equal(batch, torch.ones(4)) and batch is not lowered.arguments(state, torch.ones(4))[-1]


def test_one_tensor_returned_twice_is_two_outputs():
    def step(x):
        y = x * 2
        return y, y, y.view(-1)

    lowered = lower(step, (torch.ones(2, 2),))
    a, b, c = execute(lowered, torch.ones(2, 2))
    assert torch.equal(a, b) and c.shape == (4,) and len(lowered.outputs) == 3


def test_tensors_that_the_step_holds_are_constants():
    table = torch.arange(12.0).view(3, 4).t()[1:]  # not contiguous, a part of its memory
    lowered = lower(lambda x: x @ table + table[:, 0].sum(), (torch.ones(2, 3),))
    torch.testing.assert_close(execute(lowered, torch.ones(2, 3)), torch.ones(2, 3) @ table + table[:, 0].sum())


def test_every_node_knows_its_line_and_a_gradient_the_line_it_is_of():
    start, step = small_net.fresh("fp32")
    lowered = lower(step, (start, small_net.batch()), **NAMES)
    unknown = [
        op.name for op in lowered.graph.op if op.type not in ("Data", "NetOutput") and op.name not in lowered.sources
    ]
    assert unknown == []
    sources = [source for op, source in lowered.sources.values() if op == "aten.convolution_backward.default"]
    assert sources and all(
        str(source).startswith("the gradient of bevfn/layers/conv.py:") and "small_net.loss > conv.apply" in str(source)
        for source in sources
    )


# ----------------------------------------------------------------------------------------------------- what is refused


def branch_on_a_value(x):
    return x * 2 if x.sum() > 0 else x  # a branch


def size_of_a_value(x):
    return x[x > 0].sum()  # a mask


def number_of_a_value(x):
    def layer(x):
        return x * x.max().item()  # a number

    return layer(x)


@pytest.mark.parametrize(
    "step, op, comment, layer",
    [
        (branch_on_a_value, "aten._local_scalar_dense", "# a branch", "branch_on_a_value"),
        (size_of_a_value, "aten.index.Tensor", "# a mask", "size_of_a_value"),
        (number_of_a_value, "aten._local_scalar_dense", "# a number", "number_of_a_value > test_ascend_lower.layer"),
        (lambda x: torch.nonzero(x), "aten.nonzero", "(lambda x: torch.nonzero(x),", "<lambda>"),
    ],
)
def test_a_dynamic_step_is_refused_with_operator_layer_and_line(step, op, comment, layer):
    with pytest.raises(ValueError) as caught:
        lower(step, (torch.randn(3),))
    message = str(caught.value)
    assert op in message and line_of(comment) in message and layer in message and "torch.where" in message
    assert "\n" not in message


@pytest.fixture
def strange():
    """An operator of somebody else, without a converter."""
    library = torch.library.Library("bevfn_tests", "FRAGMENT")
    library.define("strange(Tensor x) -> (Tensor, Tensor)")
    library.impl("strange", lambda x: (x + 1, x.sum()), "CompositeExplicitAutograd")
    torch.library.register_fake("bevfn_tests::strange", lambda x: (x.new_empty(x.shape), x.new_empty(())), lib=library)
    yield torch.ops.bevfn_tests.strange
    library._destroy()


def test_an_operator_without_a_converter_is_named_with_its_line(strange):
    def step(x):
        y, total = strange(x * 2)  # no converter
        return y * 3, total

    with pytest.raises(ValueError, match=r"no Ascend converter for bevfn_tests.strange.default at ") as caught:
        lower(step, (torch.randn(3),))
    assert line_of("# no converter") in str(caught.value) and "it has no converter" in str(caught.value)
    lowered = lower(step, (torch.randn(3),), strict=False)
    assert [m.op for m in lowered.missing] == ["bevfn_tests.strange.default"]
    made = report.report("step", lowered)
    assert not made.complete and made.types["Missing"] == 1
    assert "bevfn_tests.strange.default x1" in report.text(made) and line_of("# no converter") in report.text(made)


# -------------------------------------------------------------------------------------------------------- the report


def test_the_report_counts_what_is_known_by_hand():
    """y = (A x + b) in float16, and its gradient in A."""

    def step(A, x):
        return grad(lambda A: ((A.half() @ x).float() ** 2).sum())(A)

    lowered = lower(step, (torch.randn(4, 8), torch.randn(8, 16).half()))
    made = report.report("step", lowered)
    assert made.complete and made.to_json()["complete"]
    assert made.families["matrix products"].nodes == 2
    assert made.families["matrix products"].gflop == pytest.approx(2 * (2 * 4 * 8 * 16) / 1e9, abs=1e-4)
    inserted = made.families["casts"].nodes - made.casts["asked"]
    assert made.casts == {"asked": made.casts["asked"], "inserted": inserted, "idle": 0}
    assert made.casts["asked"] == sum(n.target is torch.ops.aten._to_copy.default for n in lowered.aten.graph.nodes)
    assert made.bytes["A"] == 4 * 8 * 4 and made.bytes["x"] == 8 * 16 * 2 and made.bytes["outputs"] == 4 * 8 * 4
    assert 0 < made.bytes["activations"] < 10_000
    assert made.unknown == made.missing == made.off_core == made.no_kernel == made.unlisted == []
    working = made.nodes - made.constants - made.folded - sum(made.types[kind] for kind in ("Data", "NetOutput"))
    assert sum(made.places.values()) == working and made.places["AI Core"] > 5  # no node is passed over


def test_the_report_names_what_leaves_the_ai_core():
    lowered = lower(lambda x: torch.sort(x >> 3)[0], (torch.arange(9),))
    made = report.report("step", lowered)
    assert any(line.startswith("RightShift x1: no AI Core kernel; at ") and HERE in line for line in made.off_core)
    assert any(line.startswith("Sort x1: no AI Core kernel for int64") for line in made.off_core)
    assert f"{made.places['AI CPU']} AI CPU" in report.text(made) and made.places["AI CPU"] == 2


def test_constants_are_folded_and_take_no_memory_here():
    def step(x):
        return x + torch.arange(200_000_000).view(2, -1).float().sum()  # 1.6 GB if it were computed

    made = report.report("step", lower(step, (torch.zeros(()),)))
    assert made.folded > 2 and made.bytes["folded"] < 100


# --------------------------------------------------------------------------------------- torch_npu missing or unfitting


def test_a_missing_torch_npu_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torchair, "loaded", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"torch_npu is not installed.*make npu.*npu torch_npu==2.13.0"):
        torchair.load()


def test_a_torch_npu_of_another_version_is_one_sentence(monkeypatch):
    spec = importlib.util.find_spec("json")  # any package with a folder
    monkeypatch.setattr(torchair, "loaded", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.8.0")
    with pytest.raises(ValueError, match=rf"torch_npu 2.8.0 is made for another torch than {torch.__version__[:4]}"):
        torchair.load()


def test_an_imported_torch_npu_is_one_sentence(monkeypatch):
    spec = importlib.util.find_spec("json")
    monkeypatch.setattr(torchair, "loaded", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: torch.__version__)
    with pytest.raises(ValueError, match=r"already imported in this process.*TORCH_DEVICE_BACKEND_AUTOLOAD=0"):
        torchair.load()


def test_torch_npu_itself_is_refused_from_then_on():
    with pytest.raises(ModuleNotFoundError, match="lowers graphs offline"):
        importlib.import_module("torch_npu")


def test_bevfn_imports_where_torch_npu_has_no_cann():
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    script = "import bevfn, torch; from bevfn.ascend import torchair; print(torchair.load().__name__)"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "torchair"), done.stderr
