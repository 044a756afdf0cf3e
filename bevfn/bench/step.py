"""Forward pass and train step of the full-size detectors: eager against compiled, as a share of the machine's peak."""

import gc
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from bevfn.bench import machine

# Seconds of the published modules with plain-torch ops on 2 mostly idle cores (issue SLICE, section H): forward in
# evaluation mode, and forward + backward in training mode.
UPSTREAM_SECONDS = {"lidar-camera": {"forward": 7.0, "train": 43.0}, "lidar": {"forward": 2.6, "train": 8.0}}


def measure(modality: str, folder: Path | None, *, precision: str, device: str, threads: int, repeats: int) -> dict:
    """Figures of one modality; every variant runs in a process of its own, so that peak memory is its own."""
    figures: dict[str, Any] = {"modality": modality, "precision": precision}
    for what in ("forward", "train"):
        for backend in ("eager", "inductor"):
            arguments = (modality, folder, what, backend, precision, device, threads, repeats)
            figures[f"{what}/{backend}"] = _in_process(_variant, arguments)
    peak = figures["forward/eager"]["gemm_gflops"]
    for what in ("forward", "train"):
        compiled = figures[f"{what}/inductor"]
        compiled["speedup_over_eager"] = figures[f"{what}/eager"]["seconds"] / compiled["seconds"]
        upstream = UPSTREAM_SECONDS.get(modality, {}).get(what)
        if upstream and precision == "fp32" and device == "cpu":
            compiled["speedup_over_upstream_seconds"] = upstream / compiled["seconds"]
        for backend in ("eager", "inductor"):
            share = figures[f"{what}/{backend}"]
            share["share_of_gemm_peak"] = share["gflop"] / share["seconds"] / peak
    return figures


def _in_process(target: Callable, arguments: tuple) -> dict:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, target, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the benchmark process of {arguments} died (out of memory?)") from None
    finally:
        process.join()


def _send(sender: Any, target: Callable, arguments: tuple) -> None:
    sender.send(target(*arguments))


def _variant(
    modality: str, folder: Path | None, what: str, backend: str, precision: str, device: str, threads: int, repeats: int
) -> dict:
    """Seconds, peak memory and FLOPs of one variant."""
    torch.set_num_threads(threads)
    from bevfn.experiments import bevfusion as experiment  # noqa: PLC0415  the recipe owns model, data and step

    config = experiment.Config(
        modality=modality,
        precision=precision,
        backend=backend,
        device=device,
        data="frame" if folder else "generated",
        data_root=folder,
    )
    run = experiment.forward_of(config) if what == "forward" else experiment.step_of(config)
    peak = machine.gemm_gflops(device=device)
    gc.collect()
    started = time.perf_counter()
    run()
    first = time.perf_counter() - started
    seconds = machine.best_seconds(run, repeats=repeats)
    figures = {"seconds": seconds, "first_call_seconds": first, "gemm_gflops": peak}
    if device.startswith("cuda"):
        figures["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    else:
        figures["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures["gflop"] = count_gflop(
        experiment.forward_of(eager(config)) if what == "forward" else experiment.step_of(eager(config))
    )
    return figures


def eager(config: Any) -> Any:
    """The same recipe without a compiler: what the FLOP counter can look into."""
    from dataclasses import replace  # noqa: PLC0415

    return replace(config, backend="eager")


def count_gflop(run: Callable[[], object]) -> float:
    """GFLOP of matrix products, convolutions and our sparse convolution (real neighbour pairs only)."""
    _register_formulas()
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def _register_formulas() -> None:
    """FLOPs of the sparse operators; registered once per process."""
    if getattr(_register_formulas, "done", False):
        return
    _register_formulas.done = True  # type: ignore[attr-defined]

    def forward(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, *_: Any, **__: Any) -> int:
        return 2 * int((table >= 0).sum()) * weight.shape[1] * weight.shape[2]

    def weight_gradient(x: torch.Tensor, grad: torch.Tensor, table: torch.Tensor, *_: Any, **__: Any) -> int:
        return 2 * int((table >= 0).sum()) * x.shape[1] * grad.shape[1]

    register_flop_formula(torch.ops.bevfn.sparse_conv, get_raw=True)(forward)
    register_flop_formula(torch.ops.bevfn.sparse_conv_weight_grad, get_raw=True)(weight_gradient)
