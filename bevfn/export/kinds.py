"""Kinds of exported files, by the names that a command line has for them."""

from collections.abc import Callable
from typing import Any

from bevfn.export import build


def _autoware(*given: Any, **named: Any) -> str:
    from bevfn.export import autoware  # of the extra

    return autoware.folder(*given, **named)


KINDS: dict[str, Callable[..., str]] = {"onnx": build.onnx_folder, "autoware": _autoware}
"""{name: writes a folder of that kind, as `build.onnx_folder`}"""
