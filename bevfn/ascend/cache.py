"""Compiled graphs kept on disk by GE's model cache, so that a run that begins again does not compile them.

torchair's own door to it, `cache_compile`, takes methods of an nn.Module and traces them by Dynamo, which is another
graph than the one that is checked offline. Behind that door it asks a compiled graph for its code, with a folder among
GE's options, and runs the code: so does this. GE tells graphs in a folder apart by torchair's counter alone
("graph_1"), so that each gets a folder of its own, named by all that it is made of; a process of several has one of its
rank, as with torchair.

Single operators are GE's to keep, for all processes of a machine, and it does (docs/ascend.md).

Source: torch_npu 2.13.0, torchair/inference/_cache_compiler.py; hicann/ge ffdcbc9f, docs/en/design/features/
model_cache.md.
"""

import hashlib
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bevfn.files import check_writable, writing

VARIABLE = "TORCHAIR_CACHE_HOME"
"""torchair's name for the folder; unset: nothing is kept"""
_OPTION = "ge.graph_compiler_cache_dir"


def kept(compiled: Any) -> Callable:
    """What `torchair.get_compiler` returned, with its graph kept below `VARIABLE`'s folder; itself where there is none.

    Raises ValueError where the folder cannot be made or written to.
    """
    home = os.environ.get(VARIABLE)
    if not home:
        return compiled
    check_writable(Path(home), VARIABLE)
    code = compiled.get_code({_OPTION: ""})
    if not isinstance(code, str):  # a configuration that torchair has no code for
        return compiled
    from torchair.npu_fx_compiler import _compile_py_code

    folder = folder_of(compiled.runner, Path(home))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    made: Any = _compile_py_code(code)
    made._update_ge_cache_dir(str(folder))
    return made.kernel


def folder_of(runner: Any, home: Path) -> Path:
    """Of a graph, its options and the release that compiles it, and of this process's rank."""
    graph = type(runner.graph._proto)()
    graph.CopyFrom(runner.graph._proto)
    graph.name = ""  # torchair's counter
    made_of = hashlib.sha256(graph.SerializeToString(deterministic=True))
    made_of.update(repr([sorted(options.items()) for options in runner._normalize_ge_option()]).encode())
    made_of.update(importlib.metadata.version("torch_npu").encode())
    world, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")  # torchrun's
    return home / f"bevfn_{made_of.hexdigest()[:32]}" / f"world{world}global_rank{rank}"
