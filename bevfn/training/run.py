"""A training run, the same for every experiment: epochs of steps, checkpoints, evaluation, stop and resume.

An experiment says what is trained (`Task`); how long, where and from when are the flags of `Config`. Everything random
is a function of (seed, epoch, position) or in the train state, so a run is resumed from its step alone.
"""

import contextlib
import dataclasses
import functools
import math
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
import torch
import tyro

from bevfn import compile as compilation
from bevfn import distributed, exits, host, provenance, tree, upstream
from bevfn.data import loader, paste, sampling, scene, source
from bevfn.data.batch import Batch, collate
from bevfn.data.index import Index
from bevfn.data.reading import Needs, Reading
from bevfn.distributed import Replicas
from bevfn.evaluation.detect import collect, detect
from bevfn.evaluation.judge import judge, measure
from bevfn.evaluation.results import KNOWN_ATTRIBUTES
from bevfn.evaluation.score import METRICS
from bevfn.files import as_read, read_json, to_json, write_atomically
from bevfn.layers import remat
from bevfn.metrics import added
from bevfn.names import lines, sentence
from bevfn.precision import LOWEST_SCALE, Policy, Precision
from bevfn.training import checkpoint, limits, optim, origin, run_folder, signals, train
from bevfn.training.reporter import Reporter, peak_memory

RUNS = Path("runs")
SUMMARY = "summary.json"
SHOWN = 10  # key frames without files that are named one by one
PATIENCE = 5  # steps of fp16 that are skipped in a row before it is asked why
Scale = Literal["published", "mini"]
# What a resumed run may change without changing its numbers.
FREE = frozenset(
    {
        *("workers", "resume", "force", "keep", "checkpoint_every", "on_damaged", "run_dir"),
        *("eval_every", "eval_last", "eval_backend"),
    }
)


@dataclass(frozen=True)
class Config:
    """Flags that every experiment has; a recipe sets its own defaults."""

    CHOOSES: ClassVar[tuple[str, ...]] = ("model",)
    """fields by whose flags a model's defaults are found"""
    model: str = ""
    """network and recipe, a name of `bevfn.catalogue`"""
    scale: Scale = "published"
    """published: every size as in the paper; mini: the same code at a size for demos and CI"""
    precision: Precision = "fp32"
    """fp16 scales the loss dynamically, in the graph"""
    backend: compilation.Backend = "inductor"
    """what compiles the train step"""
    eval_backend: compilation.Backend = "inductor"
    """what compiles the forward pass of an evaluation"""
    device: str = "cpu"
    """torch device: cpu, cuda, cuda:1; under torchrun each process takes its own"""
    mode: Literal["full", "performance"] = "full"
    """full: all epochs, with evaluations; performance: one epoch without, and samples/s after --warm-up steps"""
    warm_up: int = 20
    """steps that performance mode does not count"""
    data_root: Path | None = None
    """a nuScenes root (the folder with v1.0-trainval/ and samples/), a T4 data set (docs/t4.md), an info file of mmdetection3d,
    or a folder with one frame.json; none: a synthetic world in runs/, made when missing"""
    version: str = "v1.0-trainval"
    """of the nuScenes root; v1.0-mini trains on mini_train. A number is the revision of a T4 data set's scenes"""
    train_split: str | None = None
    """of the version, also one of its splits.json; none: train, mini_train"""
    eval_split: str | None = None
    """of the version, also one of its splits.json, scored by its own key frames; none: val, mini_val"""
    epochs: int = 1
    """passes over the (class-balanced) training set; the schedules run through all of them"""
    steps: int | None = None
    """optimizer steps instead of epochs; the schedules run through them"""
    batch_size: int = 4
    """samples per device and microbatch"""
    box_capacity: int | None = None
    """room for the annotated boxes of a sample (none: the recipe's); what does not fit is dropped and counted"""
    checkpoint_activations: bool = False
    """blocks of the network keep only what goes in, and are computed again for the gradient: less memory, more time, the
    same numbers (bit for bit but for what a compiler that fuses operators rounds anew)"""
    accumulate: int = 1
    """microbatches per device whose gradients are averaged into one step; 8 on one device are the mathematics of 8 devices,
    rounded otherwise, so that only a run of two resumes as the other without --force"""
    drop_last: bool = False
    """an epoch ends before its last, incomplete batch; no: that one is filled up from the epoch's start"""
    recipe_batch: int = 32
    """the global batch that the published learning rate is for"""
    recipe_lr: float = 1e-3
    """published peak learning rate, for recipe_batch samples"""
    lr: float | None = None
    """peak learning rate, taken as it is; none: the recipe's, scaled by --lr-scaling"""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """how the recipe's learning rate follows the global batch (batch size x devices x accumulate) / recipe batch"""
    weight_decay: float = 0.01
    clip_norm: float = 35.0
    """global L2 norm of the gradients"""
    ema: float | None = None
    """decay of the averaged parameters that are evaluated; none: they are not averaged"""
    norm_momentum: float | None = None
    """of the batch norms that are published with 0.01, whose statistics need hundreds of steps; none: as published"""
    class_balanced: bool = False
    """CBGS: every class supplies as many key frames as the others"""
    augment: bool = True
    """images, boxes and points are moved, turned, scaled and mirrored at random"""
    sync_statistics: bool = False
    """batch norm and loss normalisers over all devices (of the published recipes BEVNeXt's stage 2 alone, see --sync-after;
    BEVDepth's, MatrixVT's and BEVNeXt's average the detection losses' normalisers alone, which happens anyway)"""
    sync_after: int = 0
    """epochs before --sync-statistics holds: at the change another step is compiled; a run that ends before it has none"""
    workers: int = 4
    """processes per device that read samples; 0: none"""
    on_damaged: Literal["stop", "skip"] = "stop"
    """a sample that cannot be read ends the run, or is replaced by the next one, named and counted; with skip a data set
    that is there in part is trained on and evaluated without the key frames that lack files, which are named first"""
    pretrained: tuple[Path, ...] = ()
    """files of `bevfn checkpoint import` or checkpoint folders of a run; later ones fill what earlier ones left"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0: one per epoch"""
    keep: int = 3
    """checkpoints kept, besides the best"""
    eval_every: int = 1
    """epochs between evaluations; 0: only after the last"""
    eval_last: int = 0
    """last epochs that are all followed by an evaluation, whatever --eval-every says"""
    eval_first: bool = False
    """evaluate the untrained model too"""
    run_dir: Path = Path("runs/run")
    """config.json, metrics.jsonl, tensorboard/, checkpoints/, evaluations/, report.html"""
    resume: bool = False
    """go on from the latest checkpoint in --run-dir. A run that SIGTERM or Ctrl-C stops saves, and exits with 143 or 130"""
    force: bool = False
    """resume although the config, the data, the processes or the code have changed"""
    seed: int = 0
    """of parameters, augmentation, data order and dropout"""

    def __post_init__(self) -> None:
        limits.check({known: getattr(self, known) for known in limits.LIMITS if hasattr(self, known)})
        if self.sync_after and not self.sync_statistics:
            raise ValueError(
                f"--sync-after {self.sync_after} is of --sync-statistics; add that, or --sync-after 0 if batch norm is to be of "
                "each device"
            )

    @property
    def world(self) -> source.World:
        """In which format the synthetic world is that stands in for no data root."""
        return "nuscenes"

    def plain(self) -> Self:
        """Without what only training needs: frames as they come, nothing moved or pasted in."""
        return replace(self, class_balanced=False, augment=False)


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    training: Index
    items: np.ndarray
    """int64 [n], places in `training`: one epoch before it is shuffled"""
    reading: Callable[[int], Reading]
    """how an epoch (0-based) reads; recipes change it towards the end"""
    evaluation: Index
    eval_reading: Reading
    database: paste.Database | None = None
    left_out: int = 0
    """key frames of the evaluation split whose files are not all there"""


Defaults = Mapping[str, Mapping[source.Kind, Config]]
"""A recipe's configs: by model, of which the first is trained where none is named, and by what lies at the data root."""


@dataclass(frozen=True)
class Plan:
    """How many steps, of how many samples."""

    steps_per_epoch: int
    total_steps: int
    batch: int
    """samples of one optimizer step, over all devices and microbatches"""

    @property
    def epochs(self) -> int:
        """Epochs begun."""
        return -(-self.total_steps // self.steps_per_epoch)


@dataclass(frozen=True)
class Task:
    """What an experiment trains; pure functions with their configs bound."""

    title: str
    data: Data
    needs: Needs
    """what the model takes, held against what `data` reads before the first step"""
    init: Callable[[], tuple[dict, dict]]
    """-> (params, state) from the seed"""
    loss: Callable[..., Any]
    """(params, state, batch, key, train=True | Replicas) -> (loss, (new state, metrics))"""
    predict: Callable[[dict, dict, Batch], dict[str, torch.Tensor]]
    """-> "boxes" [B Q 9], "scores" [B Q], "labels" [B Q], "valid" [B Q]; or what `score` takes"""
    optimizer: Callable[[Plan], optim.Config]
    ema: optim.Ema | None = None
    shared_normalisers: bool = False
    """`loss` takes replicas=: its normalisers are averaged over the processes though batch norm is not"""
    start: "Start" = field(default_factory=lambda: Start())
    """how it begins from --pretrained"""
    unready: str = ""
    """why it is not trained as it is, though it may be evaluated: one sentence"""
    score: Callable[[Mapping[str, np.ndarray]], dict[str, float]] | None = None
    """of a model that detects nothing, see `judge.measure`; None: `predict` gives detections"""
    bottom: bool = False
    """results files have the boxes' bottom centre, see `evaluation.results.entries`"""
    network: Any = None
    """the family's Config, for who needs sizes of what is trained"""


def parts(params: dict, state: dict, loaded: upstream.Loaded) -> tuple[dict, dict, upstream.Merge]:
    """The trees with the leaves that the files have, which must be leaves of the model; the others are trained from init."""
    return upstream.load_into(params, state, loaded, allow_missing=tuple(params))


@dataclass(frozen=True)
class Start:
    """What becomes of the files of --pretrained."""

    merge: Callable[[dict, dict, upstream.Loaded], tuple[dict, dict, upstream.Merge]] = parts
    """(params, state, loaded) -> (params, state, where each leaf is from)"""
    averages: bool = False
    """of a run's checkpoint its EMA is taken, if it has one"""


class Family(Protocol):
    """A file of bevfn/models/, as far as a run needs it; the functions are Task's with a network and a policy to bind."""

    @property
    def needs(self) -> Callable[..., Needs]: ...
    @property
    def init(self) -> Callable[..., tuple[dict, dict]]: ...
    @property
    def loss(self) -> Callable[..., Any]: ...
    @property
    def predict(self) -> Callable[..., dict[str, torch.Tensor]]: ...


def make_task(
    config: Config,
    family: Family,
    network: Any,
    data: Data,
    optimizer: Callable[[Plan], optim.Config],
    **others: Any,
) -> Task:
    """The task of a family's `network`, a Config of it, in the config's precision and from its seed; others: Task's fields."""
    policy = Policy.of(config.precision)
    trained = remat.switched_on(network) if config.checkpoint_activations else network
    return Task(
        title=f"{config.model}, {config.scale} size",
        data=data,
        needs=family.needs(network),
        init=partial(family.init, network, config.seed),
        loss=partial(family.loss, config=trained, policy=policy),
        predict=partial(family.predict, config=network, policy=policy),
        optimizer=optimizer,
        network=network,
        **others,
    )


def make_data(
    config: Config,
    splits: source.Source | None,
    reading: Reading,
    eval_reading: Reading,
    balanced: Callable[[Index, tuple[str, ...], int], np.ndarray] = sampling.cbgs,
) -> Data:
    """The config's key frames, or `splits`, and how they are read; --class-balanced draws them by `balanced`."""
    where = (config.data_root, config.version, config.train_split, config.eval_split)
    splits = splits or source.open(*where, config.world)
    items = np.arange(len(splits.training))
    if config.class_balanced:
        items = balanced(splits.training, reading.class_names, config.seed)
    return Data(splits.training, items, lambda epoch: reading, splits.evaluation, eval_reading)


@dataclass(frozen=True)
class Run:
    """A task under a config on this process' devices."""

    task: Task
    config: Config
    plan: Plan
    replicas: Replicas | None = None
    facts: dict = field(default_factory=dict)
    """see `facts`; every checkpoint keeps them"""

    @property
    def leads(self) -> bool:
        """The process that prints and writes."""
        return self.replicas is None or self.replicas.rank == 0

    @property
    def policy(self) -> Policy:
        return Policy.of(self.config.precision)


def plan(config: Config, items: np.ndarray, replicas: Replicas | None = None) -> Plan:
    """Steps of the run on that many devices."""
    count = replicas.count if replicas is not None else 1
    per_epoch = loader.steps_per_epoch(
        len(items), config.batch_size, count, config.accumulate, drop_last=config.drop_last
    )
    epochs = 1 if config.mode == "performance" else config.epochs
    return Plan(per_epoch, config.steps or epochs * per_epoch, config.batch_size * count * config.accumulate)


# -------------------------------------------------------------------------------------------------------- the parts


def initial(run: Run, *, resumed: bool = False) -> tuple[dict, dict]:
    """Parameters and statistics from the seed, then from the pretrained files, on the device.

    resumed: a checkpoint replaces every one of them, and the pretrained files are not looked at: they may be gone.
    """
    params, state = run.task.init()
    if run.config.pretrained and not resumed:
        start = run.task.start
        loaded = {str(path): read_weights(path, ema=start.averages) for path in run.config.pretrained}
        params, state, merged = start.merge(params, state, loaded)
        if run.leads:  # the recipe starts the rest from scratch; the report says what
            print(merged.text())
    return tree.to(params, run.config.device), tree.to(state, run.config.device)


def read_weights(path: Path, *, ema: bool = False) -> tuple[dict, dict]:
    """(params, state) of an imported file, or of a training checkpoint's folder (`ema`: their averages, if it has).

    Raises ValueError, naming the file, if it is absent or damaged, or a weight in it is none (`upstream.impossible`).
    """
    if not path.is_dir():
        imported = upstream.read_imported(path)
        params, state = imported.params, imported.state
    else:
        tensors = checkpoint.read(path)
        root = "ema." if ema and any(name.startswith("ema.") for name in tensors) else ""
        params, state = (
            upstream.nest({n.removeprefix(root + part): x for n, x in tensors.items() if n.startswith(root + part)})
            for part in ("params.", "state.")
        )
    return usable(path, params, state)


def usable(path: Path, params: dict, state: dict) -> tuple[dict, dict]:
    """The weights of a file, in memory of their own. Raises ValueError where one of them is none."""
    for name, leaf in tree.flatten({"params": params, "state": state}).items():
        if what := upstream.impossible(name, leaf):
            raise ValueError(f"{path}: {name} is {what}; take an older checkpoint, or import the published file again")
    # Clones: what safetensors maps from a file lies at any multiple of 4 bytes, where a CPU's products round otherwise than
    # on a trained model's aligned tensors, and a checkpoint would not score bit for bit as its run did.
    return tree.map(torch.clone, params), tree.map(torch.clone, state)


def initial_state(run: Run, *, resumed: bool = False) -> train.TrainState:
    """The train state before the first step, on the device; `resumed`: see `initial`."""
    optimizer = run.task.optimizer(run.plan)
    params, state = initial(run, resumed=resumed)
    made = train.init(params, state, optimizer, precision=run.policy, ema=run.task.ema, seed=run.config.seed)
    return tree.to(made, run.config.device)


def pure_step(run: Run) -> Callable[[train.TrainState, Batch], tuple[train.TrainState, dict]]:
    """The step of one process and one microbatch as a pure function: what is lowered for Ascend."""
    loss = partial(run.task.loss, train=True)
    return train.make_step(loss, run.task.optimizer(run.plan), ema=run.task.ema)


def build(run: Run, *, resumed: bool = False) -> tuple[train.TrainState, Callable]:
    """(train state, compiled step(train state, microbatches) -> (train state, metrics)), old buffers donated; `resumed`: see
    `initial`."""
    made = initial_state(run, resumed=resumed)
    if run.replicas is None or not run.config.sync_statistics:  # alone, batch norm over all devices is batch norm
        return made, compiled_step(run, synchronised=False)
    return made, synchronising_step(run)


def compiled_step(run: Run, *, synchronised: bool) -> Callable:
    """The step of `build` with batch norm over all devices, or over each."""
    config, replicas = run.config, run.replicas
    loss = partial(run.task.loss, train=replicas if synchronised else True)
    if run.task.shared_normalisers:
        loss = partial(loss, replicas=replicas)
    return train.make_accumulated(
        loss,
        run.task.optimizer(run.plan),
        ema=run.task.ema,
        replicas=replicas,
        accumulate=config.accumulate,
        compiled=partial(compilation.step, backend=config.backend),
    )


def synchronising_step(run: Run) -> Callable:
    """The step of `build` that is another one from the first step of epoch --sync-after on, whatever it starts at."""
    change = run.config.sync_after * run.plan.steps_per_epoch

    @functools.lru_cache(maxsize=1)  # the graph of before is let go
    def made(synchronised: bool) -> Callable:
        return compiled_step(run, synchronised=synchronised)

    def step(train_state: train.TrainState, batches: list[Batch]) -> tuple[train.TrainState, dict]:
        return made(int(train_state.step) >= change)(train_state, batches)

    return step


def check(task: Task, *, train: bool = True, whole: bool = True) -> None:
    """Raises ValueError, one sentence, where the splits, what is read of them and the model do not fit together.

    train: the training split too. whole: a split's key frames must all have what is read of them, as far as the data set
    says (files are not looked for).
    """
    data = task.data
    source.check(data.evaluation, data.eval_reading, train=False, whole=whole)
    task.needs.check(data.eval_reading, train=False)
    if not train:
        return
    if task.unready:
        raise ValueError(task.unready)
    if task.score is None:
        source.check_scored(data.evaluation, KNOWN_ATTRIBUTES)
    reading = data.reading(0)
    source.check(data.training, reading, train=task.needs.boxes, whole=whole)
    task.needs.check(reading, train=True)
    if data.database is not None and (foreign := set(data.database.class_names) - set(reading.class_names)):
        raise ValueError(
            f"{data.database.points_path.parent} has objects of the classes {', '.join(sorted(foreign))}, which the model "
            f"does not detect ({', '.join(reading.class_names)}); build the database again"
        )


def on_what_is_there(task: Task, say: Callable[[str], Any]) -> Task:
    """The task on the key frames whose files are all there, of a data set that is there in part; the others are said once.

    Raises ValueError where none is left to train on or to be judged by.
    """
    data = task.data
    items, lost = scene.whole(data.training, data.items, data.reading(0))
    places, unseen = scene.whole(data.evaluation, np.arange(len(data.evaluation)), data.eval_reading)
    for index, left, sentences in ((data.training, items, lost), (data.evaluation, places, unseen)):
        if not len(left):
            raise ValueError(f"{index.root}: of no key frame of {index.split!r} are all files there, {sentences[0]}")
        if sentences:
            say(
                f"warning: left out of {index.split!r}, since not all their files are there: {len(sentences):,} of "
                f"{len(index):,} key frames (`bevfn data check` lists the files)"
            )
            more = [f"and {len(sentences) - SHOWN:,} more"] if len(sentences) > SHOWN else []
            say("\n".join(f"  {sentence}" for sentence in [*sentences[:SHOWN], *more]))
    if unseen:
        data = replace(data, evaluation=data.evaluation.select(places), left_out=len(unseen))
    return replace(task, data=replace(data, items=items))


def example(run: Run) -> Batch:
    """One microbatch of the training split's first key frame, on the device: what a step is measured or lowered with."""
    data, reading = run.task.data, run.task.data.reading(0)
    sample = scene.load(data.training, 0, reading, np.random.default_rng(0), database=data.database)
    batch, _ = collate([sample] * run.config.batch_size, capacities=reading.capacities)
    return batch.to(run.config.device)


def microbatches(run: Run, start: int) -> Generator[tuple[int, list[loader.Loaded]], None, None]:
    """(steps done after it, this process' microbatches) of every step behind the first `start` ones."""
    data, config, plan = run.task.data, run.config, run.plan
    rank, count = (run.replicas.rank, run.replicas.count) if run.replicas is not None else (0, 1)
    settings = loader.Config(batch_size=config.batch_size, workers=config.workers, on_damaged=config.on_damaged)
    first, within = divmod(start, plan.steps_per_epoch)
    for epoch in range(first, plan.epochs):
        reading = data.reading(epoch)
        load = partial(scene.load, data.training, reading=reading, database=data.database)
        stream = loader.batches(
            load,
            sampling.order(data.items, config.seed, epoch, shuffle=True),
            settings,
            seed=config.seed,
            epoch=epoch,
            capacities=reading.capacities,
            rank=rank,
            replicas=count,
            accumulate=config.accumulate,
            start_step=within,
        )
        with contextlib.closing(stream):
            for step in range(epoch * plan.steps_per_epoch + within, (epoch + 1) * plan.steps_per_epoch):
                if step == plan.total_steps:
                    return
                yield step + 1, [next(stream) for _ in range(config.accumulate)]
        within = 0


# ---------------------------------------------------------------------------------------------------------- the run


def main(make_task: Callable[[Any], Task], config: Config) -> dict:
    """Trains, evaluates, reports, on one process or as one of torchrun's; returns the summary that it writes.

    Raises ValueError and OSError of one sentence for what a user can mend, distributed.Lost where another process of the
    run is gone, and signals.Stopped, a SystemExit, after a signal.
    """
    host.keep_freed_memory()
    for backend in (config.backend, config.eval_backend):
        compilation.check_backend(backend)
    replicas = distributed.start(config.device)
    try:
        with distributed.watched(replicas), contextlib.ExitStack() as stack:
            if replicas is None or replicas.rank == 0:
                source.prepare(config.data_root, config.world)
            distributed.gather(None, replicas)  # the others wait for it
            task = make_task(config)
            check(task, whole=config.on_damaged == "stop")
            if config.on_damaged == "skip":
                task = on_what_is_there(task, print if replicas is None or replicas.rank == 0 else lambda text: None)
            run = Run(task, config, plan(config, task.data.items, replicas), replicas)
            run = dataclasses.replace(run, facts=facts(run))
            latest = stack.enter_context(open_folder(run)) if run.leads else None
            agreed = distributed.gather(None if latest is None else str(latest), replicas)[0]  # of the one that leads
            return _train(run, None if agreed is None else Path(agreed))
    finally:
        distributed.stop()


def _train(run: Run, latest: Path | None) -> dict:
    """The run from its latest checkpoint, or from the start; its summary."""
    started, config = time.perf_counter(), run.config
    if latest is not None and (summary := finished(run, latest)) is not None:
        return summary
    train_state, step = build(run, resumed=latest is not None)
    if latest is not None:
        train_state, _ = checkpoint.load_step(latest, train_state)
    start = int(train_state.step)
    say(run, describe(run, train_state, start))
    summary = {"steps": start}
    seconds: list[float] = []
    skipped = 0  # steps in a row
    if start == 0 and config.eval_first:
        summary["scores_before"] = evaluate(run, train_state, 0)
    if start and evaluation_due(run, start) and not evaluated(run, start):  # killed before or in it
        summary["scores"] = evaluate(run, train_state, start)
    with (
        reporting(run, start) as reporter,
        signals.on_terminate() as stop,
        contextlib.closing(microbatches(run, start)) as stream,
        saved_when_others_end(run, train_state),
    ):
        done, began = start, time.perf_counter()
        problems: list[Exception] = []
        for done, loaded in readable(run, stream, problems):
            batches = [item.batch.to(config.device) for item in loaded]
            train_state, metrics = step(train_state, batches)
            values = {name: float(value) for name, value in metrics.items()}  # the step's only copy to the host
            values |= counters(run, loaded)
            skipped = check_finite(run, train_state, values, batches, loaded, done, skipped)
            seconds.append(time.perf_counter() - began)
            reporter.log(done, values, seconds[-1])
            summary = {"first_loss": values["loss/total"], **summary, "last_loss": values["loss/total"], "steps": done}
            if distributed.agree(stop.requested, run.replicas):
                break
            if checkpoint_due(run, done):
                save(run, train_state, done)
            if evaluation_due(run, done):
                summary["scores"] = evaluate(run, train_state, done)
            began = time.perf_counter()
        if distributed.agree(stop.requested or bool(problems), run.replicas):
            save_at_stop(run, train_state, start, done, stop, problems)
            raise signals.Stopped(stop.number or signal.SIGTERM)  # which another process got
    return finish(run, summary, seconds, started)


def readable(run: Run, steps: Iterator[tuple], problems: list[Exception]) -> Iterator[tuple]:
    """`steps`, which end for all processes where one cannot read on; its `problems` then say why."""
    while True:
        item = None
        try:
            item = next(steps, None)
        except (ValueError, ChildProcessError) as error:  # a damaged file, or a reading process that was killed
            problems.append(error)
        if distributed.agree(item is None, run.replicas):
            return
        assert item is not None
        yield item


@contextlib.contextmanager
def saved_when_others_end(run: Run, train_state: train.TrainState) -> Iterator[None]:
    """Saves the steps that `train_state`, which every step updates in place, has made when another process is lost.

    The process that leads writes, or the first that is left: all have the same state.
    """
    try:
        with distributed.watched(run.replicas):
            yield
    except distributed.Lost as lost:
        assert run.replicas is not None
        done = int(train_state.step)
        leads = run.replicas.rank == min(set(range(run.replicas.count)) - lost.gone)
        if leads and done and run.config.mode == "full" and not train.first_nonfinite(train_state):
            folder = run.config.run_dir / run_folder.CHECKPOINTS / step_name(done)
            with contextlib.nullcontext() if run.leads else run_folder.locked(run.config.run_dir):
                if not folder.is_dir():
                    write(run, train_state, done)
            print(f"step {done} is saved; add --resume to go on", flush=True)
        raise


def save_at_stop(
    run: Run, train_state: train.TrainState, start: int, done: int, stop: signals.Stop, problems: list[Exception]
) -> None:
    """Saves what was done since `start`, says so, and raises the problem that this process stopped for, if any."""
    if done > start:
        save(run, train_state, done)
    what = "by a signal" if stop.requested else "because a sample cannot be read"
    say(run, f"stopped {what} after step {done}{', which is saved; add --resume to go on' if done else ''}")
    distributed.agree(
        False, run.replicas
    )  # who ends with an error has the others killed, so it waits for the checkpoint
    # A signal to the whole process group ends the reading processes too: no problem of its own.
    if problems and not (stop.requested and isinstance(problems[0], ChildProcessError)):
        raise problems[0]


def finished(run: Run, latest: Path) -> dict | None:
    """The summary of a run of which nothing is left to do, and says so; None if there is."""
    done, path = checkpoint.read_meta(latest).get("step"), run.config.run_dir / SUMMARY
    if done is not None and done > run.plan.total_steps:
        raise ValueError(f"{latest} has made {done} steps, the run has {run.plan.total_steps}; give the old flags")
    if done != run.plan.total_steps or not path.is_file() or not evaluated(run, done):
        return None
    try:
        summary = read_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and --resume writes it again") from None
    if not isinstance(summary, dict) or summary.get("steps") != done:
        return None
    say(run, f"{run.config.run_dir} is finished: all {done} steps are made and evaluated, and nothing is changed")
    return summary


def finish(run: Run, summary: dict, seconds: list[float], started: float) -> dict:
    """Adds speed, time and memory to the summary, writes it and the report, says where."""
    counted = seconds[run.config.warm_up :] or seconds[1:] or seconds
    speed = run.plan.batch * len(counted) / sum(counted) if counted else None
    summary |= {
        "samples_per_second": speed,
        "minutes": (time.perf_counter() - started) / 60,
        "peak_memory_gb": {where: size / 2**30 for where, size in peak_memory().items()},
        "config": flags(run.config),
        **provenance.head(run.config.device),
    }
    if run.leads:
        write_atomically(run.config.run_dir / SUMMARY, to_json(summary, indent=1))
    counted_from = (
        f"after {run.config.warm_up} steps" if len(seconds) > run.config.warm_up else "without the first step"
    )
    pace = "no step was left to make" if speed is None else f"{speed:.3g} samples/s {counted_from}"
    say(run, f"{pace}, {summary['minutes']:.1f} minutes; all in {run.config.run_dir}")
    return summary


# ------------------------------------------------------------------------------------------------------- small parts


def open_folder(run: Run) -> contextlib.AbstractContextManager[Path | None]:
    """The run folder, locked; gives the checkpoint to go on from."""
    config = run.config
    # R processes with A microbatches each make the same step for equal R A, unless something is summed over the R. But sums
    # of more than two are rounded by their order, which is R's and A's.
    coupled = config.sync_statistics or run.task.shared_normalisers or run.facts["microbatches"] > 2
    return run_folder.open(
        config.run_dir,
        flags(config),
        resume=config.resume,
        force=config.force,
        facts=run.facts,
        free=FREE.union(
            () if coupled else {"processes", "accumulate"},
            {"checkpoint_activations"}
            if config.backend in ("eager", "aot_eager")
            else (),  # others fuse, and so round, anew
        ),
    )


def facts(run: Run) -> dict:
    """What the numbers of a run depend on besides its config, for its checkpoints."""
    data, plan, processes = run.task.data, run.plan, run.replicas.count if run.replicas is not None else 1
    return {
        "processes": processes,
        "accumulate": run.config.accumulate,
        "microbatches": processes * run.config.accumulate,
        "samples_per_epoch": len(data.items),
        "total_steps": plan.total_steps,
        "data": origin.data(data.training, data.items),
        "evaluation_data": origin.data(data.evaluation, np.arange(len(data.evaluation))),  # the best is of one's scores
        "code": origin.code(),
    } | ({} if data.database is None else {"database": data.database.key})


def flags(config: Config) -> dict:
    """The config as plain JSON values."""
    return as_read(dataclasses.asdict(config))


def say(run: Run, text: str) -> None:
    """Prints once, not once per process."""
    if run.leads:
        print(lines(text), flush=True)


def describe(run: Run, train_state: train.TrainState, done: int) -> str:
    """What is about to be trained, on what, for how long, and where the learning rate comes from."""
    config, plan, data = run.config, run.plan, run.task.data
    lr = run.task.optimizer(plan).lr
    peak = max((lr.start, *(phase.target for phase in lr.phases)))
    same = ", which its scores are of too" if data.training.split == data.evaluation.split else ""
    scaling = "--lr" if config.lr is not None else f"{config.lr_scaling} scaling from batch {config.recipe_batch}"
    return (
        f"{run.task.title}: {tree.num_elements(train_state.params) / 1e6:.1f} M parameters, {config.precision} on "
        f"{config.device} through {config.backend}\n"
        f"{data.training.root} ({data.training.split or 'one frame'}{same}): {len(data.items)} samples an epoch, "
        f"{plan.total_steps} steps of {plan.batch}{f', from step {done} on' if done else ''}; "
        f"peak learning rate {peak:.4g} ({scaling})"
    )


def scaled_lr(config: Config, plan: Plan) -> float:
    """The peak learning rate of a run, see Config.lr_scaling."""
    if config.lr is not None:
        return config.lr
    ratio = plan.batch / config.recipe_batch
    return config.recipe_lr * {"linear": ratio, "sqrt": ratio**0.5, "none": 1.0}[config.lr_scaling]


def counters(run: Run, loaded: list[loader.Loaded]) -> dict[str, float]:
    """What the loaders of all processes counted in a step, and this one's waiting time; names damaged samples."""
    counts: dict[str, float] = {}
    for item in loaded:
        for problem in item.problems:
            print(f"warning: skipped a damaged sample: {sentence(problem)}", flush=True)
        counts = added(counts, item.counts)
    return functools.reduce(added, distributed.gather(counts, run.replicas)) | {
        "seconds/waited": sum(item.waited for item in loaded)
    }


def check_finite(
    run: Run,
    train_state: train.TrainState,
    values: dict,
    batches: list[Batch],
    loaded: list[loader.Loaded],
    done: int,
    skipped: int,
) -> int:
    """Steps that were skipped in a row, this one included; `skipped` were before it.

    Stops a run that cannot learn so: at once in fp32 and bf16, where nothing explains a loss or a gradient that is not
    finite; in fp16, whose scale may be too high, after PATIENCE steps in a row if the loss itself is not finite, or the
    scale cannot fall. Raises ValueError naming the step, the samples, and the terms of the loss or the first bad tensor,
    in all processes.
    """
    if not values["skipped"]:
        return 0
    scaled, skipped = run.config.precision == "fp16", skipped + 1
    bad_terms = [name for name, value in values.items() if name.startswith(train.LOSS) and not math.isfinite(value)]
    tokens = [token for item in loaded for token in item.tokens]
    if scaled and skipped % PATIENCE:
        tell_of_fp16(run, values, done, bad_terms, tokens)
        return skipped
    lowest = scaled and values["loss_scale"] <= LOWEST_SCALE
    if scaled and not bad_terms and not lowest:
        return skipped
    samples = distributed.gather(tokens, run.replicas)
    loss, optimizer = partial(run.task.loss, train=True), run.task.optimizer(run.plan)
    if bad_terms:
        alone = [
            f"sample {loaded[bad.microbatch].tokens[bad.sample]}: {', '.join(bad.terms)}"
            for bad in train.bad_losses(loss, optimizer, train_state, batches)
        ]
        alone = [line for part in distributed.gather(alone, run.replicas) for line in part]
        what = f"the loss is not finite, {'; '.join(alone) or ', '.join(bad_terms)}"
        first = train.first_nonfinite({"batch": batches[0] if len(batches) == 1 else batches})
        what += f", first {first}" if first else ""
    else:
        bad = train.bad_gradient(loss, optimizer, train_state, batches, run.replicas)
        what = f"the gradients are not finite, first {bad or 'in another process'}"
    raise ValueError(
        f"step {done}: {what}; samples {', '.join(token for part in samples for token in part)}; lower --lr, or look at "
        "these samples"
    )


def check_state(train_state: train.TrainState, done: int) -> None:
    """Raises ValueError naming the first leaf that is not finite: losses and gradients are looked at before a step's update,
    and of the last one nothing else would look at what it made."""
    if bad := train.first_nonfinite(train_state):
        raise ValueError(
            f"step {done}: its update made {bad} NaN or infinite, so that it is neither saved nor evaluated; lower --lr, and go "
            "on from an older checkpoint with --resume --force"
        )


def tell_of_fp16(run: Run, values: dict, done: int, bad_terms: list[str], tokens: list[str]) -> None:
    """Says what a skipped step of fp16 may mean, where it is more than a loss scale that was too high."""
    if bad_terms:
        samples = ", ".join(token for part in distributed.gather(tokens, run.replicas) for token in part)
        say(run, f"warning: step {done} is skipped: {', '.join(bad_terms)} not finite, with samples {samples}")
    if LOWEST_SCALE < values["loss_scale"] <= 2 * LOWEST_SCALE:
        say(
            run,
            f"warning: step {done}: the loss scale has fallen to its lowest, {LOWEST_SCALE:g}; lower --lr, or take bf16",
        )


def checkpoint_due(run: Run, done: int) -> bool:
    every = run.config.checkpoint_every or run.plan.steps_per_epoch
    return run.config.mode == "full" and (done % every == 0 or done == run.plan.total_steps)


def save(run: Run, train_state: train.TrainState, done: int) -> None:
    """A checkpoint; every process has the same state, one writes. Raises ValueError where it is of no use."""
    check_state(train_state, done)
    if run.leads:
        write(run, train_state, done)


def write(run: Run, train_state: train.TrainState, done: int) -> None:
    """A checkpoint of this process' state, with what the run's numbers depend on."""
    folder = run.config.run_dir / run_folder.CHECKPOINTS / step_name(done)
    checkpoint.save_step(folder, train_state, {"step": done, run_folder.FACTS: run.facts}, keep=run.config.keep)


def evaluation_due(run: Run, done: int) -> bool:
    config, (epoch, rest) = run.config, divmod(done, run.plan.steps_per_epoch)
    asked = config.eval_every > 0 and epoch % config.eval_every == 0
    due = rest == 0 and (asked or epoch > run.plan.epochs - config.eval_last)
    return config.mode == "full" and (due or done == run.plan.total_steps)


def evaluate(run: Run, train_state: train.TrainState, done: int) -> dict[str, float]:
    """Scores of the evaluation split after `done` steps, by name; files in evaluations/step_..."""
    check_state(train_state, done)
    weights = train_state.ema or {"params": train_state.params, "state": train_state.state}
    data, config = run.task.data, run.config
    over_all: Callable[..., tuple[dict, dict[str, float]]] = detect if run.task.score is None else collect
    found, counts = over_all(
        *(run.task.predict, weights["params"], weights["state"]),
        *(data.evaluation, data.eval_reading),
        batch_size=config.batch_size,
        workers=config.workers,
        backend=config.eval_backend,
        device=config.device,
        replicas=run.replicas,
        warn=print,
    )
    if not run.leads:
        return {}
    out = evaluation_folder(run, done)
    counts |= {"missing/key_frames": data.left_out}
    title = f"{run.task.title}, step {done}"
    if run.task.score is not None:
        judgement = measure(found, run.task.score, out, title=title, counts=counts)
    else:
        judgement = judge(
            *(data.evaluation, found, data.eval_reading, out),
            counts=counts,
            run_dir=config.run_dir,
            title=title,
            config=flags(config),
            bottom=run.task.bottom,
        )
    say(run, f"{judgement.text}\neverything about this evaluation is in {out}")
    if done:
        checkpoint.keep_best(config.run_dir / run_folder.CHECKPOINTS, out.name, judgement.value)
    return judgement.numbers


def evaluation_folder(run: Run, done: int) -> Path:
    """Where the evaluation after `done` steps is written."""
    return run.config.run_dir / "evaluations" / step_name(done)


def evaluated(run: Run, done: int) -> bool:
    """Whether that evaluation came to its end, which is when its metrics are written."""
    return (evaluation_folder(run, done) / METRICS).is_file()


def step_name(done: int) -> str:
    """Of checkpoints and evaluations."""
    return f"step_{done:08d}"


def reporting(run: Run, start: int) -> contextlib.AbstractContextManager:
    """The Reporter of the process that leads, a silent one elsewhere."""
    if run.leads:
        return Reporter(run.config.run_dir, run.plan.total_steps, start_step=start)
    return contextlib.nullcontext(_Silent())


class _Silent:
    def log(self, *_: Any) -> None:
        """Nothing: another process reports."""


# ------------------------------------------------------------------------------------------------------ command line


def cli(defaults: Defaults, make_task: Callable[[Any], Task], description: str | None) -> None:
    """Parses the command line; a user's mistake ends in one sentence and an exit code (see exits.py)."""
    with exits.one_sentence():
        config = parse(defaults, sys.argv[1:], description)
        main(make_task, config)


def parse(defaults: Defaults, arguments: list[str], description: str | None = None) -> Any:
    """The config of a command line; --model (and what else `Config.CHOOSES`) and what is at --data-root decide on the
    defaults."""
    root, first = flag(arguments, "--data-root"), next(iter(defaults.values()))
    some = {name: next(iter(of.values())) for name, of in defaults.items()}  # what chooses is of a model, at any root
    given = {name: flag(arguments, f"--{name}") for name in next(iter(some.values())).CHOOSES}
    chosen = {name: value for name, value in given.items() if value is not None}
    fitting = (m for m, one in some.items() if all(str(getattr(one, n)) == v for n, v in chosen.items()))
    # Tyro names the choices for an unknown model, the config what contradicts a known one.
    of = defaults.get(next(fitting, chosen.get("model", "")), first)
    default = source.of_kind(of, None if root is None else Path(root))
    module = sys.modules["__main__"].__spec__
    prog = f"python -m {module.name}" if module else None  # not the file's path, which nobody types
    return tyro.cli(type(default), default=default, args=arguments, description=description, prog=prog)


def flag(arguments: list[str], name: str) -> str | None:
    """What a command line gives for --a-flag, before it is parsed: the defaults of the others depend on it."""
    value = None
    for word, following in zip(arguments, [*arguments[1:], ""]):
        given, _, joined = word.partition("=")
        if given.replace("_", "-") == name:
            value = joined or following
    return value
