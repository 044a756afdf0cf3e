"""Samples/s and MFU: what is counted, and what it is held against."""

import functools
from dataclasses import replace

import pytest
import small_world
import tiny_experiment as tiny
import torch

from bevfn.precision import Policy
from bevfn.training import assembly, flops, run, speed, tasks
from bevfn.training.speed import Work


@functools.cache
def made(**changes) -> tasks.Run:
    """The tiny experiment."""
    config = replace(tiny.Config(data_root=small_world.index().root, device="cpu"), **changes)
    task = tiny.task(config)
    return tasks.Run(task, config, tasks.plan(config, task.data.items))


def test_speed_is_of_all_samples_and_mfu_of_one_device():
    assert Work(samples=8, flops=2e12, peak=1e13).speeds(0.5) == {"speed/samples_per_second": 16, "speed/mfu": 0.4}
    assert Work(samples=8, flops=2e12).speeds(0.5) == Work(samples=8, peak=1e13).speeds(0.5)
    assert Work(samples=8, flops=2e12, peak=1e13).speeds(0.0) == {}


def test_a_steps_flops_are_what_its_forward_and_backward_pass_compute():
    """Three forward passes, but for first layers, which send no gradient back to the data."""
    train_state, _ = assembly.build(made())
    batch = assembly.example(made())
    counted = speed.of_step(made(), train_state, batch)
    step = assembly.pure_step(made())
    exact = flops.count(lambda: step(train_state, batch))
    assert 0.9 * counted < exact <= counted
    assert speed.of_step(made(accumulate=2), train_state, batch) == 2 * counted


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "fp16", 312.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "bf16", 989.0),
        ("NVIDIA H200", "fp32", None),  # TF32 or not, who knows
        ("Tesla T4", "fp16", None),
    ],
)
def test_the_peak_is_known_of_some_gpus_in_half_precision(monkeypatch, name, precision, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    on_gpu = replace(made(), config=replace(made().config, device="cuda", precision=precision))
    assert on_gpu.policy == Policy.of(precision)
    assert speed.peak(on_gpu) == (None if tflops is None else tflops * 1e12)


def test_the_peak_is_the_flags_and_without_one_a_cpu_has_none_and_nothing_is_counted():
    assert speed.peak(made()) is None and speed.peak(made(peak_tflops=0.2)) == 2e11
    assert speed.counted(made(), None, None, Work(4)) == Work(4)


@pytest.mark.parametrize(
    ("device", "steps", "backend"),
    [("cpu", 99, "eager"), ("cpu", 100, "inductor"), ("cuda", 1, "inductor")],
)
def test_auto_compiles_what_is_long_enough_and_says_why(capsys, device, steps, backend):
    config = replace(made().config, backend="auto", device=device)  # 2 samples a step
    chosen = run.with_backend(config, replace(made().plan, total_steps=steps))
    assert chosen == replace(config, backend=backend)
    assert capsys.readouterr().out.startswith(f"backend {backend} (--backend auto: ")
    assert run.with_backend(chosen, made().plan) is chosen and capsys.readouterr().out == ""
