"""What the ops of this package become in a package of AOTInductor: calls of the C++ kernels, which are linked into it.

libtorch finds no operator of Python's, but a package calls a C function for an operator that inductor is told of: `aoti.cpp`
has them. The other ops (`deform_conv`, whose products are torch's) become aten operators, as for Ascend.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevfn.kernels import ascend, native

SOURCE = Path(__file__).with_suffix(".cpp")
FUNCTION = re.compile(r"^(AOTITorchError aoti_torch_cpu_(\w+)\(.*?\)) \{", flags=re.DOTALL | re.MULTILINE)
LINKED = ("sparse_conv", "neighbours", "voxelize", "voxel_pool", "deform_attn")  # whose kernels those functions call


def functions() -> dict[torch._ops.OpOverload, list[str]]:
    """{operator: the declaration of its C function}, for inductor's `aot_inductor.custom_ops_to_c_shims`."""
    found = FUNCTION.findall(SOURCE.read_text())
    return {getattr(torch.ops.bevfn, name).default: [declared] for declared, name in found}


def table() -> dict[Any, Callable]:
    """{operator: what it is traced as}; operators that are called are in it only where operands must be cast before."""
    called = functions()
    aten = {operator: same for operator, same in ascend.table().items() if operator not in called}
    casting = (torch.ops.bevfn.sparse_conv, torch.ops.bevfn.voxel_pool, torch.ops.bevfn.deform_attn)
    return {**aten, **{operator.default: partial(_in_float32, operator) for operator in casting}}


def _in_float32(operator: Any, *operands: Any) -> Any:
    """Halves are widened and operands laid out in order, as on the host; where they are, the call stays what it is."""
    plain = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in operands]
    plain = [x.contiguous() if isinstance(x, Tensor) else x for x in plain]
    if all(x is y for x, y in zip(plain, operands)):
        return NotImplemented
    return operator(*plain).to(operands[0].dtype)


def archive(target: Path) -> None:
    """Compiles what the package is linked with: a static library. Raises OSError where the compiler refuses."""
    from torch.utils import cpp_extension  # which imports setuptools, as inductor does

    sources = [SOURCE, *(SOURCE.parent / op / "cpu.cpp" for op in LINKED)]
    native.archive(sources, target, include=cpp_extension.include_paths())
