"""A trained model as one object, from wherever its weights lie: what `bevfn.load` gives, and commands that take a checkpoint.

    model = bevfn.load("runs/bevfusion_lidar")          # its best checkpoint; or a step's folder, a.safetensors, a.pth
    found = model.detect("FRAME_FOLDER")                # {token: boxes, scores, labels}
    outputs = model.predict(batch)                      # of one batch, as tensors

A run's recipe is in its config.json; that of a published file is told from its keys, and is the published one.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from bevfn import catalogue, distributed, metrics, recipes, tree, upstream, waiting
from bevfn import compile as compilation
from bevfn.data import inputs, source
from bevfn.data import scene as loading
from bevfn.data.batch import Batch, Sample, collate
from bevfn.data.index import Index
from bevfn.data.reading import Reading
from bevfn.evaluation.detect import detect
from bevfn.evaluation.results import Detections
from bevfn.names import printable
from bevfn.training import checkpoint, command_line, located, pretrained, run_folder, tasks
from bevfn.upstream import checkpoints, recognise

FOREIGN = {  # flags of some recipes alone
    **dict.fromkeys(("intensity", "fuser_kernel"), "is not AWML's"),
    **dict.fromkeys(("point_capacity", "voxel_capacity", "site_capacity"), "reads no LiDAR points or sweeps"),
    "published_sweeps": "reads no LiDAR points or sweeps",
}
BEFORE: dict[str, Any] = {"published_sweeps": False}  # flags, and what runs did that are older than they
NOTHING = Index(Path("."), "", "", ())


@dataclass(frozen=True, repr=False)
class Detector:
    """A recipe's model with its weights; pure functions with everything bound."""

    experiment: str
    """file in experiments/"""
    config: command_line.Config
    """the recipe's flags, as the run had them, but for what only training needs"""
    params: dict
    state: dict
    """batch-norm statistics"""
    checkpoint: Path
    """where the weights are from: a step folder, or a file"""
    averaged: bool = False
    """whether they are a run's averaged weights (EMA); False also of a file, which has one set"""

    def __repr__(self) -> str:
        count, device = tree.num_elements(self.params), tree.leaves(self.params)[0].device
        return f"Detector {self.task.title}: {count:,} parameters on {device}, of {self.checkpoint}"

    @cached_property
    def task(self) -> tasks.Task:
        """The recipe's model and how it reads, without key frames."""
        return recipes.load(self.experiment).task(self.config, source.Source(NOTHING, NOTHING))

    @property
    def reading(self) -> Reading:
        """How a key frame is read, see `scene.load`."""
        return self.task.data.eval_reading

    @property
    def classes(self) -> tuple[str, ...]:
        """What labels index."""
        return self.reading.class_names

    def at(self, data: Path | None) -> Self:
        """The same as it reads what lies there: of T4 data sets and of others images may be resized otherwise."""
        return self if data == self.config.data_root else replace(self, config=replace(self.config, data_root=data))

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Detections of a batch of fixed shapes, on its device: "boxes" [B Q 9] (x y z of the BOTTOM centre, length, width,
        height [m], yaw [rad], vx, vy [m/s]; the batch's base frame), "scores", "labels", "valid" [B Q], and what did not fit
        ("overflow/*", 0-d). Differentiable, as `outputs`."""
        return self.task.predict(self.params, self.state, batch)

    def sample(
        self,
        data: str | Path | Index,
        place: int = 0,
        scene: str | None = None,
        version: str | None = None,
        columns: str = "",
    ) -> Sample:
        """The key frame at that place, read as the model reads it; the rest as of `detect`. Raises ValueError as `detect`."""
        index = data if isinstance(data, Index) else inputs.read(Path(data), scene, version, columns)
        if not -len(index) <= place < len(index):
            raise ValueError(f"{index.root} has {len(index):,} key frames; {place} is none of them")
        only = index.select(np.array([place % len(index)]))
        return loading.load(index, place % len(index), self.ready(only))

    def batch(self, *samples: Sample) -> Batch:
        """The samples as one batch of the model's capacities, on its device. What does not fit is dropped, and a warning says so."""
        made, counts = collate(list(samples), capacities=self.reading.capacities)
        for sentence in metrics.warnings({n: count for n, count in counts.items() if n.startswith("overflow/")}):
            warnings.warn(sentence, stacklevel=2)
        return made.to(tree.leaves(self.params)[0].device)

    def outputs(self, batch: Batch) -> dict:
        """Every boundary of the network in evaluation, as nested dicts; `tree.flatten` lists them by dotted path, and the family's
        `apply` says what each is. Raises ValueError of a pretraining, which has none here."""
        if self.task.apply is None:
            raise ValueError(
                f"{self.checkpoint} is a pretraining of {self.config.model}; its family's apply names its boundaries"
            )
        return self.task.apply(self.params, self.state, batch)[0]

    def detect(
        self,
        data: str | Path | Index,
        scene: str | None = None,
        version: str | None = None,
        columns: str = "",
        *,
        batch_size: int = 1,
        workers: int = 0,
        backend: compilation.Backend = "eager",
    ) -> dict[str, Detections]:
        """What is found in every key frame of `data` (of a scene of it), by its token, in the frame that `reading.base` names.

        data, scene, version, columns: as of `data.inputs.read`, or key frames. Raises ValueError, one sentence, for data without
        what the model reads.
        """
        index = data if isinstance(data, Index) else inputs.read(Path(data), scene, version, columns)
        found, _ = self.over(index, batch_size=batch_size, workers=workers, backend=backend)
        return found

    def over(self, index: Index, **settings: Any) -> tuple[dict[str, Detections], dict[str, float]]:
        """`detect.detect` of key frames: (detections by token, counts of what did not fit). Raises ValueError as `detect`."""
        reading = self.ready(index)
        device = str(tree.leaves(self.params)[0].device)
        settings |= {"device": device, "finish": self.task.finishing(train=False)}
        return detect(self.task.predict, self.params, self.state, index, reading, **settings)

    def ready(self, index: Index) -> Reading:
        """How these key frames are read. Raises ValueError, one sentence, where they have not what the model reads."""
        if self.task.score is not None:
            raise ValueError(
                f"{self.checkpoint} is a pretraining of {self.config.model}, which detects nothing; train a detector"
            )
        reading = self.reading
        if reading.cameras is not None and not index.has("scenes"):  # of no scene, nothing is told by time
            reading = replace(reading, cameras=replace(reading.cameras, history="scene"))
        self.task.needs.check(reading, train=False)
        inputs.check(index, reading)
        return reading


def load(
    path: str | PathLike[str], *, model: str | None = None, device: str = "cpu", averages: bool = True, **flags: Any
) -> Detector:
    """The model of a checkpoint: parameters, statistics, recipe, reading, and `predict`.

    Args:
        path: a run's folder (its best checkpoint, or the latest where none was evaluated), RUN/best, RUN/latest, a step's
            folder, a file of `bevfn checkpoint import`, or a published one (.pth, read without unpickling, or .safetensors).
        model: a name of the catalogue; by default the run's, or what the file looks like.
        device: torch device of the weights, or auto (see `distributed.chosen`).
        averages: of a run's averaged parameters, if it has any; False: those that it trained.
        flags: others of the recipe's, as precision="fp32" or scale="mini".

    Raises ValueError, one sentence, if nothing is there, it is damaged, or is a checkpoint of another model.
    """
    distributed.check_device(device)
    device = distributed.chosen(device)
    given = {name: value for name, value in ({"model": model} | flags).items() if value is not None}
    place = located.whole(Path(path))
    if place.is_dir():
        checkpoint.read_meta(place)  # or it is none
        experiment = of_run(place, model)
        is_run = (place.parent.parent / run_folder.CONFIG_FILE).is_file()
        own = run_config(experiment, place, None, model) if is_run else recipes.published(experiment, model)
        config = flagged(experiment, own, given)
        averaged = averages and checkpoint.averaged(place)
        made = Detector(experiment, config.plain(), *pretrained.read_weights(place, ema=averages), place, averaged)
    else:
        made = _of_file(place, model, given)
    check_fits(made.task, made.params, made.state, place)
    return replace(made, params=tree.to(made.params, device), state=tree.to(made.state, device))


# ------------------------------------------------------------------------------------------------ recipes of weights


def of_run(place: Path, model: str | None) -> str:
    """The experiment of a step folder: its run's, or that of the model that is named. Raises ValueError if they differ."""
    path = place.parent.parent / run_folder.CONFIG_FILE
    own = run_folder.read_config(path).get("model") if path.is_file() else None
    is_another = (
        isinstance(own, str) and own in catalogue.MODELS and known(model or own).experiment != known(own).experiment
    )
    if is_another:
        raise ValueError(
            f"{path} is of another experiment, {own}, not {model}; leave the model out or name its checkpoint"
        )
    name = model or (own if isinstance(own, str) and own else None)
    if name is None:
        raise ValueError(
            f"{place} lies in no run folder that names its model ({path}); name the model that it was trained as"
        )
    return known(name).experiment


def known(model: str) -> catalogue.Model:
    """The catalogue's entry. Raises ValueError for another name."""
    if model not in catalogue.MODELS:
        raise ValueError(f"model {printable(model)} is unknown; choose one of {', '.join(catalogue.MODELS)}")
    return catalogue.MODELS[model]


def run_config(experiment: str, checkpoint: Path, data_root: Path | None, model: str | None) -> command_line.Config:
    """The config of the run that the checkpoint belongs to; the model's defaults for an imported file."""
    path = checkpoint.parent.parent / run_folder.CONFIG_FILE
    is_run = checkpoint.is_dir() and path.is_file()
    own = run_folder.read_config(path).get("model") if is_run else None
    if isinstance(own, str) and own in catalogue.MODELS and catalogue.MODELS[own].experiment != experiment:
        right, run = catalogue.MODELS[own].experiment, path.parent
        raise ValueError(
            f"{run} is of the recipe {right} ({own}), not of {experiment}: `bevfn eval {right} --checkpoint {run}`"
        )
    known = own if isinstance(own, str) and own in recipes.load(experiment).DEFAULTS else None
    default = source.of_kind(recipes.defaults(experiment, model or known), data_root)
    if not is_run:
        if checkpoint.is_dir():
            whose = (
                "published settings" if data_root is not None else "settings for the synthetic world (no --data-root)"
            )
            print(f"{checkpoint} lies in no run folder ({path} is not there): read with {experiment}'s {whose}")
        return default
    silent = {field.name for field in fields(default)} - set(run_folder.read_config(path))
    if silent:
        default = replace(default, **{name: value for name, value in BEFORE.items() if name in silent})
    stored = run_folder.stored_config(path, default)  # or it is of another experiment, whose flags are others
    if silent:
        values = ", ".join(f"{name} {getattr(default, name)}" for name in sorted(silent))
        print(f"{path} is of an older bevfn, which did not have all flags: taken as {values}")
    return stored


def flagged(experiment: str, config: command_line.Config, given: Mapping[str, Any]) -> command_line.Config:
    """The config with other flags. Raises ValueError for one that the recipe has not."""
    if foreign := [name for name in given if not hasattr(config, name)]:
        what = FOREIGN.get(foreign[0], "has no such flag")
        raise ValueError(f"{experiment} {what}; leave out --{foreign[0].replace('_', '-')}")
    config = replace(config, **given)
    recipes.defaults(experiment, config.model)  # or it is of another experiment
    return config


def check_fits(task: tasks.Task, params: dict, state: dict, checkpoint: Path) -> None:
    """Raises ValueError, naming both sides and a difference, for a checkpoint of another model."""
    with torch.device("meta"):  # shapes alone
        ours = tree.flatten(dict(zip(("params", "state"), task.init())))
    differences = tree.diff(
        tree.flatten({"params": params, "state": state}), ours, names=("the checkpoint", f"{task.title}")
    )
    if differences:  # the last is of a leaf that both have, if there is one
        raise ValueError(
            f"{checkpoint}{_trained_as(checkpoint)} does not fit {task.title}: {differences[-1]} (and {len(differences) - 1} more "
            "differences); name the --model (of `bevfn eval` the experiment too) and give the flags that it was trained with"
        )


def _trained_as(checkpoint: Path) -> str:
    """ " (of bevfusion-lidar, mini size)" of a step in a run's folder, where the run says so."""
    file = checkpoint.parent.parent / run_folder.CONFIG_FILE
    if not (checkpoint.is_dir() and file.is_file()):
        return ""
    told = run_folder.read_config(file)
    return f" (of {printable(str(told.get('model')))}, {printable(str(told.get('scale')))} size)"


# ---------------------------------------------------------------------------------------------------- published files


def _of_file(file: Path, model: str | None, given: Mapping[str, Any]) -> Detector:
    """Of an imported file, or of a published one, which is imported here. Raises ValueError."""
    try:
        imported = upstream.read_imported(file)
    except upstream.NotImported:
        return _published(file, model, given)
    made = _recipe(file, imported.model, model, given, _named(imported.params))
    params, state = pretrained.usable(file, imported.params, imported.state)
    return replace(made, params=params, state=state)


def _published(file: Path, model: str | None, given: Mapping[str, Any]) -> Detector:
    tensors = upstream.read_state_dict(file)
    looks = recognise.recognise(tensors)
    layout = known(model).layout if model is not None else looks.model
    if layout is None or (looks.model is None and model is None):
        raise ValueError(
            f"{file} looks like {looks.what}, which is no detector that bevfn reads; it reads {', '.join(catalogue.LAYOUTS)}"
        )
    made = _recipe(file, layout, model, given, {key.removeprefix(looks.prefix): leaf for key, leaf in tensors.items()})
    try:
        params, state, report = upstream.import_state(tensors, layout, config=made.task.network)
    except ValueError as error:
        said = str(error) if str(file) in str(error) else f"{file}: {error}"
        if _is_mini(made, tensors, layout):
            named = "" if model is None else f"model={model!r}, "
            said = f"{said.removesuffix('.')}; it is of mini size, which `bevfn.load({str(file)!r}, {named}scale='mini')` reads"
        raise ValueError(said) from None
    for line in report.warnings:
        print(f"warning: {file}: {line}")
    return replace(made, params=params, state=state)


def _is_mini(made: Detector, tensors: Mapping[str, Tensor], layout: str) -> bool:
    """Whether what the recipe cannot be is it at mini size."""
    if made.config.scale == "mini":
        return False
    mini = replace(made, config=replace(made.config, scale="mini"))
    try:
        upstream.import_state(tensors, layout, config=mini.task.network)
    except ValueError:
        return False
    return True


def flags_of(made: Detector) -> dict[str, Any]:
    """Flags with which `load` reads this model's weights from a file of the published layout: those of its own, in the place of
    the published ones, on which its network or its reading depends, but for where data are."""
    published = recipes.published(made.experiment, made.config.model).plain()
    own = replace(made, config=replace(made.config, data_root=published.data_root))
    wanted, left = (own.task.network, own.reading), own.config
    for name in [field.name for field in fields(left)]:
        without = replace(own, config=replace(left, **{name: getattr(published, name)}))
        if without.config != left and (without.task.network, without.reading) == wanted:
            left = without.config
    return {
        field.name: value
        for field in fields(left)
        if (value := getattr(left, field.name)) != getattr(published, field.name)
    }


def _recipe(
    file: Path, layout: str, model: str | None, given: Mapping[str, Any], leaves: Mapping[str, Tensor]
) -> Detector:
    """A published layout's recipe, of the release that leaves are of, yet without weights. Raises ValueError for a part of a
    model."""
    if layout not in catalogue.LAYOUTS:
        raise ValueError(f"{file} is {layout}, a part that models start from (--pretrained), and no detector")
    name = model or catalogue.LAYOUTS[layout]
    experiment = known(name).experiment
    told = released(experiment, name, layout, leaves)
    config = flagged(experiment, recipes.published(experiment, name), told | dict(given))
    return Detector(experiment, config.plain(), {}, {}, file)


def of_release(experiment: str, model: str, file: Path) -> dict[str, Any]:
    """As `released`, of an imported file; nothing of a run's folder."""
    if not file.is_file():
        return {}
    imported = pretrained.imported(file)
    return released(experiment, model, imported.model, _named(imported.params))


def released(experiment: str, model: str, layout: str, leaves: Mapping[str, Tensor]) -> dict[str, Any]:
    """Flags of the recipe that the shapes of a published layout's leaves tell, where releases of the model differ."""
    told = getattr(recipes.load(experiment), "released", None)
    return {} if told is None else told(checkpoints.fitted(layout, leaves), model)


def _named(params: dict) -> dict[str, Tensor]:
    """As an imported file names them."""
    return {f"params.{name}": leaf for name, leaf in tree.flatten(params).items()}


def with_progress(
    over: Callable[..., tuple[dict, dict]], index: Index, *arguments: Any, **settings: Any
) -> tuple[dict, dict]:
    """`over(*arguments, **settings)`, a function such as `detect.detect` over these key frames, under a progress bar."""
    with Progress() as progress, waiting.batches("detecting", len(index), quiet=progress.console.is_terminal) as tell:
        bar = progress.add_task(f"{len(index)} key frames{f' of {index.split}' if index.split else ''}")

        def advanced(done: int, total: int) -> None:
            tell(done, total)
            progress.update(bar, total=total, completed=done)

        return over(
            *arguments,
            **settings,
            progress=advanced,
            warn=lambda sentence: progress.console.print(sentence, markup=False, soft_wrap=True),
        )
