"""Forward pass and train step of the full-size detectors: eager against compiled, as a share of the machine's peak."""

import gc
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from bevfn import compile as compilation
from bevfn import host, recipes
from bevfn.bench import machine
from bevfn.precision import Precision
from bevfn.synth import key_frame
from bevfn.training import assembly, command_line, flops

Variant = Literal["forward/eager", "forward/inductor", "train/eager", "train/inductor"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    model: str
    frame: Path | None
    precision: Precision
    batch_size: int
    device: str
    threads: int
    repeats: int
    scale: command_line.Scale = "published"
    checkpoint_activations: bool = False
    only: tuple[Variant, ...] = VARIANTS


def measure(setting: Setting) -> dict:
    """Figures of one model; every variant runs in a process of its own, so that peak memory is its own."""
    figures: dict[str, Any] = {
        "model": setting.model,
        "scale": setting.scale,
        "precision": setting.precision,
        "batch_size": setting.batch_size,
        "checkpoint_activations": setting.checkpoint_activations,
    }
    made: dict[str, dict] = {name: machine.in_process(_variant, setting, *name.split("/")) for name in setting.only}
    for name, variant in made.items():
        variant["samples_per_second"] = setting.batch_size / variant["seconds"]
        slow = made.get(name.replace("inductor", "eager"), variant)
        if slow is not variant:
            variant["gflop"] = slow["gflop"]
            variant["speedup_over_eager"] = slow["seconds"] / variant["seconds"]
        if "gflop" in variant:
            variant["share_of_gemm_peak"] = variant["gflop"] / variant["seconds"] / variant["gemm_gflops"]
    return figures | made


def _variant(setting: Setting, what: str, backend: compilation.Backend) -> dict:
    """Seconds, peak memory and (eager only: a compiler hides its operators from the counter) FLOPs of one variant."""
    torch.set_num_threads(setting.threads)
    host.keep_freed_memory()
    run = _prepared(setting, what, backend)
    cuda = setting.device.startswith("cuda")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[setting.precision]
    figures = {"gemm_gflops": machine.gemm_gflops(device=setting.device, dtype=dtype, size=8192 if cuda else 2048)}
    gc.collect()
    started, used = time.perf_counter(), sum(os.times()[:4])
    run()
    figures["first_call_seconds"] = time.perf_counter() - started
    if backend == "inductor":
        from torch._inductor.async_compile import shutdown_compile_workers

        shutdown_compile_workers()  # whose seconds count from their end on
    figures["first_call_cpu_seconds"] = sum(os.times()[:4]) - used
    figures["first_call_peak_memory_gb"] = _peak_gb(cuda)
    figures["seconds"] = machine.best_seconds(run, repeats=setting.repeats)
    figures["peak_memory_gb"] = _peak_gb(cuda)
    if backend == "eager":
        figures["gflop"] = flops.count(run) / 1e9
    return figures


def _peak_gb(cuda: bool) -> float:
    """So far, of this process."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _prepared(setting: Setting, what: str, backend: compilation.Backend) -> Callable[[], object]:
    """One call is one forward pass with decoding, or one train step, of the experiment on a key frame."""
    with tempfile.TemporaryDirectory(prefix="bevfn-frame-") as folder:
        root = setting.frame if setting.frame is not None else key_frame.write_frame(Path(folder))
        run = recipes.on_frame(
            setting.model,
            root,
            precision=setting.precision,
            backend=backend,
            device=setting.device,
            batch_size=setting.batch_size,
            scale=setting.scale,
            checkpoint_activations=setting.checkpoint_activations,
        )
        batch = assembly.example(run)
    train_state, step = assembly.build(run)
    if what == "train":

        def train_step() -> object:
            nonlocal train_state
            train_state, metrics = step(train_state, [batch])
            return metrics

        return train_step
    predict = compilation.function(run.task.predict, backend=backend)

    def forward() -> object:
        with torch.no_grad():
            return predict(train_state.params, train_state.state, batch)

    return forward
