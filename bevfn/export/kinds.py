"""Kinds of exported files, by the names that a command line has for them."""

from collections.abc import Callable
from functools import partial

from bevfn.export import air, aoti, build

TRACED: dict[str, build.Kind] = {"onnx": build.ONNX, "air": air.KIND, "aoti": aoti.KIND}


def folder(name: str) -> Callable[..., str]:
    """What writes a folder of this kind: `build.folder` or `autoware.folder`. Raises ValueError, one sentence, where what it needs
    is missing."""
    if name in TRACED:
        TRACED[name].check()
        return partial(build.folder, TRACED[name])
    build.check()
    from bevfn.export import autoware  # of the extra

    return autoware.folder
