"""GE graphs as files."""

from pathlib import Path
from typing import Any

from bevfn.files import write_atomically


def write(graph: Any, stem: Path) -> tuple[Path, Path]:
    """Writes `stem`.pbtxt, for people and for Netron, and `stem`.air, the serialized model that torchair hands to GE."""
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef
    from torchair._ge_concrete_graph.utils import convert_to_pbtxt

    model = ModelDef()
    model.name = stem.name
    model.graph.add().CopyFrom(graph)
    readable, air = stem.with_name(f"{stem.name}.pbtxt"), stem.with_name(f"{stem.name}.air")
    write_atomically(readable, str(convert_to_pbtxt(graph)).encode())
    write_atomically(air, model.SerializeToString())
    return readable, air
