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
        x = torch.sin(x @ weight) * (i + 1) + x.softmax(-1)
    return x


@pytest.fixture
def arguments():
    torch.manual_seed(0)
    return torch.randn(6, 16), [torch.randn(16, 16) for _ in range(fused_kernels.SIZE + 2)]


def libraries(folder) -> int:
    return len(list(folder.rglob("*.so")))


def test_kernels_share_files_and_equal_eager(tmp_path, arguments):
    compiled = compilation.function(chain)
    torch.testing.assert_close(compiled(*arguments), chain(*arguments))
    assert len(fused_kernels.Library.cache) == libraries(tmp_path) == 2  # a full group and one of what is left
    torch.testing.assert_close(compiled(*arguments), chain(*arguments))


def test_generated_code_from_the_cache_finds_its_kernels(tmp_path, arguments):
    expected = compilation.function(chain)(*arguments)
    torch._dynamo.reset()
    fused_kernels.Library.cache.clear()  # as in a new process
    assert torch.equal(compilation.function(chain)(*arguments), expected)
    assert libraries(tmp_path) == 2


def test_a_kernels_error_is_an_exception():
    def pick(x, rows):
        return x[rows] * 2

    x, rows = torch.randn(4, 3), torch.tensor([0, 3])
    compiled = compilation.function(pick)
    torch.testing.assert_close(compiled(x, rows), pick(x, rows))
    with pytest.raises(RuntimeError, match="out of bounds"):
        compiled(x, torch.tensor([0, 4]))


def test_one_compile_thread_is_inductors_own_way(arguments):
    with config.patch(compile_threads=1):
        torch.testing.assert_close(compilation.function(chain)(*arguments), chain(*arguments))
    assert fused_kernels.Library.cache == {}


@pytest.mark.parametrize("fails", [False, True])
def test_nobody_elses_compilation_changes(arguments, fails):
    def refused(x):
        return x.item()

    if fails:
        with pytest.raises(Exception, match="item"):
            compilation.function(refused)(torch.ones(()))
    else:
        compilation.function(torch.sin)(arguments[0])
    assert common.device_codegens["cpu"].wrapper_codegen is PythonWrapperCodegen
    assert common.custom_backend_passes["cpu"] is None
    before = len(fused_kernels.Library.cache)
    torch.compile(torch.cos, backend="inductor")(arguments[0])
    assert len(fused_kernels.Library.cache) == before
