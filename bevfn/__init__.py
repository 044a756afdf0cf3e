"""Bird's-eye-view 3D detectors as stateless functions; see README.md.

Where torch_npu is installed without CANN (`bevfn[npu]` on a laptop), `import torch` fails: torch imports torch_npu on its
own, which looks for CANN's libraries. Importing bevfn first switches that off. A program that imports torch first must
set TORCH_DEVICE_BACKEND_AUTOLOAD=0 itself.
"""

import ctypes
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bevfn.detector import Detector

__version__ = "0.1.0"


def _without_cann() -> bool:
    """torch_npu is installed, but the library that it is linked with cannot be loaded."""
    if "torch" in sys.modules or importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError:
        return True
    return False


if _without_cann():
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def load(path: "str | os.PathLike[str]", *, model: str | None = None, device: str = "cpu", **more: Any) -> "Detector":
    """A trained model as one object: parameters, statistics, recipe, reading, `predict` and `detect`; see `bevfn.detector.load`.

    path: a run's folder, RUN/best, a step's folder, a file of `bevfn checkpoint import`, or a published .pth.
    """
    from bevfn import detector  # and torch: importing bevfn stays light

    return detector.load(path, model=model, device=device, **more)
