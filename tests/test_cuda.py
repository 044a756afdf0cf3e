"""Lowerings for CUDA, where there is no GPU: interpreted, compiled ahead of time, traced; and where they cannot run."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from bevfn import provenance
from bevfn.backbones import sparse_encoder
from bevfn.bench import cuda as bench
from bevfn.kernels import cuda, sparse_conv, voxel_pool

HERE = Path(__file__).parent
REFERENCE_RAN = torch.tensor(7.0)


def never():
    raise AssertionError("Triton's lowering was asked for")


@pytest.fixture
def gpu(monkeypatch):
    """What torch says of a GPU that is not there: `gpu(capability)`; Triton is installed."""

    def describe(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")

    cuda._warn.cache_clear()
    monkeypatch.setattr(cuda, "_has_triton", lambda: True)
    return describe


def test_lowerings_equal_their_references_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    words = [sys.executable, "-m", "pytest", str(HERE / "cuda_cases.py"), "-p", "no:cacheprovider"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_compile_for_gpus_that_are_not_there(monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(bench, "GPUS", {"sm_80": 80})
    ((case, kernels),) = bench.measure("sparse_conv fp16 16 to 16")["sm_80"].items()
    assert case in bench.CASES and list(kernels) == ["masks", "offsets", "multiply", "multiply_weight"]
    for name, made in kernels.items():
        assert 0 < made["registers"] <= 255 and made["shared_bytes"] <= 99 << 10
        assert made["stack_bytes"] == made["local_bytes"] == made["atomic_instructions"] == 0
        assert (made["tensor_core_instructions"] > 0) == name.startswith("multiply")


def test_binaries_of_every_lowering_keep_within_registers_and_without_atomics():
    """Of the figures in experiments/results/, which `bevfn bench cuda` made."""
    made = provenance.read()["kernels_cuda_aot.json"]["figures"]
    assert made.keys() == bench.GPUS.keys()
    for cases in made.values():
        assert cases.keys() == bench.CASES.keys()
        for case, kernels in cases.items():
            for kernel, figures in kernels.items():
                assert figures["stack_bytes"] == figures["local_bytes"] == figures["atomic_instructions"] == 0, case
                if kernel.startswith("multiply"):
                    full_float32 = "fp32" in case and "tf32" not in case
                    assert (figures["tensor_core_instructions"] > 0) != full_float32, (case, kernel)


def test_a_case_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="--only 'cuboid' is in no case's name; choose of sparse_conv fp16"):
        bench.measure("cuboid")


def test_compiling_without_triton_is_one_sentence(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"not installed: pip install -e '\.\[cuda\]'"):
        bench.measure()


def test_operators_trace_with_fake_cuda_tensors():
    """Not behind autograd: a torch without CUDA aborts where a leaf on CUDA asks for its stream."""

    def run(x, weight, grad, table, depth, context, cell):
        y = sparse_conv.sparse_conv(x, weight, table, table)
        return (
            y,
            *sparse_conv._gradients(frozenset((0, 1)), grad, x, weight, table, table)[:2],
            voxel_pool.voxel_pool(depth, context, cell, 6),
            *torch.ops.bevfn.voxel_pool_backward(torch.zeros(6, 4, device="cuda"), depth, context, cell),
        )

    with FakeTensorMode():
        shapes = [(9, 4), (3, 4, 4), (9, 4), (3, 9), (1, 2, 3, 4), (1, 3, 4, 4), (1, 2, 3, 4)]
        whole = (3, 6)
        operands = [
            torch.empty(shape, device="cuda", dtype=torch.int32 if i in whole else torch.float16)
            for i, shape in enumerate(shapes)
        ]
        graph = make_fx(run)(*operands)
    ours = [str(node.target) for node in graph.graph.nodes if "bevfn" in str(node.target)]
    assert [name.split(".")[1] for name in ours] == [
        "sparse_conv", "sparse_conv", "sparse_conv_weight_grad", "voxel_pool", "voxel_pool_backward",
    ]  # fmt: skip
    results = graph.graph.output_node().args[0]
    assert {node.meta["val"].device.type for node in results} == {"cuda"}


def test_the_rows_of_a_table_are_grouped_once_for_all_its_convolutions(monkeypatch):
    """16 groupings, of eight tables and their inverses, where each of 62 products made its own; grouped here as on a GPU."""
    config = sparse_encoder.Config(channels=(4, 4, 4, 4), channels_out=4, capacities=(64, 64, 64, 64))
    params, state = sparse_encoder.init(config, torch.Generator().manual_seed(0))
    coords = torch.arange(60)[:, None] * torch.tensor([5, 3, 7]) % torch.tensor([32, 32, 41])
    voxels = (
        torch.rand(1, 60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        coords[None].int(),
        torch.arange(60)[None] < 50,
    )  # the last ten are padding

    def loss(params):
        made, _ = sparse_encoder.apply(params, state, *voxels, config=config, grid=(32, 32, 41), train=True)
        return made["bev"].square().sum()

    group = torch.ops.bevfn.sparse_conv_tiles
    alone = make_fx(torch.func.grad(loss))(params)
    monkeypatch.setattr(sparse_encoder, "tiles", lambda *tables: tuple(x for table in tables for x in group(table)))
    graph = make_fx(torch.func.grad(loss))(params)
    counts = Counter(str(node.target).removeprefix("bevfn.").removesuffix(".default") for node in graph.graph.nodes)
    assert (counts["sparse_conv_tiles"], counts["sparse_conv"], counts["sparse_conv_weight_grad"]) == (16, 0, 0)
    assert (counts["sparse_conv_tiled"], counts["sparse_conv_tiled_weight_grad"]) == (21 + 20, 21)
    torch.testing.assert_close(
        graph(params), alone(params), rtol=1e-4, atol=1e-4
    )  # the reference and the host's kernel


def test_without_triton_the_reference_runs_and_one_warning_says_so(monkeypatch):
    monkeypatch.setattr(cuda, "_has_triton", lambda: False)
    cuda._warn.cache_clear()
    run = cuda.lowering(never, "sparse_conv", lambda x: REFERENCE_RAN)
    with pytest.warns(UserWarning, match=r"need Triton, which is not installed.*pip install -e '\.\[cuda\]'") as told:
        assert run(torch.zeros(2)) is REFERENCE_RAN and run(torch.zeros(2)) is REFERENCE_RAN
    assert len(told) == 1


def test_on_an_old_gpu_the_reference_runs_and_one_warning_says_so(gpu):
    gpu(7, 0)
    run = cuda.lowering(never, "sparse_conv", lambda x: REFERENCE_RAN)
    with pytest.warns(UserWarning, match=r"need compute capability 8\.0 \(Ampere\) and Tesla V100 has 7\.0") as told:
        assert run(torch.zeros(2)) is REFERENCE_RAN and run(torch.zeros(2)) is REFERENCE_RAN
    assert len(told) == 1
    gpu(8, 0)
    assert cuda.unusable(torch.device("cuda")) is None


def test_float64_takes_the_reference():
    run = cuda.lowering(never, "sparse_conv", lambda x: REFERENCE_RAN)
    assert run(torch.zeros(2, dtype=torch.float64)) is REFERENCE_RAN


def test_more_points_than_an_index_holds_are_named():
    points = torch.empty(1, dtype=torch.int32).expand(2, 1 << 10, 1 << 10, 1 << 10)
    depth = torch.empty(1, dtype=torch.float16).expand(points.shape)
    context = torch.empty(1, dtype=torch.float16).expand(2, 1 << 10, 1 << 10, 8)
    lowering = pytest.importorskip("bevfn.kernels.voxel_pool.cuda", reason="needs Triton")
    with pytest.raises(
        ValueError, match=r"voxel_pool: 2147483648 points are more than the 2147483647 .* smaller batch"
    ):
        lowering.forward(depth, context, points, 9)


@pytest.mark.parametrize("precision, products", [("highest", "ieee"), ("high", "tf32")])
def test_float32_products_are_as_exact_as_torch_s(precision, products):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert cuda.float32_products() == products
    finally:
        torch.set_float32_matmul_precision(before)
