"""What a recipe of experiments/ is to the commands: found by its name in the catalogue.

Only commands and benchmarks, which stand above the experiments, import this.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

from bevfn import catalogue, choices
from bevfn.data import source
from bevfn.training import command_line, tasks

Experiment = choices.Experiment


class Recipe(Protocol):
    """A file of experiments/: its models' networks, their flags' defaults (of the published data first), the task of a config."""

    NETWORKS: Mapping[str, Callable[[], Any]]
    DEFAULTS: command_line.Defaults

    def task(self, config: Any, splits: source.Source | None = None) -> tasks.Task:
        """`splits`: key frames other than the config's."""


def load(experiment: str) -> Recipe:
    """The recipe of an experiment."""
    return cast(Recipe, importlib.import_module(f"bevfn.experiments.{experiment}"))


def defaults(experiment: str, model: str | None = None) -> Mapping[source.Kind, command_line.Config]:
    """The flags' defaults of one of an experiment's models, of the first for None; raises ValueError for another's."""
    made = load(experiment).DEFAULTS
    name = next(iter(made)) if model is None else model
    if name not in made:
        raise ValueError(
            f"model {name} is none of {experiment}'s ({', '.join(made)}); name the experiment "
            f"{catalogue.MODELS[name].experiment if name in catalogue.MODELS else 'that it was trained with'}"
        )
    return made[name]


def on_frame(model: str, root: Path, **flags: Any) -> tasks.Run:
    """What the recipe of a model trains on the one key frame at `root`, with its flags for one but `flags`."""
    experiment = catalogue.MODELS[model].experiment
    config = replace(defaults(experiment, model)["frame"], data_root=root, **flags)
    task = load(experiment).task(config)
    return tasks.Run(task, config, tasks.plan(config, task.data.items))


def published(experiment: str, model: str | None = None) -> command_line.Config:
    """The defaults of the data that a model is published on, which are the first."""
    return next(iter(defaults(experiment, model).values()))
