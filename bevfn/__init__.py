"""Bird's-eye-view 3D detectors as stateless functions; see README.md.

torch imports every package that calls itself a backend. Where torch_npu is one of the environment's packages without CANN,
`import torch` therefore fails: torch_npu looks for CANN's libraries. `make npu` puts it into a folder of its own, where only
who imports bevfn finds it, after torch or before. An environment that has it among its packages all the same must import
bevfn first, which switches torch's imports off, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 itself.
"""

import ctypes
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bevfn.detector import Detector

__version__ = "0.1.0"


CONVERTERS = os.path.join(sys.prefix, "npu")
"""where `make npu` puts torch_npu, for its converters to Ascend graphs"""


def _find_converters() -> None:
    """Makes torch_npu importable from CONVERTERS, unless the environment has it anyway."""
    if os.path.isdir(CONVERTERS) and CONVERTERS not in sys.path and importlib.util.find_spec("torch_npu") is None:
        sys.path.append(CONVERTERS)


def _without_cann() -> bool:
    """torch_npu is installed, but the library that it is linked with cannot be loaded."""
    if "torch" in sys.modules or importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError:
        return True
    return False


_find_converters()
if _without_cann():
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def load(path: "str | os.PathLike[str]", *, model: str | None = None, device: str = "cpu", **more: Any) -> "Detector":
    """A trained model as one object: parameters, statistics, recipe, reading, `predict` and `detect`; see `bevfn.detector.load`.

    path: a run's folder, RUN/best, a step's folder, a file of `bevfn checkpoint import`, or a published .pth.
    """
    from bevfn import detector  # and torch: importing bevfn stays light

    return detector.load(path, model=model, device=device, **more)
