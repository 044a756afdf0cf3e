"""What many devices would reach, on paper and by simulation: bytes, all-reduce, stragglers, input, evaluation, checkpoints.

    bevfn bench scale --step-seconds 0.976 --batch-size 4 --spread-of runs/bevfusion

Nothing here runs on a device. The step's seconds are given; how much steps differ is drawn from the steps of a run, and what a
sample takes from samples that are read now. Devices are alike and independent, a step ends when the slowest has ended.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bevfn import catalogue
from bevfn.bench import data
from bevfn.metrics import METRICS_FILE, read_metrics

BACKWARD = 2 / 3  # share of a step's seconds in which gradients become ready: a backward pass is two forward passes
WARM_UP = 10  # steps of a run that are left out of its distribution: the first ones compile
LEAST = 30  # steps that a distribution needs
VAL_FRAMES = 6019  # of nuScenes' validation split


@dataclass(frozen=True)
class Fabric:
    """How devices reach each other, one way, per device."""

    per_node: int
    inside: float
    """bytes a second to all others of the node together"""
    link: float
    """bytes a second to one of them, which a ring is limited by"""
    between: float
    """bytes a second to another node"""
    source: str
    hop: float = 20e-6
    """seconds of one hop (assumed)"""


FABRICS: dict[str, Fabric] = {
    "a2": Fabric(
        8, 7 * 19.4e9, 19.4e9, 22.6e9, "HCCS full mesh and 200 Gbit/s RoCE, measured: HIXL, A2_benchmark_performance.md"
    ),
    "a100": Fabric(
        8, 300e9, 300e9, 25e9, "NVLink 3 through NVSwitch, one 200 Gbit/s card a GPU: DGX A100's data sheet"
    ),
    "h100": Fabric(
        8, 450e9, 450e9, 50e9, "NVLink 4 through NVSwitch, one 400 Gbit/s card a GPU: DGX H100's data sheet"
    ),
}


def ring(size: float, devices: int, fabric: Fabric) -> float:
    """Seconds of one all-reduce of `size` bytes in one ring over all devices, as fast as its slowest link."""
    if devices == 1:
        return 0.0
    slowest = fabric.link if devices <= fabric.per_node else min(fabric.link, fabric.between)
    return 2 * (devices - 1) * (size / devices / slowest + fabric.hop)


def hierarchical(size: float, devices: int, fabric: Fabric) -> float:
    """Seconds of one all-reduce in two levels: shares are summed inside every node, each then goes around between the nodes
    (all devices of a node at once, each with its own card), and the node collects them again."""
    inside = min(devices, fabric.per_node)
    nodes = -(-devices // fabric.per_node)
    seconds = 0.0
    if inside > 1:
        seconds += 2 * ((inside - 1) / inside * size / fabric.inside + fabric.hop)
    if nodes > 1:
        seconds += 2 * (nodes - 1) * (size / inside / nodes / fabric.between + fabric.hop)
    return seconds


def exposed(size: float, buckets: int, devices: int, fabric: Fabric, backward_seconds: float) -> float:
    """Seconds of communication that are left after backward, where the gradient is summed in `buckets` equal parts, each as soon
    as it is ready (evenly over backward), one after the other. One bucket: all of it, as in today's step."""
    each = hierarchical(size / buckets, devices, fabric)
    done = 0.0
    for bucket in range(1, buckets + 1):
        done = max(done, bucket / buckets * backward_seconds) + each
    return done - backward_seconds


@dataclass(frozen=True)
class Input:
    """Reading of one device: `loader.Config`'s workers and prefetch, and how long samples take, to draw from."""

    samples: np.ndarray
    """[n] seconds of one worker"""
    workers: int
    prefetch: int
    stalls: float = 0.0
    """share of samples that take `stall_seconds` more: a disk, a network"""
    stall_seconds: float = 0.0


def simulate(
    devices: int, compute: np.ndarray, reading: Input, *, batch_size: int, communication: float, steps: int, seed: int
) -> dict[str, float]:
    """Mean seconds of a step in which `devices` wait for each other, and what they waited for.

    compute: [n] seconds of a step without input and communication, to draw from. Worker w of W makes batches w, w + W, ... and
    begins one when it has made the one before it and the batch of W x prefetch before it has been taken (torch's DataLoader).
    """
    random = np.random.default_rng(seed)
    workers, ahead = reading.workers, reading.workers * reading.prefetch
    own = random.choice(compute, (steps, devices))
    made, taken = np.zeros((steps, devices)), np.zeros((steps, devices))
    now, stalled = np.zeros(devices), 0.0
    for step in range(steps):
        begun = made[step - workers] if step >= workers else np.zeros(devices)
        if step >= ahead:
            begun = np.maximum(begun, taken[step - ahead])
        made[step] = begun + _batches(random, reading, devices, batch_size)
        taken[step] = np.maximum(now, made[step])
        stalled += float((taken[step] - now).max()) if step >= ahead else 0.0
        now = np.full(devices, (taken[step] + own[step]).max() + communication)
    counted = slice(min(ahead, steps // 2), None)  # what was read ahead before the first step is not the steady state
    ends = taken[counted].max(axis=1)
    return {
        "step_seconds": float((ends[-1] - ends[0]) / (len(ends) - 1)),
        "slowest_compute_seconds": float(own[counted].max(axis=1).mean()),
        "waited_for_input_seconds": stalled / max(steps - ahead, 1),
    }


def _batches(random: np.random.Generator, reading: Input, devices: int, batch_size: int) -> np.ndarray:
    """[devices] seconds that a worker takes for a batch."""
    drawn = random.choice(reading.samples, (devices, batch_size))
    drawn = drawn + reading.stall_seconds * (random.random(drawn.shape) < reading.stalls)
    return drawn.sum(axis=1)


def steps_of(run: Path) -> np.ndarray:
    """[n] seconds of a run's steps over their median, without what they waited for input and without the first ones.

    Raises ValueError, one sentence, for a folder without enough steps.
    """
    rows = read_metrics(run)[WARM_UP:] if (run / METRICS_FILE).is_file() else []
    seconds = np.array([row["seconds"] - row.get("seconds/waited", 0.0) for row in rows])
    if len(seconds) < LEAST:
        raise ValueError(
            f"{run / METRICS_FILE} has {len(seconds)} steps after the first {WARM_UP}, and a distribution needs {LEAST}; "
            "give --spread-of the folder of a longer run"
        )
    return seconds / np.median(seconds)


@dataclass(frozen=True)
class Setting:
    """What is asked; `bevfn bench scale` has a flag for each."""

    model: str
    step_seconds: float
    batch_size: int
    devices: tuple[int, ...]
    fabric: str
    buckets: int
    workers: int
    samples: int
    spread_of: Path | None
    stalls: float
    stall_seconds: float
    steps: int
    seed: int
    disk: float
    """bytes a second"""


def measure(setting: Setting) -> dict:
    """Figures per number of devices; prints a table.

    Samples are those of BEVFusion's readings of a generated key frame: of LiDAR-only for bevfusion-lidar, else with six cameras.
    """
    fabric = FABRICS[setting.fabric]
    size = 4e6 * catalogue.MODELS[setting.model].parameters  # one float32 vector
    spread = np.ones(1) if setting.spread_of is None else steps_of(setting.spread_of)
    samples = data.sample_seconds("lidar" if setting.model == "bevfusion-lidar" else "lidar-camera", setting.samples)
    reading = Input(samples, setting.workers, 2, setting.stalls, setting.stall_seconds)
    figures: dict = {
        "model": setting.model,
        "fabric": fabric.source,
        "gradient_bytes": size,
        "given_step_seconds": setting.step_seconds,
        "batch_size": setting.batch_size,
        "steps_spread": {"of": str(setting.spread_of), "deviation": float(spread.std()), "worst": float(spread.max())},
        "sample_seconds": {"mean": float(samples.mean()), "deviation": float(samples.std()), "read": len(samples)},
        "checkpoint_seconds": 3 * size / setting.disk,  # parameters and two moments, written by one process
    }
    run = partial(simulate, compute=setting.step_seconds * spread, batch_size=setting.batch_size, steps=setting.steps)
    alone = run(1, reading=reading, communication=0.0, seed=setting.seed)["step_seconds"]
    for devices in setting.devices:
        backward = BACKWARD * setting.step_seconds
        one, many = (exposed(size, n, devices, fabric, backward) for n in (1, setting.buckets))
        found = run(devices, reading=reading, communication=one, seed=setting.seed)
        hidden = run(devices, reading=reading, communication=many, seed=setting.seed)
        figures[f"{devices} devices"] = {
            "ring_seconds": ring(size, devices, fabric),
            "two_levels_seconds": hierarchical(size, devices, fabric),
            "exposed_seconds": one,
            "exposed_in_buckets_seconds": many,
            **found,
            "efficiency": alone / found["step_seconds"],
            "efficiency_in_buckets": alone / hidden["step_seconds"],
            "samples_per_second": devices * setting.batch_size / found["step_seconds"],
            "evaluation_forward_seconds": VAL_FRAMES / devices * setting.step_seconds / 3 / setting.batch_size,
        }
    _print(figures, setting)
    return figures


def _print(figures: dict, setting: Setting) -> None:
    print(
        f"{setting.model}: {figures['gradient_bytes'] / 1e6:.1f} MB of gradient; {setting.fabric}; steps of "
        f"{1e3 * setting.step_seconds:.0f} ms that differ by {100 * figures['steps_spread']['deviation']:.1f} %"
    )
    print("devices   ring  two levels  left in buckets  slowest  for input   step  efficiency  in buckets  samples/s")
    for devices in setting.devices:
        row = figures[f"{devices} devices"]
        milliseconds = [
            1e3 * row[f"{name}_seconds"]
            for name in ("ring", "two_levels", "exposed_in_buckets", "slowest_compute", "waited_for_input", "step")
        ]
        a, b, c, d, e, f = milliseconds
        print(
            f"{devices:7d} {a:6.1f} {b:11.1f} {c:16.1f} {d:8.0f} {e:10.1f} {f:6.0f} {100 * row['efficiency']:9.1f} % "
            f"{100 * row['efficiency_in_buckets']:9.1f} % {row['samples_per_second']:10.1f}"
        )
