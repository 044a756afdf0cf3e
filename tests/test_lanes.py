"""kernels/lanes.h: the kernels' results do not depend on how wide a machine's vectors are, beyond what is stated."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import arm64
import pytest
import torch
from torch import Tensor

from bevfn.kernels import batch_norm, deform_attn, deform_conv, native, sparse_conv, voxel_pool  # noqa: F401  (defines their operators)

HERE = Path(__file__).parent
OPS = torch.ops.bevfn
ROUNDING = 1e-6  # of the largest value, where sums over lanes are of another order, or products are rounded before they are added


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def run_voxel_pool(channels: int) -> dict[str, Tensor]:
    depth, context, grad = normal(2, 7, 6, 19).abs(), normal(2, 6, 19, channels), normal(40, channels)
    cell = (20 + 12 * normal(2, 7, 6, 19)).int() % 41 - 1
    slopes = OPS.voxel_pool_backward(grad, depth, context, cell)
    return {"pool": OPS.voxel_pool(depth, context, cell, 40), "pool context": slopes[1], "pool depth": slopes[0]}


def run_sparse_conv(channels: int) -> dict[str, Tensor]:
    x, weight, grad = normal(90, 21), normal(9, 21, channels), normal(70, channels)
    table = ((normal(9, 70) * 60).int() % 91 - 1).contiguous()
    return {
        "conv": OPS.sparse_conv(x, weight, table),
        "conv, transposed weights": OPS.sparse_conv(normal(90, channels), weight.transpose(1, 2), table),
        "conv weight": OPS.sparse_conv_weight_grad(x, grad, table),
    }


def run_deform_conv(channels: int) -> dict[str, Tensor]:
    x, weight = normal(2, 2 * channels, 6, 5), normal(6, channels, 3, 3)
    operands = x, 2 * normal(2, 18, 6, 5), normal(2, 9, 6, 5), weight, 1, 1, 1
    slopes = OPS.deform_conv_backward(normal(2, 6, 6, 5), *operands)
    return {"deform": OPS.deform_conv(*operands), **dict(zip(("deform x", "deform offset", "deform mask"), slopes))}


def run_deform_attn(channels: int) -> dict[str, Tensor]:
    value, weights = normal(2, 6 * 5 + 3 * 4, 3, channels), normal(2, 11, 3, 2, 5)
    operands = value, normal(2, 11, 3, 2, 5, 2) / 2 + 0.5, weights, None, [6, 5, 3, 4]
    slopes = OPS.deform_attn_backward(normal(2, 11, 3, channels), *operands)
    return {"attn": OPS.deform_attn(*operands), **dict(zip(("attn value", "attn locations", "attn weights"), slopes))}


def run_batch_norm(channels: int) -> dict[str, Tensor]:
    rows, images, made = normal(90, channels), normal(2, channels, 9, 7), {}
    for name, x, mask in (("norm of rows", rows, (normal(90, 1) > -1).float()), ("norm of images", images, None)):
        weight, bias, count = normal(channels), normal(channels + 1)[1:], None if mask is None else mask.sum()
        y, mean, var = OPS.batch_norm(x, weight, bias, 1e-3, mask, count, True)
        slopes = OPS.batch_norm_backward(normal(*x.shape), x, weight, mean, var, 1e-3, mask, count, bias)
        made |= {name: y, f"{name} mean": mean, f"{name} var": var}
        made |= dict(zip((f"{name} x", f"{name} weight", f"{name} bias"), slopes))
    return made


def results() -> dict[str, Tensor]:
    """By names, of numbers of channels below, at and beyond whole vectors of every width."""
    made = {}
    for channels in (3, 8, 20, 80, 130):
        for op in (run_voxel_pool, run_sparse_conv, run_deform_conv, run_deform_attn, run_batch_norm):
            made |= {f"{name} {channels}": x for name, x in op(channels).items()}
    return made


FILES = (
    "batch_norm",
    "voxel_pool",
    "sparse_conv",
    "deform_conv",
    "deform_attn",
    "voxelize",
    "neighbours",
    "linear_assignment",
)
# What says nothing about arm64: torch's compiler, which builds for this machine, and tests of builds and benchmarks.
NOT_EMULATED = "not compil and not bench and not torchs_own_checks"
LANES_ARE_SUMMED = (
    "pool depth",
    "attn locations",
    "attn weights",
    "norm of images",
)  # the others: one lane, one result
# Products and sums outside vectors, which a compiler fuses as it likes: for Sapphire Rapids otherwise than for Haswell (4e-8).
FUSED_ELSEWHERE = ("deform offset", "deform mask")


@pytest.fixture
def built_for(monkeypatch) -> Callable[[str], None]:
    """A function after which kernels are those compiled for that processor."""

    def switch(cpu: str) -> None:
        flags = [f"-march={cpu}" if flag == native.THIS_CPU else flag for flag in native.FLAGS]
        monkeypatch.setattr(native, "FLAGS", tuple(flags))
        native.load.cache_clear()

    yield switch
    native.load.cache_clear()


def distances(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Of the largest value."""
    return {name: float((found[name] - x).abs().max() / x.abs().max()) for name, x in wanted.items()}


def test_vectors_of_avx2_give_the_same_bits_but_where_sums_are_made_otherwise(built_for):
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the processor has no AVX2")
    wanted = results()
    built_for("haswell")
    for name, distance in distances(results(), wanted).items():
        assert distance <= (ROUNDING if name.startswith(LANES_ARE_SUMMED + FUSED_ELSEWHERE) else 0), name


def in_arm64() -> None:
    if why := arm64.missing():
        pytest.skip(why)


@pytest.mark.slow
def test_vectors_of_arm64_give_the_same_bits_but_where_sums_are_made_otherwise(monkeypatch):
    in_arm64()
    wanted = results()
    monkeypatch.setattr(native, "call", arm64.call)
    for name, distance in distances(results(), wanted).items():
        assert distance <= (ROUNDING if name.startswith(LANES_ARE_SUMMED + FUSED_ELSEWHERE) else 0), name


@pytest.mark.slow
@pytest.mark.parametrize("op", FILES)
def test_every_test_of_the_kernels_passes_in_arm64(op):
    in_arm64()
    words = ["-m", "pytest", "-p", "arm64", "-p", "no:cacheprovider", f"{HERE}/test_{op}.py", "-k", NOT_EMULATED]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
