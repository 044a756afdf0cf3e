"""Bird's-eye-view 3D detectors as stateless functions; see README.md.

Where torch_npu is installed without CANN (`bevfn[npu]` on a laptop), `import torch` fails: torch imports torch_npu on its
own, which looks for CANN's libraries. Importing bevfn first switches that off. A program that imports torch first must
set TORCH_DEVICE_BACKEND_AUTOLOAD=0 itself.
"""

import ctypes
import importlib.util
import os
import sys

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
