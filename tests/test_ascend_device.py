"""What a device would be given is what is converted and executed offline; nothing here runs on a device."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import ge_graphs
import pytest
import small_net
import torch
import torch.utils._pytree as pytree

from bevfn import compile as compilation
from bevfn.ascend import cache, device, torchair
from bevfn.ascend.lower import lower
from bevfn.kernels.linear_assignment import linear_assignment

CUDA = torch.device(
    "cuda", 0
)  # stands for the NPU: a fake tensor needs no device, and "npu" is no name without torch_npu


def nodes(module):
    """The graph as text, without the addresses of anything."""
    return [(str(n.op), str(n.target), str(n.args), str(n.kwargs)) for n in module.graph.nodes]


def holding(x):
    table = torch.tensor([3.0, 1.0, 2.0])
    return {"y": x + table[torch.arange(x.shape[0], device=x.device)], "none": None, "z": torch.zeros(2, device="cpu")}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_module_for_the_device_is_the_one_that_is_converted(precision):
    ge_graphs.need_torchair()
    ts, step = small_net.fresh(precision)
    lowered = lower(step, (ts, small_net.batch()))
    traced = device.aten(step, (ts, small_net.batch()))
    # torchair's own pass turns views into reshapes of the module that it is given, after both are made
    ours = [(op, target.replace("aten.view.", "aten.reshape."), *rest) for op, target, *rest in nodes(traced.module)]
    assert [tuple(row) for row in ours] == nodes(lowered.aten)
    assert traced.spec == lowered.spec


def test_device_arguments_and_constants_move():
    traced = device.aten(holding, (torch.zeros(3),))
    before = nodes(traced.module)
    assert any("device(type='cpu')" in kwargs for *_, kwargs in before)
    moved = device.retargeted(traced.module, torch.device("meta"))
    assert not any("type='cpu'" in args + kwargs for _, _, args, kwargs in nodes(moved))
    constants = [getattr(moved, n.target) for n in moved.graph.nodes if n.op == "get_attr"]
    assert constants and all(x.device.type == "meta" for x in constants)
    assert nodes(traced.module) == before


def test_every_value_of_a_step_is_on_the_device():
    ts, step = small_net.fresh("fp16")
    traced = device.aten(step, (ts, small_net.batch()))
    assert not any(node.op == "get_attr" for node in traced.module.graph.nodes)  # else a constant would need the device
    moved = device.retargeted(traced.module, CUDA)
    inputs = device.propagated(moved, CUDA)
    values = [
        v for n in moved.graph.nodes for v in pytree.tree_leaves(n.meta.get("val")) if isinstance(v, torch.Tensor)
    ]
    assert len(inputs) == len(traced.inputs) and len(values) > len(inputs)
    assert {value.device for value in values} == {CUDA}


def test_torchairs_compiler_makes_the_graph_that_is_executed_offline():
    """The call that a device gets, but for the device: torchair's own compiler on the retargeted module."""
    ge_graphs.need_torchair()
    ts, step = small_net.fresh("fp16")
    lowered = lower(step, (ts, small_net.batch()))
    traced = device.aten(step, (ts, small_net.batch()))
    compiled = device._compile(device.retargeted(traced.module, CUDA), CUDA, "torchair")
    graph = compiled.runner.graph._proto
    assert [op.type for op in graph.op] == [op.type for op in lowered.graph.op]
    assert [len(op.input) for op in graph.op] == [len(op.input) for op in lowered.graph.op]
    placed = {op.output_desc[0].device_type for op in graph.op if op.type == "Data"}
    assert placed == {"NPU"} == {op.output_desc[0].device_type for op in lowered.graph.op if op.type == "Data"}


def test_a_compiled_graph_is_kept_in_a_folder_of_its_own(monkeypatch, tmp_path):
    ge_graphs.need_torchair()
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")

    def options(step, *arguments):
        traced = device.aten(step, arguments)
        return device._compile(device.retargeted(traced.module, CUDA), CUDA, "torchair").__globals__[
            "local_compile_options"
        ]

    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "kept"))
    x = torch.ones(3)
    first, again, other = (options(f, x) for f in (lambda x: (x + 1,), lambda x: (x + 1,), lambda x: (x + 2,)))
    folders = [Path(made["ge.graph_compiler_cache_dir"]) for made in (first, again, other)]
    assert folders[0] == folders[1] != folders[2]
    assert all(folder.is_dir() and folder.name == "world8global_rank3" for folder in folders)
    assert folders[0].parent.parent == tmp_path / "kept" and first["ge.graph_key"].startswith("graph_")
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"file is no folder; choose another TORCHAIR_CACHE_HOME"):
        options(lambda x: (x + 1,), x)
    monkeypatch.delenv(cache.VARIABLE)
    traced = device.aten(lambda x: (x + 1,), (x,))
    assert hasattr(device._compile(device.retargeted(traced.module, CUDA), CUDA, "torchair"), "runner")


def test_the_compiled_call_gives_what_eager_gives(monkeypatch):
    """With the traced module in place of what torchair would make of it."""
    monkeypatch.setattr(device, "check", lambda backend: None)
    monkeypatch.setattr(device, "npu", lambda tensors, backend: torch.device("cpu"))
    monkeypatch.setattr(device, "_compile", lambda module, where, backend: module)
    flags = types.SimpleNamespace(**{part: types.SimpleNamespace(allow_hf32=True) for part in ("conv", "matmul")})
    monkeypatch.setattr(torch, "get_device_module", lambda name: {"npu": flags}[name])
    ts, step = small_net.fresh("fp32")
    pointers = [x.data_ptr() for x in pytree.tree_leaves(ts) if x is not None]
    expected, metrics = step(small_net.copy(ts), small_net.batch())
    ours, found = compilation.step(step, backend="torchair")(ts, small_net.batch())
    assert not flags.conv.allow_hf32 and not flags.matmul.allow_hf32
    assert ours is ts and [x.data_ptr() for x in pytree.tree_leaves(ts) if x is not None] == pointers  # donated
    ge_graphs.assert_same((ours, found), (expected, metrics))
    run = compilation.function(holding, backend="torchair")
    assert torch.equal(run(torch.ones(3))["y"], holding(torch.ones(3))["y"]) and run(torch.ones(3))["none"] is None
    with pytest.raises(
        ValueError, match=r"x is torch.float32 \[4\], and the graph was compiled for torch.float32 \[3\]"
    ):
        run(torch.ones(4))


def test_tensors_elsewhere_are_refused():
    with pytest.raises(
        ValueError, match="'torchair' needs all tensors on one NPU, and they are on cpu; add --device npu"
    ):
        device.npu([torch.zeros(1)], "torchair")


def test_what_would_be_wrong_or_on_the_host_is_refused():
    wrong = device.aten(lambda x: torch.nn.functional.dropout(x, 0.5), (torch.zeros(4),))
    with pytest.raises(ValueError, match=r"no Ascend converter for aten.*test_ascend_device.py"):
        device.check_module(wrong.module, "torchair")
    assigned = device.aten(linear_assignment, (torch.zeros(1, 4, 3), torch.ones(1, 3, dtype=torch.bool)))
    device.check_module(assigned.module, "torchair")
    with pytest.raises(ValueError, match=r"'npugraph-ex' cannot capture bevfn.linear_assignment.*; use torchair"):
        device.check_module(assigned.module, "npugraph-ex")


def test_the_modes_and_switches_of_torchair():
    ge_graphs.need_torchair()
    made = device.config("torchair")
    assert made.mode.value == "max-autotune" and device.config("npugraph-ex").mode.value == "npugraph_ex"
    assert not made.experimental_config.remove_noop_ops and not made.experimental_config.pattern_fusion_pass


# ------------------------------------------------------------------------------------------------- one process, one use


def test_a_process_that_lowers_offline_cannot_run_on_a_device(monkeypatch):
    monkeypatch.setattr(torchair, "loaded", lambda: True)
    with pytest.raises(ValueError, match=r"'torchair' cannot run in a process that lowers.*`bevfn graph EXPERIMENT`"):
        device.check("torchair")


def test_a_process_with_a_device_cannot_lower_offline(monkeypatch):
    monkeypatch.setattr(torchair, "loaded", lambda: False)
    monkeypatch.setattr(torchair, "find", lambda: None)
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    with pytest.raises(ValueError, match="torch_npu is already imported in this process"):
        torchair.load()


def test_without_cann_torch_npu_is_not_even_imported(monkeypatch):
    monkeypatch.setattr(torchair, "loaded", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    assert not device.available()
    with pytest.raises(
        ValueError, match=r"'npugraph-ex' needs an Ascend NPU with CANN and torch_npu.*`bevfn graph EXP"
    ):
        device.check("npugraph-ex")
