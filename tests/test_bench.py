"""Benchmarks: what they compare computes the same, what they count is right, and files name the machine. No timings."""

import contextlib
import importlib.util
import json
import math
import os
import re
import signal
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import small_cameras
import torch

from bevfn import cli, distributed
from bevfn.bench import (
    attention,
    checkpoint,
    data,
    deform,
    encoder,
    indexing,
    machine,
    ops,
    pool,
    sparse,
    startup,
    step,
    views,
)
from bevfn.commands import bench as commands
from bevfn.export import bench as deploy
from bevfn.kernels.deform_conv import deform_conv
from bevfn.kernels.voxel_pool import voxel_pool
from bevfn.models import bevdepth
from bevfn.precision import Policy
from bevfn.synth import key_frame
from bevfn.training import flops, optim, train


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    return key_frame.write_frame(tmp_path_factory.mktemp("frame"))


def test_the_best_is_the_least(monkeypatch):
    ticks = iter([0, 10, 15, 20, 22, 30, 33])  # the start of a warm-up, then 5, 2 and 3 s
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(ticks))
    assert machine.best_seconds(lambda: None, repeats=3) == 2


def test_the_figures_of_a_frame_are_of_its_points_and_cameras(frame):
    points, source = sparse.scan(frame)
    assert source == str(frame) and torch.equal(
        points, torch.from_numpy(np.fromfile(next(frame.glob("*.bin")), "<f4")).view(-1, 5)
    )
    (one, _), (ten, sites) = sparse.voxels(points), sparse.voxels(points, 10)
    assert 2 * len(one) < len(ten) == len(sites.unique(dim=0)) < 10 * len(one)
    cell = pool.cells_of(frame)
    assert cell.shape == pool.frustum_cells().shape and int(cell.max()) < pool.GRID**2
    assert (cell >= 0).sum() == pytest.approx(int((pool.frustum_cells() >= 0).sum()), rel=0.2)


def test_the_cumsum_trick_is_voxel_pool_in_values_and_gradients():
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(2, 5, 4, 6, dtype=torch.float64, generator=generator).requires_grad_()
    context = torch.randn(2, 4, 6, 3, dtype=torch.float64, generator=generator).requires_grad_()
    cell = torch.randint(-1, 9, depth.shape, dtype=torch.int32, generator=generator)
    weight = torch.randn(11, 3, dtype=torch.float64, generator=generator)
    results = []
    for pooled in (voxel_pool, pool.cumsum_trick, pool.textbook):
        out = pooled(depth, context, cell, 11)  # cells 9 and 10 stay empty
        results.append([out.detach(), *torch.autograd.grad(out, (depth, context), weight)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_extra_memory_is_that_of_the_call_with_its_result_and_without_what_was_there():
    if sys.platform != "linux":
        pytest.skip("no high-water mark that can be reset")
    before = torch.ones(2**23)  # 32 MiB that do not count

    def run():
        passing = before * 2  # 32 MiB, freed when `kept` is made
        return passing[: 2**22] * 2  # 16 MiB

    assert machine.extra_mib(run) == pytest.approx(48, abs=3)


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "target, arguments, said",
    [(sys.exit, (1,), "failed, as it says above"), (kill_itself, (), "ended by SIGKILL.*out of memory")],
)
def test_a_dead_benchmark_process_is_one_sentence(target, arguments, said):
    with pytest.raises(RuntimeError, match=said):
        machine.in_process(target, *arguments)


def test_view_transforms_of_a_benchmark_agree_where_they_are_the_same():
    config = bevdepth.mini(bevdepth.matrix_vt())
    made = views.problem(config, small_cameras.make(B=1, T=1, size=config.grid.image_size))
    maps = {}
    for name in views.VARIANTS:
        figures = views.figures_of(made, name, 1, 1)
        assert figures.pop("relative_error", 0.0) < 1e-4 and len(figures) == 4
        with torch.no_grad():
            maps[name] = views.variant(made, name)[0](made.depth, made.context)
        assert maps[name].shape == made.grad.shape and maps[name].abs().sum() > 0
    for name in ("voxel_pool and cells", "outer product, index_add", "outer product, sort, cumsum"):
        torch.testing.assert_close(maps[name], maps["voxel_pool"], rtol=1e-4, atol=1e-4)
    assert torch.equal(maps["MatrixVT and matrices"], maps["MatrixVT"])


def test_deformable_convolution_and_its_peers_agree():
    figures = deform.measure(images=1, channels=16, repeats=1)
    assert figures["reference"]["relative_difference"] < 1e-5
    if "torchvision" in figures:
        assert figures["torchvision"]["relative_difference"] < 1e-5
    else:
        assert ".[bench]" in figures["peer"]


def test_deformable_attention_and_its_peers_agree_with_the_mask_of_a_rig_and_without():
    figures = attention.measure(grid=12, channels=24, repeats=1)
    assert 1 / 8 < figures["seen_share"] < 1 / 4
    for name in ("masked", "all"):
        assert figures[name].keys() == attention.PEERS.keys() == {"ours", "reference", "grid_sample"}
        assert max(figures[name][peer]["relative_difference"] for peer in ("reference", "grid_sample")) < 1e-5
        assert {"forward_speedup_over_grid_sample", "train_speedup_over_reference"} <= figures[name]["ours"].keys()


def test_pillars_lie_where_a_camera_sees_them():
    places, seen = attention.places(32)
    assert places.shape == (6, 1024, 8, 2)
    assert 0.98 < float(seen.any(0).float().mean()) < 1  # all but what lies around the car
    ahead = 32 * 15 + 28  # row y, column x: 40 m ahead, 1.6 m to the right
    assert seen[1, ahead] and not seen[4, ahead]  # bevdepth.CHANNELS: the second looks forward, the fifth back
    assert (places[1, ahead, 1:, 1] < places[1, ahead, :-1, 1]).all()  # higher points are higher in the image


def test_flops_of_a_deformable_convolution_are_those_of_its_products():
    x, weight = torch.randn(2, 8, 5, 6, requires_grad=True), torch.randn(4, 2, 3, 3, requires_grad=True)
    offset = torch.randn(2, 18, 5, 6, requires_grad=True)
    product = 2 * 2 * 5 * 6 * weight.numel()
    assert flops.count(lambda: deform_conv(x, offset, None, weight, padding=1)) == pytest.approx(product)
    both = flops.count(lambda: deform_conv(x, offset, None, weight, padding=1).sum().backward())
    assert both == pytest.approx(3 * product)


@pytest.mark.parametrize("model", ["bevfusion-lidar", "bevdepth-2key", "awml-lidar"])
def test_a_step_is_measured(model, frame):
    setting = step.Setting(model, frame, "fp32", 1, "cpu", 1, 1, "mini")
    made = step.measure(replace(setting, only=("train/eager",)))
    assert [name for name in made if "/" in name] == ["train/eager"]
    figures = made["train/eager"]
    assert figures["gflop"] > 1 and figures["seconds"] > 0 and figures["share_of_gemm_peak"] > 0
    assert figures["first_call_cpu_seconds"] > 0.5
    assert 0.2 < figures["first_call_peak_memory_gb"] <= figures["peak_memory_gb"]


def test_a_step_takes_the_device_that_there_is(monkeypatch, capfd):
    """As training does: auto by default, and a sentence for one that is not here before anything is made."""
    asked = []
    monkeypatch.setattr(step, "measure", lambda setting: asked.append(setting.device) or {})
    commands.step()
    commands.step(device="auto")
    assert asked == [distributed.chosen("auto")] * 2
    with pytest.raises(ValueError, match="there is no device cuda:99"):
        commands.step(device="cuda:99")
    assert len(asked) == 2


def finite(figures: dict) -> bool:
    """Whether all numbers in figures are, and there are some."""
    values = [v for v in figures.values() if not isinstance(v, str)]
    return bool(values) and all(finite(v) if isinstance(v, dict) else math.isfinite(v) for v in values)


class Clock:
    """Stands for the events of a GPU, whose time passes when something of `steps` is done there."""

    steps: list[str] = []  # noqa: RUF012
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Clock.now
        Clock.steps.append("record")

    def synchronize(self) -> None:
        Clock.steps.append("wait")

    def elapsed_time(self, end: "Clock") -> float:
        return end.at - self.at


def test_a_gpu_is_timed_by_its_own_clock_with_a_cold_cache_and_what_is_queued(monkeypatch):
    took = iter([90, 80, 70, 60, 5, 7, 4, 8])  # ms; two rounds that warm up, of two functions

    def run():
        Clock.steps.append("run")
        Clock.now += next(took)

    scratch = torch.ones(4)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: Clock.steps.append(f"held {float(scratch.sum())}"))
    monkeypatch.setattr(torch, "empty", lambda *_, device, **__: scratch if device == "cuda" else None)
    assert machine.seconds_on("cuda", run, run, repeats=2) == [pytest.approx(4e-3), pytest.approx(7e-3)]
    assert Clock.steps == 8 * ["held 0.0", "record", "run", "record", "wait"]


def test_the_encoder_on_a_device_is_measured_without_spconv_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "spconv", None)
    features, sites = sparse.voxels(sparse.scan()[0])
    near = torch.argsort(sites[:, 1] * 1440 + sites[:, 2])[8000:8200]
    figures = encoder.figures_of(
        "cpu", features[near], sites[near], {"float32": 100.0, "float16": 100.0, "int32": 1.0}, repeats=1
    )
    assert figures.pop("voxels") == 200 and figures.pop("gflop") > 0.1
    assert figures.pop("int32").keys() == {"failed"}
    for found in figures.values():
        ours = {"forward", "backward", "train", "tables", "forward, tables given"}
        assert found["ours"]["ms"].keys() == found["ours"]["wall_ms"].keys() == ours and finite(found["ours"])
        assert found["spconv"].keys() == {"omitted"}
        assert re.fullmatch(
            r"spconv is not installed \(.*\): pip install -e '.\[bench-cuda\]'", found["spconv"]["omitted"]
        )


@pytest.mark.parametrize("for_cpus", [True, False])
def test_spconvs_build_for_cpus_is_no_peer_on_a_gpu(monkeypatch, for_cpus):
    package = types.ModuleType("spconv")
    package.__version__ = "9.0"
    package.pytorch = types.ModuleType("spconv.pytorch")
    constants = types.ModuleType("spconv.cppconstants")
    constants.CPU_ONLY_BUILD = for_cpus
    for module in (package, package.pytorch, constants):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    said = "spconv 9.0 is its build for CPUs: pip uninstall spconv, then pip install -e '.[bench-cuda]'"
    assert encoder.spconv_for_cuda() == ((None, said) if for_cpus else (package.pytorch, "spconv 9.0"))


def test_spconv_computes_the_same_from_the_same_weights(monkeypatch):
    """In its CPU build, whose backward pass asks for a CUDA stream."""
    if os.environ.get("OMP_NUM_THREADS") != "1":
        pytest.skip("spconv's CPU build is wrong with several threads")
    peer = pytest.importorskip("spconv.pytorch")
    if not pytest.importorskip("spconv.cppconstants").CPU_ONLY_BUILD:
        pytest.skip("spconv's CUDA build computes such convolutions on a GPU only")
    monkeypatch.setattr("spconv.pytorch.ops.get_current_stream", lambda: 0)
    monkeypatch.setattr(encoder, "spconv_for_cuda", lambda: (peer, "spconv"))
    features, sites = sparse.voxels(sparse.scan()[0])
    near = torch.argsort(sites[:, 1] * 1440 + sites[:, 2])[8000:8200]
    found = encoder.figures_of("cpu", features[near], sites[near], {"float32": 1.0}, repeats=1)["float32"]["spconv"]
    assert found.pop("peer") == "spconv" and finite(found)
    assert found["relative_difference"] < 1e-5 and found["worst_relative_gradient_difference"] < 1e-5
    assert found["speedup of ms"].keys() == found["wall_ms"].keys() == {"forward", "backward", "train"}


def test_a_peer_that_fails_on_this_gpu_is_told_and_ours_stay(monkeypatch, capsys):
    features, sites = sparse.voxels(sparse.scan()[0])
    monkeypatch.setattr(encoder, "spconv_for_cuda", lambda: (object(), "spconv 9"))
    monkeypatch.setattr(encoder, "_theirs", lambda *_: encoder.Chain(lambda: 1 / 0, [], list))
    found = encoder.figures_of("cpu", features[:50], sites[:50], {"float32": 1.0}, repeats=1)["float32"]
    assert found["spconv"] == {"omitted": "spconv 9 failed: ZeroDivisionError: division by zero"}
    assert finite(found["ours"]) and "Traceback" in capsys.readouterr().err


def test_chains_that_are_the_same_do_not_differ():
    features, sites = sparse.voxels(sparse.scan()[0])
    features, sites = features[:80], sites[:80]
    capacities = sparse.exact_capacities(sites)
    layers = sparse.encoder_layers(sparse.tables(sites, capacities)[0])
    ours, again = (encoder._ours(features, sites, capacities, layers) for _ in range(2))
    assert set(encoder._differences(ours, again).values()) == {0.0}
    elsewhere = encoder._ours(features, sites + torch.tensor([0, 8, 0, 0]).int(), capacities, layers)
    assert set(encoder._differences(ours, elsewhere).values()) == {math.inf}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pooling_on_a_device_is_measured_against_a_copy_there(dtype):
    cell = torch.randint(-1, 9, (2, 5, 4, 6), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    figures = pool.measure_on("cpu", 10.0, cell, channels=8, num_cells=9, dtype=dtype, repeats=1)
    assert finite(figures) and figures["points_inside"] == (cell >= 0).sum() and figures["cells_hit"] == 9
    assert figures["worst_relative_difference"] < (1e-5 if dtype == torch.float32 else 1e-2)
    elements = 2 * 5 * 4 * 6 + 2 * 4 * 6 * 8 + 9 * 8  # depth, context, map; cells are int32
    moved = elements * torch.empty(0, dtype=dtype).element_size() + 4 * cell.numel()
    assert figures["forward_gb_per_s"] * figures["forward_s"] == pytest.approx(1e-9 * moved)
    assert figures["forward_over_copy"] == pytest.approx(figures["forward_gb_per_s"] / 10)


def test_ops_that_make_indices_equal_their_references():
    figures = indexing.measure("cpu", sparse.scan()[0][::100], matches=((20, 12),), repeats=1)
    assert figures.keys() == {"voxelize", "neighbours", "linear_assignment"} and finite(figures)
    for op in ("voxelize", "neighbours"):
        assert figures[op].keys() == sparse.SWEEPS.keys() and all(found["equal"] for found in figures[op].values())
    (found,) = figures["linear_assignment"].values()
    assert found["relative_difference"] < 1e-12 and found["reference_ms"] > 0


def test_on_a_gpu_an_op_that_fails_leaves_the_others_figures(monkeypatch, capsys):
    """What is measured there, in the order and of the sizes that it would be; nothing is."""
    asked = []

    def told(name, result):
        return lambda *_, **setting: asked.append((name, setting.get("dtype"))) or result

    monkeypatch.setattr(machine, "gemm_gflops", lambda *, size, dtype, device: float(dtype.itemsize))
    monkeypatch.setattr(machine, "copy_gbps", lambda *, device: 3.0)
    monkeypatch.setattr(encoder, "measure", lambda device, points, gemm: gemm)
    monkeypatch.setattr(pool, "measure_on", lambda *_, dtype: {"s": 1} if dtype == torch.float32 else [][0])
    monkeypatch.setattr(deform, "measure", lambda *, device, dtype, gemm_gflops: {"gemm": gemm_gflops})
    monkeypatch.setattr(attention, "measure", told("attention", {"s": 2}))
    monkeypatch.setattr(indexing, "measure", told("indexing", {"s": 3}))
    figures = ops._on_gpu(None, "cpu")
    assert figures["gemm_gflops"] == {"float16": 2.0, "float32": 4.0} and figures["copy_gbps"] == 3
    assert figures["sparse"]["float16"] == 2 and figures["indexing"]["s"] == 3
    assert figures["voxel_pool"] == {"float16": {"failed": "IndexError: list index out of range"}, "float32": {"s": 1}}
    assert figures["deform_conv"] == {"float16": {"gemm": 2.0}, "float32": {"gemm": 4.0}}
    assert asked == [("attention", torch.float16), ("attention", torch.float32), ("indexing", None)]
    assert capsys.readouterr().err.count("IndexError") == 1
    for name in ("deform_conv", "deform_attn"):
        assert figures[name].keys() == {"float16", "float32"}


def test_figures_of_a_gpu_say_which_kernels_they_are_of(monkeypatch):
    inside = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: inside.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(ops, "_on_gpu", lambda frame, device: {"of": device})
    for why in ("bevfn's CUDA kernels need Triton", None):
        monkeypatch.setattr(ops, "unusable", lambda device, why=why: why)
        monkeypatch.setattr(ops, "_triton", lambda: "triton 3")
        assert ops.measure(None, "cuda:1") == {"kernels": why or "triton 3", "of": "cuda:1"}
    assert inside == ["cuda:1"] * 2


def test_ops_measure_the_cpu_unless_a_gpu_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "measure", lambda frame, device: asked.append(device) or {})
    commands.ops()
    monkeypatch.setattr(distributed, "_count", lambda kind: 0)
    commands.ops(device="auto")
    assert asked == ["cpu", "cpu"]
    with pytest.raises(ValueError, match=r"there is no device cuda:99; .*--device cpu"):
        commands.ops(device="cuda:99")
    monkeypatch.setattr(distributed, "_count", lambda kind: int(kind == "npu"))
    commands.ops(device="auto")
    with pytest.raises(ValueError, match="measures a CPU or a CUDA device, not npu; use --device cpu"):
        commands.ops(device="npu")
    assert asked == ["cpu", "cpu", "cpu"]


def test_exported_files_are_measured_beside_the_detector(monkeypatch):
    """In this process, without compilers; that a process is a fresh one is `in_process`'s."""
    monkeypatch.setattr(machine, "in_process", lambda target, *arguments: target(*arguments))
    threads = torch.get_num_threads()
    setting = deploy.Setting("bevfusion-lidar", None, None, "mini", threads, 1, ("eager", "onnxruntime"))
    made = deploy.measure(setting)
    assert list(made["runtimes"]) == ["eager", "onnxruntime"] and made["absent"] == {}
    assert list(made["export"]) == ["onnx"] and made["export"]["onnx"]["bytes"] > 100_000
    assert made["export"]["onnx"]["seconds"].keys() == {"trace", "write", "run"}
    for figures in made["runtimes"].values():
        assert figures["seconds"] > 0 and figures["peak_memory_gb"] >= figures["imports_gb"] > 0
        assert (
            figures["found_of_eager"] > 0.9
        )  # 96 of 100: of drawn weights rounding decides which scores are the highest


def test_what_capacities_of_ones_own_leave_out_is_told(monkeypatch, frame):
    monkeypatch.setattr(machine, "in_process", lambda target, *arguments: target(*arguments))
    setting = deploy.Setting("bevfusion-lidar", None, frame, "mini", torch.get_num_threads(), 1, ("eager",))
    made = deploy.measure(replace(setting, capacities={"voxel_capacity": 500, "site_capacity": (400, 300, 200)}))
    assert (made["voxel_capacity"], made["site_capacity"]) == (500, (400, 300, 200))
    lost = made["runtimes"]["eager"]["lost"]
    assert 0 < lost["overflow/voxels_l1"] < lost["overflow/voxels_l0"]
    assert "lost" not in deploy.measure(setting)["runtimes"]["eager"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--voxel-capacity", "0"], "--voxel-capacity 0 must be at least 1"),
        (["--site-capacity", "9", "8"], "--site-capacity 9 8 must be 3 numbers, one for each of the 2 stride-2"),
        (
            ["--model", "bevdepth-2key", "--voxel-capacity", "9"],
            "reads no LiDAR points or sweeps; leave out --voxel-capacity",
        ),
        (["--checkpoint", "none.pth"], "none.pth"),
    ],
)
def test_a_detector_that_cannot_be_measured_is_one_sentence(flags, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bevfn", "bench", "deploy", "--scale", "mini", *flags])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and says in said and said.count("\n") == 1, said


def test_a_runtime_that_is_not_installed_is_told(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else find(name))
    assert deploy.missing("openvino-voxels") == "openvino is not installed: pip install -e '.[openvino]'"
    assert deploy.missing("onnxruntime") == deploy.missing("eager") == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "pip install -e '.[export]'" in deploy.missing("onnxruntime") == deploy.missing("openvino-voxels")
    assert "C++17 compiler" in deploy.missing("aoti")


def test_checkpoints_are_measured_and_leave_nothing(tmp_path):
    optimizer = optim.Config(lr=optim.Schedule(1e-3))
    params = {"a": torch.randn(1000), "b": torch.randn(3, 5)}
    state = train.init(params, {}, optimizer, precision=Policy())
    figures = checkpoint.of_state(state, tmp_path, repeats=2)
    assert figures["parameters"] == 1015 and figures["bytes"] > 3 * 4 * 1015
    assert figures["seconds"].keys() == {"save", "verify", "load", "plain write", "plain copy", "plain read"}
    assert not list(tmp_path.iterdir())


def test_startup_watches_a_real_run_until_its_third_step(tmp_path, frame):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "bevfn.experiments.bevfusion_lidar", "--scale", "mini", "--backend", "eager"]
    flags = ["--data-root", str(frame), "--run-dir", str(run_dir), "--no-eval-first"]
    figures = startup.start([*command, *flags], run_dir, {"OMP_NUM_THREADS": "1"})
    assert figures["seconds"] == pytest.approx(figures["before_first_step"] + figures["first_step"])
    assert figures["before_first_step"] > 0 and figures["later_step_seconds"] > 0
    with pytest.raises(RuntimeError, match=r"(?s)ended before step 3.*--precison"):
        startup.start([*command, "--precison", "fp16"], tmp_path / "other", {})


def test_a_world_is_measured_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures = data.world(scenes=2, frames_per_scene=2, image_size=(90, 160), azimuths=60, workers=1, progress=False)
    assert figures["files"] > 2 * 2 * 7
    parts = sum(figures[f"megabytes of {kind}"] for kind in ("images", "scans", "tables"))
    assert 0 < parts <= figures["megabytes"]
    assert not list(tmp_path.iterdir())


def test_reading_samples_is_measured(frame):
    figures = data.data(frame=frame, samples=1)
    for name in ("lidar-camera", "lidar"):
        parts = figures[name]["parts_milliseconds"]
        assert min(parts.values()) >= 0 and parts["move sweeps"] > 0 and figures[name]["points"] > 100_000


def test_reading_t4s_clouds_is_measured_against_their_bytes(monkeypatch):
    monkeypatch.setattr(data, "T4_POINTS", 20_000)
    monkeypatch.setattr(data, "T4_CLOUDS", 2)
    figures = data.t4(samples=2)
    for form in (".pcd.bin", ".pcd"):
        told = figures[form]
        assert told["points"] == 20_000 and 0 < told["of_reading_bytes"] < 1 and told["bytes"] > 300_000
    assert figures["files"] == 2 and 20_000 < figures["awml-lidar"]["points"] <= 40_000


def test_files_name_the_machine_and_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deform, "measure", lambda: {"ours": 1})
    for op in ("attention", "pool", "sparse"):
        monkeypatch.setattr(f"bevfn.bench.{op}.measure", lambda frame: {"frame": str(frame)})
    out = tmp_path / "ops.json"
    monkeypatch.setattr(sys, "argv", ["bevfn", "bench", "ops", "--frame", "a/frame", "--json", str(out)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    made = json.loads(out.read_text())
    assert end.value.code == 0 and json.loads(capsys.readouterr().out) == made
    assert made["command"] == f"bevfn bench ops --frame a/frame --json {out}"
    assert made["figures"]["frame"] == "a/frame" and made["figures"]["deform_conv"] == {"ours": 1}
    for op in ("deform_attn", "voxel_pool", "sparse"):
        assert made["figures"][op] == {"frame": "a/frame"}
    assert made.keys() == {"command", "commit", "date", "machine", "versions", "benchmark", "figures"}
