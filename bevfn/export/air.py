"""A flow as an Ascend graph: an .air that CANN's atc compiles for a device (`--framework=1`), its weights inside as Const.

It is lowered as `bevfn graph` lowers a step, and what is verified is the file: read again and executed by the interpreter as
an A2's kernels compute. Neither CANN nor a device is needed, and none has read such a file yet.

Source: hicann/ge ffdcbc9f, api/atc/main_impl.cc (`Model::LoadFromFile`: one ModelDef, which torchair hands to GE too) and
graph_metadef/graph/serialization/model_serialize.cc (no message beyond 2 GB).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bevfn.ascend import torchair
from bevfn.data.batch import Batch
from bevfn.detector import Detector
from bevfn.export import flow
from bevfn.export.build import Arrays, Kind, Run
from bevfn.export.flow import PROTOBUF
from bevfn.files import writing

FILE = "model.air"


def check() -> None:
    """Raises ValueError, one sentence, where torchair's converters cannot be loaded."""
    torchair.load()


def make(detector: Detector, batch: Batch, entry: flow.Entry) -> flow.Flow:
    """The flow in operators that have converters."""
    from bevfn.ascend import lower
    from bevfn.ascend.fixes import rewrites

    torchair.load()
    made = flow.make(detector, batch, entry=entry, table=lower.tables(), bits=True)
    rewrites.apply(made.module)
    return made


def write(made: flow.Flow, path: Path) -> tuple[Run, dict[str, Any]]:
    """Writes the file, whose outputs are the flow's, in their order; returns how it runs, and {boundary: GE value}.

    Raises ValueError, one sentence, that names an operator without converter and its line, and for a file beyond 2 GB.
    """
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    from bevfn.ascend import lower

    held = sum(value.nbytes for value in made.module.buffers())
    if held > PROTOBUF:  # before they are copied
        raise ValueError(_too_large(held))
    converted = lower.convert(made.module, list(made.inputs))
    if [*converted.used] != [*range(len(made.inputs))]:
        raise ValueError("the Ascend graph leaves out inputs; they are read by nothing but what it folds")
    graph = converted.graph
    end = next(op for op in graph.op if op.type == "NetOutput")
    values = [end.input[place] for place in converted.places]
    _only(graph, end, values[: len(made.outputs)])
    there = {op.name for op in graph.op if op.type not in ("Const", "Data")}
    found = dict(zip(made.boundaries, values[len(made.outputs) :]))
    found = {name: value for name, value in found.items() if value.rpartition(":")[0] in there}
    model = ModelDef(name=path.stem)
    model.graph.add().CopyFrom(graph)
    if model.ByteSize() > PROTOBUF:
        raise ValueError(_too_large(model.ByteSize()))
    with writing(path):
        path.write_bytes(model.SerializeToString())

    def ran(inputs: Arrays, inside: bool) -> dict[str, np.ndarray]:
        results, seen = run(path, inputs, found.values() if inside else ())
        return dict(zip(made.outputs, results)) | {name: seen[value] for name, value in found.items() if inside}

    return ran, {"values": found}


def _too_large(size: int) -> str:
    return (
        f"the graph and its weights take {size / 2**30:.1f} GB, more than the 2 GB of an .air, which is one protobuf message; "
        "export with --precision fp16, or a smaller model"
    )


def _only(graph: Any, end: Any, values: list[str]) -> None:
    """Takes out of a GraphDef what NetOutput `end` does not need for these of its inputs, the first ones."""
    count = len(values)
    assert list(end.input[:count]) == values
    del end.input[count:], end.input_desc[count:]
    for key, part in (("_input_name_key", "s"), ("_input_name_value", "i")):
        del getattr(end.attr[key].list, part)[count:]
    del graph.attr["_output_dtypes"].list.i[count:]
    ops = {op.name: op for op in graph.op}
    needed, waiting = {end.name}, [end]
    while waiting:
        for source in waiting.pop().input:
            name = source.rpartition(":")[0]
            if name and name not in needed:  # an optional input that is not given has no name
                needed.add(name)
                waiting.append(ops[name])
    for place in reversed(range(len(graph.op))):
        if graph.op[place].name not in needed and graph.op[place].type != "Data":
            del graph.op[place]


def run(path: Path, inputs: Arrays, inside: Iterable[str] = ()) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """The file in the interpreter, as an A2's kernels compute: (outputs in order, values `inside` by name, "node:index")."""
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    from bevfn.ascend import interpret
    from bevfn.kernels import ascend as kernels

    model = ModelDef()
    model.ParseFromString(path.read_bytes())
    (graph,) = model.graph
    wanted, found = set(inside), {}

    def watch(node: Any, results: tuple) -> None:
        for i, value in enumerate(results):
            if (name := f"{node.name}:{i}") in wanted:
                found[name] = value.numpy().copy()

    program = interpret.prepare(graph, kernels.meanings(), device="a2")
    results = interpret.run(program, [torch.from_numpy(value) for value in inputs.values()], watch)
    return [value.numpy() for value in results], found


KIND = Kind(
    file=FILE,
    runtime="bevfn's interpreter of GE graphs, as an Atlas A2's kernels compute",
    packages=("torch", "torch_npu"),
    check=check,
    make=make,
    write=write,
)
