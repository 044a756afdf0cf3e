"""Run folders of mini models that nobody trained: config.json and a checkpoint with averages, in a second."""

from dataclasses import replace
from pathlib import Path

import torch

from bevfn import catalogue, recipes, tree
from bevfn.data import source
from bevfn.data.index import Index
from bevfn.detector import NOTHING
from bevfn.files import to_json, write_atomically
from bevfn.training import checkpoint, command_line, run_folder, tasks

HOW = {"scale": "mini", "backend": "eager", "eval_backend": "eager", "workers": 0, "batch_size": 1}


def config(model: str, **flags) -> command_line.Config:
    """The published recipe at mini size."""
    return replace(recipes.published(catalogue.MODELS[model].experiment, model), **HOW | flags)


def task(made: command_line.Config, index: Index = NOTHING) -> tasks.Task:
    """A config's, of some key frames or of none."""
    recipe = recipes.load(catalogue.MODELS[made.model].experiment)
    return recipe.task(made.plain(), source.Source(index, index))


def weights(made: command_line.Config) -> tuple[dict, dict]:
    """(params, state) of a config's model, no leaf of which is a constant."""
    params, state = task(made).init()
    drawn = torch.Generator().manual_seed(1)

    def stirred(leaf):
        return leaf + 0.01 * torch.rand(leaf.shape, generator=drawn)

    return tree.map(stirred, params), tree.map(stirred, state)


def write(folder: Path, model: str, *, step: int = 1, **flags) -> Path:
    """A step's folder in a run of the model; its averages are its parameters times 0.75."""
    made = config(model, run_dir=folder, **flags)
    params, state = weights(made)
    step_folder = folder / run_folder.CHECKPOINTS / run_folder.step_name(step)
    averages = {"params": tree.map(lambda leaf: 0.75 * leaf, params), "state": tree.map(torch.clone, state)}
    train_state = {"params": params, "state": state, "ema": averages}
    checkpoint.save_step(step_folder, train_state, {"step": step})
    write_atomically(folder / run_folder.CONFIG_FILE, to_json(command_line.flags(made)))
    return step_folder
