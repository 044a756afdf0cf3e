"""Seconds per frame, memory and files of a detector in the runtimes that `bevfn export` writes for.

bevfn bench deploy --model bevfusion-lidar --scale published

Seconds are of one run in which the runtimes take turns; memory is of a process that runs one of them.
"""

import contextlib
import importlib.util
import resource
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal, get_args

import numpy as np
import torch

from bevfn import catalogue, detector, host, recipes
from bevfn import compile as compilation
from bevfn.ascend import torchair
from bevfn.bench import machine
from bevfn.data import inputs, scene, source
from bevfn.data.batch import Batch, collate
from bevfn.export import build, kinds
from bevfn.synth import key_frame, rig
from bevfn.training import command_line

Runtime = Literal["eager", "inductor", "aoti", "onnxruntime", "onnxruntime-voxels", "openvino-voxels"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
READS: dict[str, str] = {  # runtime: its file
    "aoti": "aoti",
    "onnxruntime": "onnx",
    "onnxruntime-voxels": "onnx-voxels",
    "openvino-voxels": "onnx-voxels",
}
NEAR_M = 0.05
Predict = Callable[[], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    model: str
    checkpoint: Path | None
    """None: weights that are drawn, whose boxes say nothing"""
    frame: Path | None
    scale: command_line.Scale
    threads: int
    repeats: int
    only: tuple[Runtime, ...] = RUNTIMES
    capacities: Mapping[str, Any] = field(default_factory=dict)
    """flags of the recipe that make room for voxels and sites; without them as the checkpoint's, or as published"""


def measure(setting: Setting) -> dict:
    """Figures: "export" by file, "runtimes" by runtime, "absent" with the reason.

    Raises ValueError, one sentence, for a checkpoint or capacities that do not fit the model.
    """
    _ = _detector(setting).task  # what is refused is refused now, not in a process of its own
    absent = {name: why for name in setting.only if (why := missing(name))}
    names = [name for name in setting.only if name not in absent]
    files = sorted({READS[name] for name in names if name in READS})
    if setting.only == RUNTIMES and _has_converters():  # which runs nowhere here
        files.append("air")
    with tempfile.TemporaryDirectory(prefix="bevfn-deploy-") as made:
        folder = Path(made)
        size = rig.CALIBRATED_SIZE if setting.scale == "published" else source.WORLD_IMAGE
        setting = replace(setting, frame=setting.frame or key_frame.write_frame(folder / "frame", image_size=size))
        exports = {name: machine.in_process(_export, setting, name, folder) for name in files}
        together = machine.in_process(_together, setting, names, folder)
        for name, figures in together.items():
            figures |= machine.in_process(_alone, setting, name, folder)
            if "eager" in together:
                figures["speedup_over_eager"] = together["eager"]["seconds"] / figures["seconds"]
    settings = {"model": setting.model, "scale": setting.scale, "threads": setting.threads, "repeats": setting.repeats}
    return {**settings, **setting.capacities, "export": exports, "runtimes": together, "absent": absent}


def missing(runtime: str) -> str:
    """Why a runtime cannot be measured here, or nothing."""
    try:
        if runtime in READS:
            _kind(READS[runtime]).check()
    except ValueError as error:
        return str(error)
    if runtime.startswith("openvino") and importlib.util.find_spec("openvino") is None:
        return "openvino is not installed: pip install -e '.[openvino]'"
    return ""


def _has_converters() -> bool:
    try:
        torchair.find()
    except ValueError:
        return False
    return True


def _prepared(setting: Setting) -> tuple[detector.Detector, Batch]:
    """The detector and a batch of one key frame; of the same bits in every process."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    assert setting.frame is not None
    found = _detector(setting).at(setting.frame)
    if setting.checkpoint is None:
        params, state = found.task.init()
        found = replace(found, params=params, state=state)
    index = inputs.read(setting.frame)
    reading = found.ready(index)
    return found, collate([scene.load(index, 0, reading)], capacities=reading.capacities)[0]


def _detector(setting: Setting) -> detector.Detector:
    """The detector, without weights where they are drawn."""
    flags = {"scale": setting.scale, **setting.capacities}
    if setting.checkpoint is not None:
        return detector.load(setting.checkpoint, model=setting.model, **flags)
    experiment = catalogue.MODELS[setting.model].experiment
    config = detector.flagged(experiment, recipes.published(experiment, setting.model), flags)
    return detector.Detector(experiment, config.plain(), {}, {}, Path("drawn"))


def _export(setting: Setting, name: str, folder: Path) -> dict:
    """Writes a file and its inputs: seconds of every phase, bytes, peak memory."""
    kind = _kind(name)
    made, batch = _prepared(setting)
    seconds: dict[str, float] = {}
    with _timed(seconds, "trace"):
        graph = kind.make(made, batch, "voxels" if name.endswith("voxels") else "points")
    file = _file(folder, name)
    with _timed(seconds, "write"):
        run, _ = kind.write(graph, file)
    given = {key: value.numpy() for key, value in graph.inputs.items()}
    with _timed(seconds, "run"):
        run(given, False)
    np.savez(file.with_suffix(".npz"), **given)
    return {"bytes": file.stat().st_size, "seconds": seconds, "peak_memory_gb": _peak_gb()}


def _kind(name: str) -> build.Kind:
    """Of a file, as `READS` names it."""
    return kinds.TRACED[name.removesuffix("-voxels")]


def _file(folder: Path, name: str) -> Path:
    return (folder / name).with_suffix(Path(_kind(name).file).suffix)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = perf_counter()
    yield
    seconds[name] = perf_counter() - started


def _peak_gb() -> float:
    """So far, of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _together(setting: Setting, names: list[str], folder: Path) -> dict[str, dict]:
    """Median seconds of runtimes that take turns, how many of eager's detections each finds, and what did not fit."""
    from bevfn.export import verify

    host.keep_freed_memory()  # as `bevfn predict` does; a server in C++ should
    runs = {name: runtime(name, setting, folder) for name in names}
    first, found = {}, {}
    for name, run in runs.items():
        started = perf_counter()
        found[name] = run()
        first[name] = perf_counter() - started
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(setting.repeats):
        for name, run in runs.items():
            started = perf_counter()
            run()
            seconds[name].append(perf_counter() - started)
    figures: dict[str, dict] = {}
    for name in names:
        figures[name] = {"seconds": median(seconds[name]), "first_call_seconds": first[name]}
        if lost := {key: int(count) for key, count in found[name].items() if key.startswith("overflow/") and count}:
            figures[name]["lost"] = lost
        if "eager" in found:
            figures[name]["found_of_eager"] = verify.paired(found[name], found["eager"], NEAR_M).share
    return figures


def _alone(setting: Setting, name: str, folder: Path) -> dict[str, float]:
    """Peak memory of a process that loads one runtime and runs it twice, and what its imports took of it."""
    host.keep_freed_memory()
    torch.set_num_threads(setting.threads)
    imports = _peak_gb()
    run = runtime(name, setting, folder)
    run()
    run()
    return {"peak_memory_gb": _peak_gb(), "imports_gb": imports}


def runtime(name: str, setting: Setting, folder: Path) -> Predict:
    """A call is one frame: inputs in memory -> detections in memory."""
    if name in ("eager", "inductor"):
        return _torch(setting, name)
    file = _file(folder, READS[name])
    with np.load(file.with_suffix(".npz")) as saved:
        given = dict(saved)
    return {"aoti": _aoti, "onnxruntime": _onnxruntime, "openvino": _openvino}[name.removesuffix("-voxels")](
        setting, file, given
    )


def _torch(setting: Setting, backend: str) -> Predict:
    made, batch = _prepared(setting)
    compiled = compilation.function(made.task.predict, backend=backend)

    def run() -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {key: value.numpy() for key, value in compiled(made.params, made.state, batch).items()}

    return run


def _aoti(setting: Setting, file: Path, given: dict[str, np.ndarray]) -> Predict:
    torch.set_num_threads(setting.threads)
    package = torch._inductor.aoti_load_package(str(file))
    tensors = [torch.from_numpy(value) for value in given.values()]
    names = ("boxes", "scores", "labels", "valid")  # the first outputs of `decode`

    def run() -> dict[str, np.ndarray]:
        with torch.no_grad():
            return dict(zip(names, [value.numpy() for value in package(*tensors)]))

    return run


def _onnxruntime(setting: Setting, file: Path, given: dict[str, np.ndarray]) -> Predict:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return lambda: dict(zip(names, session.run(None, given)))


def _openvino(setting: Setting, file: Path, given: dict[str, np.ndarray]) -> Predict:
    import openvino

    how: dict[str, Any] = {"INFERENCE_NUM_THREADS": setting.threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(file), "CPU", how)
    return lambda: {next(iter(port.names)): value for port, value in compiled(given).items()}
