"""`bevfn bench ...`: speed and memory as ratios, against peers and the machine's limits in the same run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bevfn import waiting
from bevfn.choices import Experiment, ModelName, Precision, Scale
from bevfn.files import check_json, to_json, write_atomically

Json = Annotated[Path | None, tyro.conf.arg(name="json")]


def ops(*, frame: Path | None = None, device: str = "cpu", threads: int = 0, json_file: Json = None) -> None:
    """Sparse convolution against spconv, deformable convolution against torchvision (`pip install -e '.[bench]'`),
    both against plain torch and the machine's GEMM peak; voxel pooling against its copy bandwidth; deformable
    attention against plain torch and torch's grid_sample. On a CUDA device also voxelization, neighbour tables and
    assignment against plain torch, and spconv's CUDA build is the peer (`pip install -e '.[bench-cuda]'`).

    Args:
        frame: folder of a real key frame, whose points and cameras count; what stands for one without it
        device: torch device, cpu or a CUDA device; auto: a CUDA device where there is one, else the CPU
        threads: CPU threads; 0: all cores (sparse convolution is measured with one)
        json_file: also write the figures there, with the machine named
    """
    from bevfn import distributed
    from bevfn.bench import ops

    if device == distributed.AUTO:
        device = "cuda" if distributed.is_there("cuda") else "cpu"
    distributed.check_device(device)
    if device.startswith("npu"):
        raise ValueError(f"bench ops measures a CPU or a CUDA device, not {device}; use --device cpu")
    _threads(threads)
    _report("ops", partial(ops.measure, frame, device), json_file, device)


def step(
    *,
    model: ModelName = "bevfusion-lidar-camera",
    frame: Path | None = None,
    scale: Scale = "published",
    precision: Precision = "fp32",
    batch_size: int = 1,
    device: str = "auto",
    threads: int = 0,
    repeats: int = 3,
    checkpoint_activations: bool = False,
    only: tuple[Literal["forward/eager", "forward/inductor", "train/eager", "train/inductor"], ...] = (),
    json_file: Json = None,
) -> None:
    """Forward pass and train step on one key frame, eager and compiled: seconds, share of the GEMM peak, peak memory.

    Args:
        model: what is measured
        frame: folder of a real key frame; a generated one without it
        scale: mini is the size of demos and CI
        precision: of the step
        batch_size: copies of the frame in a batch
        device: torch device; auto: an NPU, else a CUDA device, else the CPU
        threads: CPU threads; 0: all cores
        repeats: timed repetitions, of which the best counts
        checkpoint_activations: blocks are computed again for the gradient
        only: which of the four are measured; by default all
        json_file: also write the figures there, with the machine named
    """
    from bevfn import distributed
    from bevfn.bench import step

    distributed.check_device(device)
    device = distributed.chosen(device)
    sizes = precision, batch_size, device, _threads(threads), repeats, scale, checkpoint_activations
    setting = step.Setting(model, frame, *sizes, only or step.VARIANTS)
    _report("step", partial(step.measure, setting), json_file, device)


def views(*, frame: Path | None = None, threads: int = 0, repeats: int = 5, json_file: Json = None) -> None:
    """BEVDepth's pooling and MatrixVT's view transform against the textbook's outer product: time and peak memory.

    Args:
        frame: folder of a real key frame, whose cameras count; a generated one without it
        threads: CPU threads; 0: all cores
        repeats: timed repetitions, of which the best counts
        json_file: also write the figures there, with the machine named
    """
    from bevfn.bench import views

    threads = _threads(threads)
    _report("views", partial(views.measure, frame, repeats=repeats, threads=threads), json_file)


def data(
    *,
    frame: Path | None = None,
    t4: bool = False,
    t4_root: Path | None = None,
    samples: int = 30,
    json_file: Json = None,
) -> None:
    """Training samples per second and core of both BEVFusion readings, and where the time goes; or T4's clouds.

    Args:
        frame: folder of a real key frame; a generated one without it
        t4: clouds of T4 data per second and core instead, against reading their bytes, and samples of awml-lidar
        t4_root: a T4 data set, whose first clouds are read; generated ones of 160,000 points without it
        samples: how many are read
        json_file: also write the figures there, with the machine named
    """
    from bevfn.bench import data

    if (t4 or t4_root is not None) and frame is not None:
        raise ValueError("--frame is of nuScenes' readings; leave it out, or --t4")
    if t4 or t4_root is not None:
        return _report("data_t4", partial(data.t4, root=t4_root, samples=samples), json_file)
    _report("data", partial(data.data, frame=frame, samples=samples), json_file)


def world(*, scenes: int = 10, json_file: Json = None) -> None:
    """Seconds and megabytes of a synthetic world (`bevfn data synth`), written to the current folder and deleted.

    Args:
        scenes: how many
        json_file: also write the figures there, with the machine named
    """
    from bevfn.bench import data

    _report("world", partial(data.world, scenes=scenes), json_file)


def checkpoint(*, folder: Path = Path("runs"), repeats: int = 3, json_file: Json = None) -> None:
    """Saving, verifying and loading the published LiDAR-camera detector against plain writing and reading.

    Args:
        folder: on the disk that is measured
        repeats: timed repetitions, of which the median counts
        json_file: also write the figures there, with the machine named
    """
    from bevfn.bench import checkpoint

    _report("checkpoint", partial(checkpoint.measure, folder, repeats=repeats), json_file)


def startup(
    *,
    experiment: Experiment = "bevfusion_lidar",
    frame: Path | None = None,
    json_file: Json = None,
) -> None:
    """Seconds from a recipe's command to its first step at the published size: empty caches, full caches, eager.

    Args:
        experiment: the recipe
        frame: folder of a real key frame; a generated one without it
        json_file: also write the figures there, with the machine named
    """
    from bevfn.bench import startup

    _report("startup", partial(startup.measure, frame, experiment=experiment), json_file)


def deploy(
    *,
    model: ModelName = "bevfusion-lidar",
    checkpoint: Path | None = None,
    frame: Path | None = None,
    scale: Scale = "published",
    threads: int = 1,
    repeats: int = 5,
    only: tuple[Literal["eager", "inductor", "aoti", "onnxruntime", "onnxruntime-voxels", "openvino-voxels"], ...] = (),
    voxel_capacity: int | None = None,
    site_capacity: tuple[int, ...] | None = None,
    json_file: Json = None,
) -> None:
    """A detector in the runtimes that `bevfn export` writes for, which take turns: seconds per frame, memory, files, export.

    Args:
        model: what is exported
        checkpoint: its weights, as of `bevfn predict`; drawn ones without it, whose boxes say nothing
        frame: folder of a real key frame; a generated one without it
        scale: mini is the size of demos and CI
        threads: CPU threads of every runtime
        repeats: timed rounds, of which the median counts
        only: which are measured; by default all that are installed
        voxel_capacity: room for voxels, and the next for sites, as of `bevfn export`: what files are padded to
        site_capacity: active sites at each level of the sparse encoder
        json_file: also write the figures there, with the machine named
    """
    from bevfn.export import bench as deploy

    threads = _threads(threads)
    given = {"voxel_capacity": voxel_capacity, "site_capacity": site_capacity}
    capacities = {name: value for name, value in given.items() if value is not None}
    setting = deploy.Setting(model, checkpoint, frame, scale, threads, repeats, only or deploy.RUNTIMES, capacities)
    _report("deploy", partial(deploy.measure, setting), json_file)


def scale(
    *,
    model: ModelName = "bevfusion-lidar-camera",
    step_seconds: float = 0.976,
    batch_size: int = 4,
    devices: tuple[int, ...] = (8, 16, 256),
    fabric: Literal["a2", "a100", "h100"] = "a2",
    buckets: int = 8,
    workers: int = 8,
    samples: int = 30,
    spread_of: Path | None = None,
    stalls: float = 0.0,
    stall_seconds: float = 1.0,
    steps: int = 2000,
    seed: int = 0,
    disk: float = 1e9,
    json_file: Json = None,
) -> None:
    """On paper and by simulation, what many devices reach: all-reduce, stragglers, input, evaluation, checkpoints. Nothing of a
    device is measured.

    Args:
        model: its gradient is what is summed
        step_seconds: of one device, without communication and input; 0.976 is the published 4.10 samples/s at batch 4
        batch_size: of one device
        devices: numbers of devices
        fabric: how they reach each other: Atlas 800T A2, DGX A100, DGX H100
        buckets: parts of the gradient that are summed during backward, beside today's one after it
        workers: processes of one device that read
        samples: training samples that are read now, whose seconds are drawn from
        spread_of: run folder whose steps say how much steps differ; none: not at all
        stalls: share of samples that wait for a disk or a network too
        stall_seconds: how long those wait
        steps: simulated ones
        seed: of what is drawn
        disk: bytes a second at which checkpoints are written
        json_file: also write the figures there, with the machine named
    """
    from bevfn.bench import scale

    setting = scale.Setting(
        model,
        step_seconds,
        batch_size,
        devices,
        fabric,
        buckets,
        workers,
        samples,
        spread_of,
        stalls,
        stall_seconds,
        steps,
        seed,
        disk,
    )
    _report("scale", partial(scale.measure, setting), json_file)


def cuda(*, only: str = "", json_file: Json = None) -> None:
    """The CUDA kernels compiled for an A100 and an H100, no GPU needed: registers, shared memory, stack, tensor cores.

    Args:
        only: of the kernels' cases, those whose name contains this; all by default
        json_file: also write the figures there, with the machine named
    """
    from bevfn.bench import cuda

    _report("cuda", partial(cuda.measure, only), json_file)


def list_() -> None:
    """Which file of experiments/results/ was made when, of which commit, and by which command. Also: `bevfn bench --list`."""
    from bevfn import provenance

    print(provenance.listing())


def _threads(wanted: int) -> int:
    import torch

    torch.set_num_threads(wanted or torch.get_num_threads())
    return torch.get_num_threads()


def _report(benchmark: str, measure: Callable[[], dict], json_file: Path | None, device: str = "cpu") -> None:
    """Measures, prints and keeps the figures with the machine and with what to type to measure them again."""
    from bevfn import provenance

    check_json(json_file)
    with waiting.told(f"measuring {benchmark}", waiting.aside):
        figures = measure()
    result = {**provenance.head(device), "benchmark": benchmark, "figures": figures}
    text = to_json(result, indent=1)
    print(text.decode())
    if json_file is not None:
        write_atomically(json_file, text)
