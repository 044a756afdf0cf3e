"""BEVFusion (Liu et al. 2022, arXiv 2205.13542) on nuScenes key frames: LiDAR-camera, LiDAR-only, camera-only.

Published (nuScenes val, mmdetection3d): LiDAR-only 69.6 NDS, 64.9 mAP; LiDAR-camera 71.4 NDS, 68.6 mAP.

    python -m bevfn.experiments.bevfusion --precision fp16 --data frame --data-root ../shared/nuscenes_frame
    python -m bevfn.experiments.bevfusion --scale mini                       # a generated frame, a minute on a laptop

Trains on one key frame through one compiled step, decodes it, prints recall of the annotated boxes and draws it.
(Data sets, evaluation with the devkit and many devices: issue PIPELINE.)
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from bevfn import checkpoint, evaluate, host, optim, report, train, tree, upstream, view
from bevfn import compile as compilation
from bevfn.data import batch as batches
from bevfn.data import frame, synthetic
from bevfn.files import write_atomically
from bevfn.models import bevfusion
from bevfn.precision import Policy

MODELS = {
    "lidar-camera": bevfusion.lidar_camera, "lidar": bevfusion.lidar_only, "camera": bevfusion.camera_only,
}  # fmt: skip
# A key frame has 34,688 points (ten sweeps about 300,000), 17,509 voxels and at most 29,374 active sites at a level.
FRAME_VOXELS = (20_480, 20_480)
FRAME_SITES = (34_816, 25_600, 13_312, 11_264)


@dataclass(frozen=True)
class Config:
    """One key frame's training run."""

    modality: Literal["lidar-camera", "lidar", "camera"] = "lidar-camera"
    """sensors of the model"""
    scale: Literal["published", "mini"] = "published"
    """published: every size as in the paper; mini: the same code at a size for demos and CI"""
    data: Literal["frame", "generated"] | None = None
    """frame: a folder with frame.json (--data-root); generated: a frame that bevfn draws. Default: frame if there is a
    --data-root, else generated"""
    data_root: Path | None = None
    """folder of the frame, such as ../shared/nuscenes_frame"""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """fp16 scales the loss dynamically, in the graph"""
    backend: Literal["inductor", "aot_eager", "eager"] = "inductor"
    """what compiles the train step"""
    device: str = "cpu"
    """torch device: cpu, cuda, cuda:1"""
    steps: int = 40
    """optimizer steps; learning rate and beta1 run through the whole published schedule in that many"""
    batch_size: int = 1
    """copies of the frame in a batch"""
    lr: float | None = 1e-3
    """peak learning rate; None: the recipe's (1e-3 LiDAR-only, 2e-4 with cameras), made for 20 and 6 epochs"""
    published_beta1: bool = True
    """the recipe's beta1, which ends at 1.0 because mmengine takes a ratio for a value; False: 0.9 -> 0.8 -> 0.9"""
    norm_momentum: float | None = 0.1
    """momentum of the BEV and sparse batch norms; None: the recipe's 0.01, whose statistics need hundreds of steps"""
    pretrained: tuple[Path, ...] = ()
    """files of `bevfn checkpoint import` or checkpoint folders of a run: a detector, or a LiDAR-only detector and a Swin,
    as the published LiDAR-camera recipe starts"""
    score_threshold: float = 0.1
    """detections below it are not counted or drawn"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0: only at the end"""
    run_dir: Path = Path("runs/bevfusion")
    """metrics.jsonl, tensorboard/, checkpoints/, pictures, summary.json"""
    seed: int = 0
    """of parameters and dropout"""

    def __post_init__(self) -> None:
        if self.data == "frame" and self.data_root is None:
            raise ValueError(
                "--data frame needs --data-root, a folder with frame.json such as ../shared/nuscenes_frame"
            )
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")


# ----------------------------------------------------------------------------------------------------- model and data


def model_config(config: Config) -> bevfusion.Config:
    """The model at the chosen scale, with the static capacities of one key frame."""
    model = MODELS[config.modality]()
    if config.scale == "mini":
        model = bevfusion.mini(model)
    elif model.lidar is not None:
        encoder = replace(model.lidar.encoder, capacities=FRAME_SITES)
        model = replace(
            model, lidar=replace(model.lidar, encoder=encoder), voxels=replace(model.voxels, max_voxels=FRAME_VOXELS)
        )
    if config.norm_momentum is not None:
        fast = {"norm_momentum": config.norm_momentum}
        model = replace(model, backbone=replace(model.backbone, **fast), neck=replace(model.neck, **fast))
        if model.lidar is not None:
            model = replace(model, lidar=replace(model.lidar, encoder=replace(model.lidar.encoder, **fast)))
    return model


@contextlib.contextmanager
def frame_folder(config: Config) -> Iterator[Path]:
    """The frame to train on; a generated one lives as long as the run."""
    if config.data_root is not None and config.data != "generated":
        yield config.data_root
        return
    with tempfile.TemporaryDirectory(prefix="bevfn-frame-") as folder:
        yield synthetic.write_frame(Path(folder), seed=config.seed)


def load(config: Config, model: bevfusion.Config, folder: Path) -> tuple[frame.Sample, batches.Batch, dict[str, int]]:
    """The frame, the batch on the device, and counters of what did not fit."""
    reading = frame.Config(cameras=model.camera is not None)
    if model.camera is not None:
        H, W = model.camera.view.image_size
        reading = replace(reading, image_size=(H, W), resize=reading.resize * H / reading.image_size[0])
    sample = frame.load(folder, config=reading)
    batch, counts = batches.collate([sample] * config.batch_size, capacities=reading.capacities)
    batch.validate()
    return sample, batch.to(config.device), counts


def recipe(config: Config) -> optim.Config:
    """The published optimizer, its schedule stretched over `steps` (LiDAR-only 20 epochs, otherwise 6)."""
    steps = config.steps
    if config.modality == "lidar":
        peak, turn = config.lr or 1e-3, max(1, round(0.4 * steps))
        phases = (optim.Phase(turn, peak), optim.Phase(max(steps, turn + 1), peak * 1e-5))
        lr = optim.Schedule(peak / 10, phases)
    else:
        peak = config.lr or 2e-4
        lr = optim.Schedule(peak, (optim.Phase(steps, peak * 1e-4),), warmup_steps=min(500, steps // 10))
    turn = max(1, round(0.4 * steps))
    beta1 = optim.beta1_cycle(turn, max(steps, turn + 1), published=config.published_beta1)
    return optim.Config(lr=lr, beta1=beta1, weight_decay=0.01, clip_norm=35.0)


def initial(config: Config, model: bevfusion.Config) -> tuple[dict, dict]:
    """Parameters and statistics from the seed, then from the pretrained files."""
    params, state = bevfusion.init(model, config.seed)
    if config.pretrained:
        loaded = {str(path): _read_weights(path) for path in config.pretrained}
        anywhere = tuple(params)  # a recipe starts the rest from scratch; the report says what
        params, state, merged = upstream.load_into(params, state, loaded, allow_missing=anywhere)
        print(merged.text())
    return tree.to(params, config.device), tree.to(state, config.device)


def _read_weights(path: Path) -> tuple[dict, dict]:
    """(params, state) of an imported file, or of a training checkpoint's folder."""
    if not path.is_dir():
        imported = upstream.read_imported(path)
        return imported.params, imported.state
    tensors = checkpoint.load_tensors(path / checkpoint.TENSORS)
    trees = (
        {name.removeprefix(f"{part}."): leaf for name, leaf in tensors.items() if name.startswith(f"{part}.")}
        for part in ("params", "state")
    )
    params, state = (upstream.nest(flat) for flat in trees)
    return params, state


# ------------------------------------------------------------------------------------------------------------ the step


def build(config: Config, model: bevfusion.Config) -> tuple[train.TrainState, Callable]:
    """(train state, compiled step(train_state, batch) -> (train_state, metrics)); the old state's buffers are donated."""
    policy = Policy.of(config.precision)
    optimizer = recipe(config)
    loss = partial(bevfusion.loss, config=model, policy=policy)
    params, state = initial(config, model)
    train_state = train.init(params, state, optimizer, precision=policy, seed=config.seed)
    step = train.make_step(loss, optimizer, precision=policy)
    return tree.to(train_state, config.device), compilation.step(step, backend=config.backend)


def step_of(config: Config) -> Callable[[], Any]:
    """One train step on the frame as a function without arguments (benchmarks)."""
    model = model_config(config)
    with frame_folder(config) as folder:
        _, batch, _ = load(config, model, folder)
    train_state, step = build(config, model)

    def run() -> Any:
        nonlocal train_state
        train_state, metrics = step(train_state, batch)
        return metrics

    return run


def forward_of(config: Config) -> Callable[[], Any]:
    """One forward pass with decoding as a function without arguments (benchmarks)."""
    model = model_config(config)
    with frame_folder(config) as folder:
        _, batch, _ = load(config, model, folder)
    params, state = initial(config, model)
    predict = partial(bevfusion.predict, config=model, policy=Policy.of(config.precision))
    compiled = compilation.function(predict, backend=config.backend)

    def run() -> Any:
        with torch.no_grad():
            return compiled(params, state, batch)

    return run


# ---------------------------------------------------------------------------------------------------------- the run


def main(config: Config) -> dict:
    """Trains, evaluates, draws; returns and writes the summary."""
    started = time.perf_counter()
    host.keep_freed_memory()
    model = model_config(config)
    with frame_folder(config) as folder:
        if config.data_root is None:
            print("no --data-root: training on a frame that bevfn draws (see --data)")
        sample, batch, counts = load(config, model, folder)
        train_state, step = build(config, model)
        print(describe(config, train_state, sample))
        before = detect(config, model, train_state, batch)
        recall_before = score(config, sample, before)
        losses = fit(config, train_state, step, batch, counts)
        train_state = losses.pop("train_state")
        after = detect(config, model, train_state, batch)
        recall = score(config, sample, after)
        print(recall.table())
        view.draw(sample, *after, config.run_dir / "detections.png", score_threshold=config.score_threshold)
    summary = {
        **losses, "recall_before": recall_before.total.recall, "recall_after": recall.total.recall,
        "recall_by_class": {row.name: row.recall for row in recall.rows},
        "minutes": (time.perf_counter() - started) / 60,
        "peak_memory_gb": {k: v / 2**30 for k, v in report.peak_memory().items()},
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
    }  # fmt: skip
    write_atomically(config.run_dir / "summary.json", json.dumps(summary, indent=1).encode())
    print(
        f"loss {summary['first_loss']:.3f} -> {summary['last_loss']:.3f}, recall {recall_before.total.recall:.3f} -> "
        f"{recall.total.recall:.3f}, {summary['minutes']:.1f} minutes; picture and metrics in {config.run_dir}"
    )
    return summary


def describe(config: Config, train_state: train.TrainState, sample: frame.Sample) -> str:
    """One line about what is about to be trained."""
    return (
        f"BEVFusion {config.modality}, {config.scale} size, {tree.num_elements(train_state.params) / 1e6:.1f} M parameters, "
        f"{config.precision} on {config.device} through {config.backend}; frame {sample.token}: {len(sample.points)} "
        f"points, {len(sample.boxes)} boxes"
    )


def fit(config: Config, train_state: train.TrainState, step: Callable, batch: batches.Batch, counts: dict) -> dict:
    """The loop: the only device-to-host copy of a step is its metrics."""
    first = last = float("nan")
    with report.Reporter(config.run_dir, config.steps) as reporter:
        for i in range(1, config.steps + 1):
            started = time.perf_counter()
            train_state, metrics = step(train_state, batch)
            values = {name: float(value) for name, value in metrics.items()}
            reporter.log(i, {**values, **counts}, time.perf_counter() - started)
            if values["skipped"] and config.precision != "fp16":
                bad = train.first_nonfinite({"params": train_state.params, "state": train_state.state})
                raise ValueError(
                    f"step {i}: gradients are not finite; first such tensor: {bad or 'a gradient'}; lower --lr"
                )
            first, last = (values["loss/total"] if i == 1 else first), values["loss/total"]
            if i == config.steps or (config.checkpoint_every and i % config.checkpoint_every == 0):
                checkpoint.save_step(config.run_dir / "checkpoints" / f"step_{i:08d}", train_state, {"step": i})
    return {"train_state": train_state, "first_loss": first, "last_loss": last}


def detect(config: Config, model: bevfusion.Config, train_state: train.TrainState, batch: batches.Batch) -> tuple:
    """(boxes [n 9], scores [n], labels [n]) of the first sample, numpy."""
    with torch.no_grad():
        found = bevfusion.predict(
            train_state.params, train_state.state, batch, config=model, policy=Policy.of(config.precision)
        )
    keep = found["valid"][0]
    return tuple(
        found[k][0][keep].float().cpu().numpy() if k != "labels" else found[k][0][keep].cpu().numpy()
        for k in ("boxes", "scores", "labels")
    )


def score(config: Config, sample: frame.Sample, found: tuple) -> evaluate.Recall:
    """Recall of the frame's annotations by class."""
    return evaluate.recall(
        *found, sample.boxes, sample.labels, class_names=sample.class_names, score_threshold=config.score_threshold
    )


def cli() -> None:
    """Parses the command line; a user's mistake ends in one sentence and exit code 2."""
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"bevfn: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli()
