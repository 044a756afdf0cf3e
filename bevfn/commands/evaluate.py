"""`bevfn eval`: nuScenes scores of a checkpoint by the official devkit, T4 data's by the T4 metric, or a submission for the
test split. Its flags; the work is `scoring`'s, which imports what help need not wait for."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from bevfn import catalogue
from bevfn.choices import Augmented, Backend, Experiment, Precision, one_of


def evaluate(
    experiment: Positional[Experiment],
    *,
    checkpoint: Path,
    model: Annotated[str | None, one_of(catalogue.MODELS)] = None,
    data_root: Path | None = None,
    version: str | None = None,
    split: str | None = None,
    metric: Literal["nuscenes", "t4"] | None = None,
    out: Path | None = None,
    precision: Precision | None = None,
    against: Precision | None = None,
    tta: Augmented | None = None,
    published_sweeps: bool | None = None,
    intensity: bool | None = None,
    fuser_kernel: Literal[3, 5] | None = None,
    backend: Backend | None = None,
    device: str | None = None,
    batch_size: int = 1,
    workers: int = 4,
    point_capacity: int | None = None,
    voxel_capacity: int | None = None,
    site_capacity: tuple[int, ...] | None = None,
) -> int:
    """Run a checkpoint over a split and score it with the nuScenes devkit, T4 data with the T4 metric too.

    Writes results_nusc.json (results_t4.json), metrics.json, summary.md, pictures and report.html. The test split has no
    annotations: it gets the results file alone, and its zip for the evaluation server.

    Args:
        experiment: the recipe
        checkpoint: a run's checkpoint folder (its config.json is used), the run's own folder or RUN/best for its best, or a
            file of `bevfn checkpoint import`
        model: of the experiment, for an imported file; by default the run's, or the recipe's first
        data_root: nuScenes root; by default the run's
        version: of the root, such as v1.0-mini or v1.0-test; by default the run's
        split: val, mini_val, train, test, ..., or one of the version's splits.json; by default the run's evaluation split
        metric: what scores; by default the data set's own
        out: folder for the results; by default a new one, evaluations/<checkpoint>_<split>[_<number>] of the run; that of an
            evaluation which the run made itself is refused
        precision: by default the run's
        against: run in this precision too, and tell how far the boxes are apart (apart.json); exit code 1 if by more than
            docs/training.md states
        tta: test-time augmentation: every key frame also mirrored (flip: 4 passes), or mirrored and scaled by 0.95 and 1.05
            (flip-scale: 12), boxes merged by suppression within each class; published figures are without
        published_sweeps: of BEVFusion: sweeps move as the published weights were trained (True), or right (False), for weights
            that were trained so; by default the run's, or as published
        intensity: of awml-lidar: its weights read the points' intensity; by default the run's, of an imported file what its
            shapes say
        fuser_kernel: of awml-camera-lidar: 3 of AWML's releases up to 2.0; by default as intensity
        backend: what compiles the forward pass; by default the run's --eval-backend
        device: torch device; by default the run's if it is here, else auto: an NPU, a CUDA device or the CPU, the first that there is
        batch_size: key frames at a time
        workers: processes that read; 0: none
        point_capacity: room for the points of a key frame, for a LiDAR that is denser than the run's; this and the next
            two are by default the run's, and what does not fit is reported
        voxel_capacity: voxels of a key frame
        site_capacity: active sites of a key frame at each level of the sparse encoder
    """
    asked = {name: value for name, value in locals().items() if name not in ("experiment", "checkpoint")}
    from bevfn.commands import scoring

    return scoring.evaluate(experiment, checkpoint, asked)
