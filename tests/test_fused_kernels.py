"""Inductor's kernels in groups: the same results as eager, their errors, and nothing left behind in inductor."""

import pytest
import torch
from torch._inductor import config
from torch._inductor.codegen import common
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

from bevfn import compile as compilation
from bevfn import fused_kernels


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    """Inductor's folder is of this test, so that kernels are compiled; what it keeps in memory of others too."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fused_kernels.Library, "cache", {})
    torch._dynamo.reset()


def chain(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """A kernel of its own between any two products."""
    for i, weight in enumerate(weights):
        x = torch.sin(x @ weight) * (1 + i / 10) + x.softmax(-1)
    return x


@pytest.fixture
def arguments():
    torch.manual_seed(0)
    return torch.randn(6, 16), [torch.randn(16, 16) / 8 for _ in range(fused_kernels.SIZE + 2)]


def files(folder) -> int:
    """Of kernels that `fused_kernels` wrote and g++ compiled."""
    return sum("run_0" in source.read_text() for source in folder.rglob("*.cpp") if source.with_suffix(".so").exists())


def test_kernels_share_files_and_equal_eager(tmp_path, arguments):
    compiled = compilation.function(chain)
    torch.testing.assert_close(compiled(*arguments), chain(*arguments))
    assert files(tmp_path) == 2  # a full group and one of what is left
    torch.testing.assert_close(compiled(*arguments), chain(*arguments))


def test_generated_code_from_the_cache_finds_its_kernels(tmp_path, arguments):
    expected = compilation.function(chain)(*arguments)
    torch._dynamo.reset()
    fused_kernels.Library.cache.clear()  # as in a new process
    assert torch.equal(compilation.function(chain)(*arguments), expected)
    assert files(tmp_path) == 2


def test_a_kernels_error_is_an_exception():
    def pick(x, rows):
        return x[rows] * 2

    x, rows = torch.randn(4, 3), torch.tensor([0, 3])
    compiled = compilation.function(pick)
    torch.testing.assert_close(compiled(x, rows), pick(x, rows))
    with pytest.raises(RuntimeError, match="out of bounds"):
        compiled(x, torch.tensor([0, 4]))


def test_kernels_with_helpers_of_one_name_stay_apart():
    """As inductor's templates have them."""
    kernels, made = fused_kernels.Kernels(), []
    for factor in (2, 3):
        source = f"""#include <torch/csrc/inductor/cpp_prefix.h>
        static float scaled(float x) {{ return {factor} * x; }}
        extern "C" void kernel(float* x) {{ *x = scaled(*x); }}"""
        made.append(kernels.cpp_pybinding(["float*"], source))
    x = torch.ones(1)
    for kernel in made:
        kernel.result()(x)
    assert float(x) == 6


def test_one_compile_thread_is_inductors_own_way(tmp_path, arguments):
    with config.patch(compile_threads=1):
        x, weights = arguments
        torch.testing.assert_close(compilation.function(chain)(x, weights[:2]), chain(x, weights[:2]))
    assert files(tmp_path) == 0


@pytest.mark.parametrize("fails", [False, True])
def test_nobody_elses_compilation_changes(tmp_path, monkeypatch, fails):
    def refused(*arguments, **named):
        raise RuntimeError("no such loop")

    x = torch.randn(6, 16)
    if fails:
        monkeypatch.setattr(fused_kernels, "compile_fx", refused)
        with pytest.raises(RuntimeError, match="no such loop"):
            compilation.function(torch.sin)(x)
    else:
        compilation.function(torch.sin)(x)
    assert common.device_codegens["cpu"].wrapper_codegen is PythonWrapperCodegen
    assert common.custom_backend_passes["cpu"] is None
    before = files(tmp_path)
    torch.compile(torch.cos, backend="inductor")(x)
    assert files(tmp_path) == before


def test_many_tensors_are_joined_in_one_call(tmp_path):
    """The same numbers, gradients joined too, and no loop for each of them."""

    def join(parts):
        return torch.cat([part.flatten() for part in parts]) * 2

    parts = [torch.randn(3, n) for n in range(1, fused_kernels.MANY + 2)]
    assert torch.equal(compilation.function(join)(parts), join(parts))
    (code,) = [source.read_text() for source in tmp_path.rglob("*.py") if "bevfn.cat" in source.read_text()]
    assert code.count("pragma omp") < 4
