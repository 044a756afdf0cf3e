"""What a step computes and what the device could: samples/s and MFU, the share of the peak that the model's arithmetic reaches."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from bevfn.data.batch import Batch
from bevfn.training import flops, train
from bevfn.training.tasks import Run

# TFLOP/s of dense fp16 and bf16 products, of NVIDIA's data sheets, by a part of the name that torch gives. None for fp32:
# whether tensor cores round it to TF32 is a setting, of convolutions and of products each.
PEAKS = {"A100": 312.0, "H100 PCIe": 756.0, "H100 80GB HBM3": 989.0, "H200": 989.0}
FORWARDS = 3  # a train step: the forward pass, and for the gradients of inputs and of weights as much again each


@dataclass(frozen=True)
class Work:
    """One step of the run."""

    samples: int
    """over all devices"""
    flops: float | None = None
    """of one device, see `of_step`; None: not counted"""
    peak: float | None = None
    """FLOP/s of one device at best; None: not known"""

    def speeds(self, seconds: float) -> Mapping[str, float]:
        """Metrics of a step that took so long."""
        made = {"speed/samples_per_second": self.samples / seconds} if seconds > 0 else {}
        if made and self.flops is not None and self.peak is not None:
            made["speed/mfu"] = self.flops / seconds / self.peak
        return made


def peak(run: Run) -> float | None:
    """FLOP/s of this process' device in the run's precision: --peak-tflops, or what is known of its name; None if nothing is."""
    if run.config.peak_tflops is not None:
        return run.config.peak_tflops * 1e12
    if not run.device.startswith("cuda") or run.config.precision == "fp32":
        return None
    name = torch.cuda.get_device_name(run.device)
    return next((tflops * 1e12 for part, tflops in PEAKS.items() if part in name), None)


def counted(run: Run, train_state: train.TrainState, batch: Batch, work: Work) -> Work:
    """`work` with its FLOPs, where there is a peak to hold them against."""
    return work if work.peak is None else replace(work, flops=of_step(run, train_state, batch))


def of_step(run: Run, train_state: train.TrainState, batch: Batch) -> float:
    """FLOPs of a step of this process: three times those of an eager forward pass of `batch`, one of its microbatches.

    As MFU is defined: what the model needs, not what is computed again to save memory. Parts that are frozen count as if
    they were trained.
    """
    loss = partial(run.task.loss, train=True)  # of this process alone: the others do not count
    with torch.no_grad():
        forward = flops.count(lambda: loss(train_state.params, train_state.state, batch, train_state.key))
    return float(FORWARDS * forward * run.config.accumulate)
