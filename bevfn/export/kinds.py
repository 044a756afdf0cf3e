"""Kinds of exported files, by the names that a command line has for them."""

from collections.abc import Callable
from typing import Any

from bevfn.export import air, aoti, build


def _autoware(*given: Any, **named: Any) -> str:
    from bevfn.export import autoware  # of the extra

    return autoware.folder(*given, **named)


KINDS: dict[str, tuple[Callable[[], None], Callable[..., str]]] = {
    "onnx": (build.check, build.onnx_folder),
    "autoware": (build.check, _autoware),
    "air": (air.check, air.folder),
    "aoti": (aoti.check, aoti.folder),
}
"""{name: (raises ValueError where what it needs is missing, writes the folder)}"""
