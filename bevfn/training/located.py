"""Where weights lie: what a user means by a run's folder, RUN/best, RUN/latest, a step's folder or a file."""

import difflib
from pathlib import Path

from bevfn.training import checkpoint, run_folder

BEST, LATEST = "best", "latest"
RUNS = Path("runs")
OTHERS = (".pth", ".pt", ".ckpt", ".bin")  # files of weights of other tools
NOTES = (".json", ".jsonl")  # files of a run that hold none


def whole(path: Path) -> Path:
    """The step folder that a run's folder (its best, or the latest where none was evaluated) or RUN/best means; any other path
    is itself. Raises ValueError, one sentence, where nothing is there, or a run has none."""
    if path.name in (BEST, checkpoint.BEST, LATEST) and not path.is_dir():
        word = LATEST if path.name == LATEST else BEST
        found = _chosen(_checkpoints(path.parent), word)
        if found is None:
            raise ValueError(f"{path.parent} has no {word} checkpoint; {_has(path.parent)}")
        return found
    if not path.exists():
        raise ValueError(f"{path} is not there; {near(path, weights=True)}")
    if path.suffix in NOTES and path.is_file():
        raise ValueError(f"{path} holds no weights; {_folders(path)}")
    inside = _checkpoints(path)
    if not path.is_dir() or (path / checkpoint.META).exists() or not (inside != path or checkpoint.steps(path)):
        return path
    found = _chosen(inside, BEST) or _chosen(inside, LATEST)
    if found is None:
        raise ValueError(f"{path} holds no whole checkpoint; {_has(path)}")
    return found


def _folders(path: Path) -> str:
    """What there is here in the place of a file of weights as other tools write them."""
    homes = (home for home in (path.parent, path.parent.parent) if _checkpoints(home) != home)
    home = next(homes, RUNS / "NAME")
    return f"a run's checkpoints are folders: give {home} (its best), {home / LATEST}, or {home / run_folder.CHECKPOINTS}/step_..."


def near(path: Path, *, weights: bool = False) -> str:
    """What a mistyped path may have meant: the first part of it that is not there, and what is there instead of it; weights:
    they were meant, so that of a run its checkpoints are."""
    missing = next(part for part in (*reversed(path.parents), path) if not part.exists())
    if not missing.parent.is_dir():
        return f"{missing.parent} is no folder"
    there = sorted(entry.name for entry in missing.parent.iterdir() if not entry.name.startswith("."))
    kept = _kept(missing.parent) if weights and path.suffix not in OTHERS else {}
    if alike := difflib.get_close_matches(missing.name, [*kept, *there], n=1, cutoff=0.6):
        return f"did you mean {kept.get(alike[0], missing.parent / alike[0]) / path.relative_to(missing)}?"
    of_runs = RUNS / path  # itself where it is absolute
    if weights and path.suffix in NOTES + OTHERS:
        return _folders(of_runs if of_runs.exists() else path)
    if kept:
        return f"the checkpoints there are {', '.join(str(place) for place in list(kept.values())[-5:])}"
    if weights and of_runs.exists():
        return f"did you mean {of_runs}?"
    return f"{missing.parent.absolute()} has {', '.join(there[-5:]) or 'nothing'}"


def _kept(folder: Path) -> dict[str, Path]:
    """What weights can be named by in a run's folder, or in its folder of checkpoints; nothing elsewhere."""
    home = _checkpoints(folder)
    steps = {step.name: step for step in checkpoint.steps(home)}
    words = {word: folder / word for word in (LATEST, BEST) if _chosen(home, word) is not None}
    return steps | words if steps else {}


def _checkpoints(folder: Path) -> Path:
    """A run's folder of them, or itself."""
    return folder / run_folder.CHECKPOINTS if (folder / run_folder.CHECKPOINTS).is_dir() else folder


def _chosen(checkpoints: Path, word: str) -> Path | None:
    if not checkpoints.is_dir():
        return None
    return checkpoint.best(checkpoints) if word == BEST else checkpoint.latest(checkpoints)


def _has(folder: Path) -> str:
    names = [step.name for step in checkpoint.steps(_checkpoints(folder))]
    return f"it has {', '.join(names[-5:])}" if names else "give a run's folder with checkpoints/step_..., or a file"
