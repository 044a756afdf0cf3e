"""torchair's converters on any machine: the Python files of torch_npu, without its shared libraries, CANN or a device.

torchair (inside torch_npu) turns an aten graph into a GE graph in Python. Its one C extension, `torchair.core._torchair`,
talks to CANN; building a graph needs nothing from it, so a few functions of the same names stand in here, and importing
torch_npu itself, which would load CANN, is refused from then on. The process can lower graphs, and cannot run them.

Source: torch_npu 2.13.0, dynamo/torchair (behaviour).
"""

import enum
import importlib.metadata
import importlib.util
import logging
import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

from bevfn import CONVERTERS

PACKAGE = "torch_npu"
_C_EXTENSION = "torchair.core._torchair"


def load() -> types.ModuleType:
    """The package `torchair`, imported on the first call.

    Raises ValueError if torch_npu is missing or made for another torch, or if this process has imported it for real.
    """
    if loaded():
        return sys.modules["torchair"]
    folder = find()
    if PACKAGE in sys.modules or "torchair" in sys.modules:
        raise ValueError(
            "torch_npu is already imported in this process, so its converters cannot be loaded without a device; "
            "set TORCH_DEVICE_BACKEND_AUTOLOAD=0 before Python starts"
        )
    path, logger_class = list(sys.path), logging.getLoggerClass()
    sys.path.insert(0, str(folder / "dynamo"))
    sys.meta_path.insert(0, _Refusal())
    sys.modules[_C_EXTENSION] = _extension()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # converters of torch_npu's own operators, which do not exist here
            import torchair
            import torchair.core
            from torchair._ge_concrete_graph.ge_converter import custom  # noqa: F401
    finally:
        sys.path[:] = path
        logging.setLoggerClass(logger_class)  # torchair changes it for everybody
    torchair.core._torchair = sys.modules[_C_EXTENSION]
    return torchair


def loaded() -> bool:
    """Whether `load` has been called in this process."""
    return getattr(sys.modules.get(_C_EXTENSION), "stand_in", False)


def find() -> Path:
    """The folder of the installed torch_npu. Raises ValueError if it is missing or made for another torch."""
    spec = importlib.util.find_spec(PACKAGE) if not loaded() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "torch_npu is not installed, and Ascend graphs need its converters; run `make npu`, or pip install --no-deps "
            f"--target {CONVERTERS} torch_npu=={_release(torch.__version__)}"
        )
    theirs, ours = importlib.metadata.version(PACKAGE), torch.__version__
    if _release(theirs) != _release(ours):
        raise ValueError(
            f"torch_npu {theirs} is made for another torch than {ours}; pip install 'torch_npu=={_release(ours)}.*'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _release(version: str) -> str:
    """2.13.0 of 2.13.0+cpu and of 2.13.0.post1."""
    return ".".join(version.split("+")[0].split(".")[:3])


class _Refusal:
    """Finder and loader that let `import torch_npu` fail: its extension would come with a torchair of its own."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == PACKAGE or name.startswith(f"{PACKAGE}.") else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        raise ModuleNotFoundError(
            f"{spec.name} cannot be imported in a process that lowers graphs offline (bevfn.ascend.torchair)",
            name=spec.name,
        )

    def exec_module(self, module: types.ModuleType) -> None:
        raise NotImplementedError


def _extension() -> types.ModuleType:
    """What torchair's Python asks of its C extension while it builds a graph."""
    module: Any = types.ModuleType(_C_EXTENSION)
    module.stand_in = True
    names = "BOOL INT8 UINT8 INT16 UINT16 INT32 UINT32 INT64 UINT64 FLOAT16 BF16 FLOAT32 FLOAT64 COMPLEX32 COMPLEX64"
    numbered = {name: i for i, name in enumerate([*names.split(), "COMPLEX128"])}
    module.TorchDataType = enum.IntEnum("TorchDataType", numbered)  # type: ignore[misc]
    module.TorchNpuGraphBase = _Graph
    module.InitializeGraphEngine = lambda options: None
    module.FinalizeGraphEngine = lambda: None
    module.SetDebugLogPath = lambda path: None
    module.check_cann_compat = lambda op, inputs, attrs: ""
    module.get_registered_ir_def = lambda op: ("SUCCESS", [], [], [])  # every custom type counts as installed
    return module


class _Graph:
    """In place of GE's session: holds the name, runs nothing."""

    def __init__(self, name: str) -> None:
        self.graph_name = name
