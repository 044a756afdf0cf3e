"""What is trained: an experiment's `Task` under a `Config` is a `Run` of a `Plan`; whether model, data and flags fit together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from bevfn import distributed
from bevfn.data import loader, paste, sampling, scene, source
from bevfn.data.batch import Batch
from bevfn.data.index import Index
from bevfn.data.reading import Needs, Reading
from bevfn.distributed import Replicas
from bevfn.evaluation.results import KNOWN_ATTRIBUTES
from bevfn.layers import remat
from bevfn.names import lines
from bevfn.precision import Policy
from bevfn.training import optim
from bevfn.training.command_line import Config
from bevfn.training.pretrained import Start

SHOWN = 10  # key frames without files that are named one by one


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    training: Index
    items: np.ndarray
    """int64 [n], places in `training`: one epoch before it is shuffled; of a mixture what each data set's share is drawn of"""
    reading: Callable[[int], Reading]
    """how an epoch (0-based) reads; recipes change it towards the end"""
    evaluation: Index
    eval_reading: Reading
    database: paste.Database | None = None
    left_out: int = 0
    """key frames of the evaluation split whose files are not all there"""


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
    apply: Callable[[dict, dict, Batch], tuple[dict, dict]] | None = None
    """of a model that detects, in evaluation -> (outputs that name every boundary, state)"""
    decode: Callable[[dict], dict[str, torch.Tensor]] | None = None
    """these outputs -> what `predict` gives"""
    tables: Callable[..., Batch] | None = None
    """(batch on the CPU, train=) -> the batch with `Batch.tables`: what the loader's workers compute in place of the step"""

    def finishing(self, *, train: bool) -> Callable[[Batch], Batch] | None:
        """`loader.batches`' finish."""
        return self.tables and partial(self.tables, train=train)


def on_host(host_tables: bool | None, device: str) -> bool:
    """What --host-tables comes to on this machine: if it is not given, yes where the step runs on an NPU."""
    return distributed.chosen(device).startswith("npu") if host_tables is None else host_tables


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
    @property
    def apply(self) -> Callable[..., tuple[dict, dict]]: ...


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
    decode = getattr(family, "decode", None)  # no pretraining has one
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
        apply=decode and partial(family.apply, config=network, train=False, policy=policy),
        decode=decode and partial(decode, config=network),
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
    def device(self) -> str:
        """torch device of this process."""
        return distributed.chosen(self.config.device)

    @property
    def policy(self) -> Policy:
        return Policy.of(self.config.precision)

    @property
    def log_every(self) -> int:
        """Steps whose metrics are read together. Each by itself on a CPU, where nothing goes on while the host asks."""
        return self.config.log_every or (1 if self.device.startswith("cpu") else 10)


def drawn(data: Data, seed: int, epoch: int) -> np.ndarray:
    """The places in the training split that an epoch reads, before they are shuffled: `items`, or a mixture's draw of them."""
    return sampling.mixed(data.items, data.training.shares, seed, epoch)


def plan(config: Config, items: np.ndarray, replicas: Replicas | None = None) -> Plan:
    """Steps of the run on that many devices."""
    count = replicas.count if replicas is not None else 1
    per_epoch = loader.steps_per_epoch(
        len(items), config.batch_size, count, config.accumulate, drop_last=config.drop_last
    )
    epochs = 1 if config.mode == "performance" else config.epochs
    return Plan(per_epoch, config.steps or epochs * per_epoch, config.batch_size * count * config.accumulate)


def scaled_lr(config: Config, plan: Plan) -> float:
    """The peak learning rate of a run, see Config.lr_scaling."""
    if config.lr is not None:
        return config.lr
    ratio = plan.batch / config.recipe_batch
    return config.recipe_lr * {"linear": ratio, "sqrt": ratio**0.5, "none": 1.0}[config.lr_scaling]


def say(run: Run, text: str) -> None:
    """Prints once, not once per process."""
    if run.leads:
        print(lines(text), flush=True)


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
