"""`bevfn bench ...`: speed and memory as ratios, against peers and the machine's limits in the same run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from bevfn import provenance, recipes
from bevfn.files import check_json, to_json, write_atomically
from bevfn.precision import Precision
from bevfn.training import command_line

Json = Annotated[Path | None, tyro.conf.arg(name="json")]


def ops(*, threads: int = 0, json_file: Json = None) -> None:
    """Sparse convolution against spconv, deformable convolution against torchvision (`pip install 'bevfn[bench]'`),
    both against plain torch and the machine's GEMM peak; voxel pooling against its copy bandwidth; deformable
    attention against plain torch and torch's grid_sample.

    Args:
        threads: CPU threads; 0: all cores (sparse convolution is measured with one)
        json_file: also write the figures there, with the machine named
    """
    from bevfn.bench import ops

    _threads(threads)
    _report("ops", ops.measure, json_file)


def step(
    *,
    model: recipes.ModelName = "bevfusion-lidar-camera",
    frame: Path | None = None,
    scale: command_line.Scale = "published",
    precision: Precision = "fp32",
    batch_size: int = 1,
    device: str = "cpu",
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
        device: torch device
        threads: CPU threads; 0: all cores
        repeats: timed repetitions, of which the median counts
        checkpoint_activations: blocks are computed again for the gradient
        only: which of the four are measured; by default all
        json_file: also write the figures there, with the machine named
    """
    from bevfn.bench import step

    sizes = precision, batch_size, device, _threads(threads), repeats, scale, checkpoint_activations
    setting = step.Setting(model, frame, *sizes, only or step.VARIANTS)
    _report("step", partial(step.measure, setting), json_file, device)


def views(*, frame: Path | None = None, threads: int = 0, repeats: int = 5, json_file: Json = None) -> None:
    """BEVDepth's pooling and MatrixVT's view transform against the textbook's outer product: time and peak memory.

    Args:
        frame: folder of a real key frame, whose cameras count; a generated one without it
        threads: CPU threads; 0: all cores
        repeats: timed repetitions, of which the median counts
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
    experiment: recipes.Experiment = "bevfusion_lidar",
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
    print(provenance.listing())


def _threads(wanted: int) -> int:
    torch.set_num_threads(wanted or torch.get_num_threads())
    return torch.get_num_threads()


def _report(benchmark: str, measure: Callable[[], dict], json_file: Path | None, device: str = "cpu") -> None:
    """Measures, prints and keeps the figures with the machine and with what to type to measure them again."""
    check_json(json_file)
    figures = measure()
    result = {**provenance.head(device), "benchmark": benchmark, "figures": figures}
    text = to_json(result, indent=1)
    print(text.decode())
    if json_file is not None:
        write_atomically(json_file, text)
