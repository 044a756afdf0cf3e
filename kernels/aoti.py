"""What the ops of this package become in a package of AOTInductor: calls of the C++ kernels, which are linked into it.

libtorch finds no operator of Python's, but a package calls a C function for an operator that inductor is told of: `aoti.cpp`
has them, of what dominates a LiDAR detector. The other ops become aten operators, as for Ascend.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevfn.kernels import ascend, native

SOURCE = Path(__file__).with_suffix(".cpp")
FUNCTION = re.compile(r"^(AOTITorchError aoti_torch_cpu_(\w+)\(.*?\)) \{", flags=re.DOTALL | re.MULTILINE)
LINKED = ("sparse_conv", "neighbours", "voxelize")  # whose kernels those functions call


def functions() -> dict[torch._ops.OpOverload, list[str]]:
    """{operator: the declaration of its C function}, for inductor's `aot_inductor.custom_ops_to_c_shims`."""
    found = FUNCTION.findall(SOURCE.read_text())
    return {getattr(torch.ops.bevfn, name).default: [declared] for declared, name in found}


def table() -> dict[Any, Callable]:
    """{operator: what it is traced as}; operators that are called are in it only where operands must be cast before."""
    called = functions()
    aten = {operator: same for operator, same in ascend.table().items() if operator not in called}
    return {**aten, torch.ops.bevfn.sparse_conv.default: _sparse_conv}


def _sparse_conv(x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Halves are widened, as on the host; float32 stays the call that it is."""
    if x.dtype == torch.float32:
        return NotImplemented
    return torch.ops.bevfn.sparse_conv(x.float(), weight.float(), rows).to(x.dtype)


def archive(target: Path) -> None:
    """Compiles what the package is linked with: a static library. Raises OSError where the compiler refuses."""
    from torch.utils import cpp_extension  # which imports setuptools, as inductor does

    sources = [SOURCE, *(SOURCE.parent / op / "cpu.cpp" for op in LINKED)]
    native.archive(sources, target, include=cpp_extension.include_paths())
