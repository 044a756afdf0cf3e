"""The world and the detector that the notebooks share: those of `make demo` where the clone has them, else smaller ones.

The smaller ones are made in runs/notebooks: a world in seconds, and BEVFusion with LiDAR and cameras, at mini size, trained on it for
STEPS steps, minutes on two cores, once. Own data and own weights go into a notebook's first cell instead.
"""

import os
from dataclasses import replace
from pathlib import Path

from bevfn import recipes, synth
from bevfn.training import run, run_folder

RUNS = Path(os.path.relpath(Path(__file__).resolve().parents[1])) / "runs"
SCENES, FRAMES = 2, 10
"""of the world; the second scene is the val split"""
IMAGE = (225, 400)
STEPS = 100


def folder(name: str) -> Path:
    """Of runs/notebooks, for what a notebook makes."""
    return RUNS / "notebooks" / name


def world() -> Path:
    """A nuScenes root of a synthetic world."""
    if (made := RUNS / "world").is_dir():
        return made
    how = {"scenes": SCENES, "frames_per_scene": FRAMES, "image_size": IMAGE}
    synth.write(folder("world"), **how, workers=1, progress=False)
    return folder("world")


def detector() -> Path:
    """The folder of a finished run on `world`, as `bevfn train bevfusion` makes it."""
    if (RUNS / "demo" / run_folder.SUMMARY).is_file():
        return RUNS / "demo"
    made = folder("detector")
    if not (made / run_folder.SUMMARY).is_file():
        recipe = recipes.load("bevfusion")
        config = replace(
            recipes.defaults("bevfusion")["synthetic"],
            data_root=world(),
            run_dir=made,
            backend="eager",
            steps=STEPS,
            batch_size=1,
            workers=0,
            sweeps=0,
            eval_first=False,
            device="cpu",
            resume=made.is_dir(),  # of a run that was stopped
        )
        run.main(recipe.task, config)
    return made
