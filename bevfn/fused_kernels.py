"""Inductor's fused CPU kernels, several to a file, compiled while Python still writes the next ones.

Inductor 2.13 gives each kernel a file of its own and starts g++ when all of them are written. Of a kernel's 0.85 s of g++
only 0.2 s are the kernel, the rest its header and its library (docs/benchmarks.md), and a step has hundreds; here kernels
share both, and g++ works beside the code generation that Python does on one core. The kernels' code and g++'s flags stay
inductor's.

Inductor asks whoever writes a device's Python code (`PythonWrapperCodegen`, which backends register) to define each kernel;
`Wrapper` is that with another definition.
"""

import ast
import contextlib
import ctypes
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppCodeCache, LambdaFuture, _get_cpp_prefix_header
from torch._inductor.codegen import common
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphModulePass

SIZE = 8  # kernels of a file, of whose g++ its header is then a quarter; other sizes were not compared
MANY = 64  # tensors; not those that models join, which their producers write in place
NUMBERS = {"int64_t": ctypes.c_int64, "long": ctypes.c_int64, "float": ctypes.c_float}  # arguments that are not tensors
ENTRY = re.compile(r'extern "C"\s+void\s+kernel\(')


def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    """Inductor, as `torch.compile` takes a backend. Of other devices than the CPU it is what "inductor" is."""
    if any(x.device.type != "cpu" for x in inputs if isinstance(x, Tensor)):
        return compile_fx(graph, inputs)
    if get_compile_threads() > 1:
        AsyncCompile.submit(_prepare)  # while the graph is traced
    with _registered():
        # Its patterns are of other models' spellings: the kernels are the same without them. Its layout optimisation copies every
        # convolution's operands and weights, forward and for the gradient: it pays where there are no gradients.
        off = {"pattern_matcher": False, "layout_optimization": not torch.is_grad_enabled()}
        return compile_fx(graph, inputs, config_patches=off)


def _prepare() -> None:
    """What the first kernel would wait for: trying what vectors this CPU has, and the precompiled header."""
    Library.load(f"#include <{_get_cpp_prefix_header('cpu')}>\n")


class Kernels:
    """The kernels of one graph in the order in which they are defined; in the generated code in AsyncCompile's place."""

    def __init__(self) -> None:
        self.compiler, self.group = AsyncCompile(), Group()

    def cpp_pybinding(self, types: list[str], source: str) -> Any:
        """What becomes the kernel when `AsyncCompile.wait` has waited for it; `types`: of its arguments, in C++."""
        known = all(kind.endswith("*") or kind in NUMBERS for kind in map(_plain, types))
        alone = ENTRY.match(_split(source)[1])  # templates have helpers, which are named alike in all of them
        if get_compile_threads() <= 1 or not known or not alone:
            return self.compiler.cpp_pybinding(types, source)
        group, place = self.group, self.group.add(types, source)
        if len(group.sources) == SIZE:
            group.start()
            self.group = Group()
        return LambdaFuture(lambda: group.kernel(place))


class Group:
    """Kernels of one file."""

    def __init__(self) -> None:
        self.sources: list[tuple[list[str], str]] = []
        self.library: Callable[[], ctypes.CDLL | ModuleType] | None = None

    def add(self, types: list[str], source: str) -> int:
        self.sources.append((types, source))
        return len(self.sources) - 1

    def start(self) -> None:
        """Begins to compile, in a thread of inductor's."""
        if self.library is None:
            self.library = Library.load_async(_file(self.sources), submit_fn=AsyncCompile.submit)

    def kernel(self, place: int) -> Callable[..., None]:
        """The compiled kernel, which takes tensors and numbers; waits for it."""
        self.start()
        assert self.library is not None
        run = getattr(self.library(), f"run_{place}")
        run.argtypes = [NUMBERS.get(_plain(kind), ctypes.c_void_p) for kind in self.sources[place][0]]
        run.restype = ctypes.c_char_p

        def kernel(*arguments: Any) -> None:
            said = run(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])
            if said is not None:
                raise RuntimeError(said.decode())

        return kernel


class Library(CppCodeCache):
    """Compiled files, with the flags and the precompiled header of inductor's kernels."""

    cache: dict[str, Callable[[], ctypes.CDLL | ModuleType]] = {}  # noqa: RUF012, as its base class has it
    cpp_compile_command_flags: dict[str, Any] = {"include_pytorch": False, "shared": True}  # noqa: RUF012

    @classmethod
    def _get_uncompiled_header(cls, device: str) -> str | None:
        return _get_cpp_prefix_header(device)


def _plain(kind: str) -> str:
    return kind.removeprefix("const ").strip()


def _split(source: str) -> tuple[list[str], str]:
    """A kernel's includes and the rest."""
    lines = source.strip().splitlines()
    return [x for x in lines if x.startswith("#include")], "\n".join(x for x in lines if not x.startswith("#include"))


def _file(sources: Sequence[tuple[list[str], str]]) -> str:
    """C++ of kernels as kernel_0, ..., and of run_0, ..., which return what went wrong, or null."""
    parted = [_split(source) for _, source in sources]
    includes = dict.fromkeys(line for lines, _ in parted for line in lines)  # the first is precompiled
    parts = [*includes, "#include <string>", "static thread_local std::string said;"]
    for i, ((types, _), (_, body)) in enumerate(zip(sources, parted)):
        parts.append(ENTRY.sub(f"static void kernel_{i}(", body))
        names = [f"a{n}" for n in range(len(types))]
        parameters = ", ".join(f"{kind} {name}" for kind, name in zip(types, names))
        parts.append(
            f'extern "C" const char* run_{i}({parameters}) try {{ kernel_{i}({", ".join(names)}); return nullptr; }}\n'
            "catch (const std::exception& error) { said = error.what(); return said.c_str(); }"
        )
    return "\n".join(parts) + "\n"


class Wrapper(PythonWrapperCodegen):
    """Inductor's generated Python, whose kernels come from `Kernels`."""

    def __init__(self) -> None:
        self.kernels = Kernels()
        super().__init__()

    @staticmethod
    def create(is_subgraph: bool, *arguments: Any, **named: Any) -> PythonWrapperCodegen:
        if is_subgraph:
            return PythonWrapperCodegen.create(is_subgraph, *arguments, **named)
        return Wrapper()

    def write_header(self) -> None:
        super().write_header()
        self.imports.writeline(f"from {__name__} import Kernels")
        self.header.writeline("fused_kernels = Kernels()")

    def define_kernel(self, kernel_name: str, kernel_body: str, *arguments: Any, **named: Any) -> None:
        call = "async_compile.cpp_pybinding("
        if kernel_body.startswith(call):
            types, source = ast.literal_eval(f"({kernel_body.removeprefix(call)}")
            self.kernels.cpp_pybinding(types, source)  # the groups that the generated code will ask for: g++ starts now
            kernel_body = kernel_body.replace("async_compile", "fused_kernels", 1)
        super().define_kernel(kernel_name, kernel_body, *arguments, **named)


@torch.library.custom_op("bevfn::cat", mutates_args=())
def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """torch.cat, of which inductor has no code of its own."""
    return torch.cat(tensors, dim)


@_cat.register_fake
def _(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(tensors, dim)


class JoinInACall(CustomGraphModulePass):
    """Joins many tensors in a call: inductor writes, schedules and compiles a loop for each.

    A step joins every parameter and every gradient to one vector (`training/optim.py`): 700 of its 1,259 loops.
    """

    def __call__(self, graph: torch.fx.GraphModule) -> None:
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.cat.default and len(node.args[0]) > MANY:
                node.target = torch.ops.bevfn.cat.default

    def uuid(self) -> str:
        """What inductor's cache of generated code tells apart by: that code calls this file."""
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


@contextlib.contextmanager
def _registered() -> Iterator[None]:
    """`Wrapper` writes the Python for CPUs inside, and what did so before outside."""
    common.init_backend_registration()
    before, before_pass = common.device_codegens["cpu"], common.custom_backend_passes.get("cpu")
    common.device_codegens["cpu"] = dataclasses.replace(before, wrapper_codegen=Wrapper)
    common.custom_backend_passes["cpu"] = JoinInACall()
    try:
        yield
    finally:
        common.device_codegens["cpu"], common.custom_backend_passes["cpu"] = before, before_pass
