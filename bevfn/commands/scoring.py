"""What `bevfn eval` does: a checkpoint over a split, scored by the devkit or the T4 metric, or a submission."""

import itertools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bevfn import detector, distributed, host, recipes, tree, waiting
from bevfn.choices import Augmented
from bevfn.data import source
from bevfn.evaluation import apart, results, tables
from bevfn.evaluation import tta as augmented
from bevfn.evaluation.detect import collect, detect
from bevfn.evaluation.judge import RESULTS, RESULTS_T4, forget, judge, measure, submission
from bevfn.evaluation.score import METRICS
from bevfn.files import check_writable, to_json, write_atomically
from bevfn.names import file_name
from bevfn.precision import Precision
from bevfn.training import checkpoint as checkpoints
from bevfn.training import command_line, located, pretrained, run_folder, tasks


def evaluate(experiment: str, checkpoint: Path, asked: dict[str, Any]) -> int:
    """`bevfn eval` of these flags, by name, see `commands.evaluate`: its exit code."""
    device, out = asked["device"], asked["out"]
    metric, against = asked["metric"], asked["against"]
    distributed.check_device(device or distributed.AUTO)
    host.keep_freed_memory()
    checkpoint = located.whole(checkpoint)
    of_task = set(asked) - {"device", "out", "backend", "metric", "against", "batch_size", "workers", "tta"}
    config = _config(experiment, checkpoint, device, {name: asked[name] for name in of_task})
    with waiting.told("reading the data set"):
        task = _scored_by(metric, recipes.load(experiment).task(config.plain()))
        out = _folder(checkpoint, task.data.evaluation.split) if out is None else _not_the_runs(out)
        _check(task, out)
    settings: dict[str, Any] = {
        "batch_size": asked["batch_size"],
        "workers": asked["workers"],
        "backend": _backend(asked["backend"], config),
        "device": config.device,
        "tta": asked["tta"],
    }
    if task.score is not None and asked["tta"] is not None:
        raise ValueError(f"{config.model} detects nothing, so --tta {asked['tta']} has no boxes to merge; leave it out")
    if asked["tta"] is not None and not config.augment:
        print(
            "warning: this model was trained without --augment and saw nothing mirrored: --tta may turn its boxes round"
        )
    reference = None if against is None else _other(experiment, config, task, against)
    found, counts = _found(task, checkpoint, **settings)
    sure = None if reference is None else _found(reference, checkpoint, **settings)[0]
    told: dict[str, Any] = {"title": f"{task.title}, {checkpoint.name}", "counts": counts}
    if task.score is None and not task.data.evaluation.annotated:
        with waiting.told("writing the results"):
            _submit(task, found, counts, out)
        return _apart(sure, found, out, against, config.precision)
    with waiting.told("scoring"):
        if task.score is not None:
            judgement = measure(found, task.score, out, **told)
        else:
            told |= {"config": command_line.flags(config), "bottom": task.bottom}
            judgement = judge(task.data.evaluation, found, task.data.eval_reading, out, **told)
    print(f"{judgement.text}\neverything is in {out}")
    return _apart(sure, found, out, against, config.precision)


def _backend(asked: str | None, config: command_line.Config) -> str:
    """What compiles, which is said: as asked, else as the run evaluated itself, if that is of this device."""
    chosen = asked or config.eval_backend
    if asked is None and chosen in ("torchair", "npugraph-ex") and not config.device.startswith("npu"):
        chosen = "eager"
    if chosen != "eager":
        print(
            f"backend {chosen}: the first batch is compiled, which takes minutes; --backend eager does without",
            flush=True,
        )
    return chosen


def _other(experiment: str, config: command_line.Config, task: tasks.Task, precision: Precision) -> tasks.Task:
    """The task in another precision, of the same key frames. Raises ValueError where there is nothing to compare."""
    if precision == config.precision or task.score is not None:
        what = "detects nothing" if task.score is not None else f"is run in {precision} anyway"
        raise ValueError(f"{config.model} {what}, so --against {precision} compares nothing; leave it out")
    splits = source.Source(task.data.evaluation, task.data.evaluation)
    return recipes.load(experiment).task(replace(config, precision=precision).plain(), splits)


def _apart(sure: dict | None, found: dict, out: Path, against: str | None, precision: str) -> int:
    """Says how far the boxes found are from those of --against, where there are any: the exit code."""
    if sure is None or against is None:
        return 0
    distances = apart.measure(sure, found)
    print(distances.text(against, precision))
    write_atomically(
        out / "apart.json", to_json({"against": against, "precision": precision} | distances.numbers(), indent=1)
    )
    return 0 if distances.ok else 1


def _scored_by(metric: Literal["nuscenes", "t4"] | None, task: tasks.Task) -> tasks.Task:
    """The task whose key frames are scored by a metric, None: their own."""
    if metric is None:
        return task
    return replace(task, data=replace(task.data, evaluation=replace(task.data.evaluation, metric=metric)))


def _config(experiment: str, checkpoint: Path, device: str | None, flags: dict[str, Any]) -> command_line.Config:
    """The config that the checkpoint is evaluated with: its run's, with the flags that are given (not None)."""
    given = {name: value for name, value in flags.items() if value is not None}
    config = detector.run_config(experiment, checkpoint, given.get("data_root"), given.get("model"))
    given = detector.of_release(experiment, config.model, checkpoint) | given
    if (split := given.pop("split", None)) is not None:
        root, version = given.get("data_root", config.data_root), given.get("version", config.version)
        if what := source.trained_on(root, version, config.train_split, split, config.world):
            print(f"warning: {what}")
        given |= {"train_split": split, "eval_split": split}  # of a task's two, one is run over
    return replace(detector.flagged(experiment, config, given), device=_device(device, config.device), resume=False)


def _device(asked: str | None, of_run: str) -> str:
    """The device that is asked for, the run's where it is here, or auto's; says which where nobody asked for it."""
    wanted = asked or of_run
    device = distributed.chosen(wanted if asked or distributed.is_there(of_run) else distributed.AUTO)
    if device != wanted:
        why = f"--device {wanted}" if wanted == distributed.AUTO else f"the run's {wanted} is not here"
        print(f"device {device} ({why})", flush=True)
    return device


def _check(task: tasks.Task, out: Path) -> None:
    """Raises ValueError for what the model need not run for: key frames that cannot be scored, a folder that cannot be
    written."""
    tasks.check(task, train=False)
    if task.score is None and task.data.evaluation.annotated:
        source.check_scored(task.data.evaluation, results.KNOWN_ATTRIBUTES)
    check_writable(out)


def _found(
    task: tasks.Task, checkpoint: Path, *, device: str, tta: Augmented | None, **settings: Any
) -> tuple[dict, dict]:
    """What `detect` (`collect`, where the task has a score) returns of the checkpoint's weights, under a progress bar; settings:
    its others."""
    over = detect if tta is None else partial(augmented.detect, detect, kind=tta)
    with waiting.told("reading the weights"):
        params, state = (tree.to(part, device) for part in pretrained.read_weights(checkpoint, ema=True))
        detector.check_fits(task, params, state, checkpoint)
    index = task.data.evaluation
    return detector.with_progress(
        *(over if task.score is None else collect, index),
        *(task.predict, params, state, index, task.data.eval_reading),
        device=device,
        finish=task.finishing(train=False),
        **settings,
    )


def _folder(checkpoint: Path, split: str) -> Path:
    """A new folder beside the run's own evaluations, or in runs/ for an imported file."""
    home = (checkpoint.parent.parent if checkpoint.is_dir() else command_line.RUNS) / "evaluations"
    name = f"{checkpoint.stem}_{file_name(split) if split else 'eval'}"
    names = (name if number == 1 else f"{name}_{number}" for number in itertools.count(1))
    return next(home / name for name in names if not (home / name).exists())


def _not_the_runs(out: Path) -> Path:
    """The folder. Raises ValueError for that of an evaluation which a run made itself, however it is written."""
    place = out.resolve()
    home = place.parent
    own = checkpoints.NAME.fullmatch(place.name) and (home.parent / run_folder.CONFIG_FILE).is_file()
    if own and home.name == "evaluations" and (place / METRICS).is_file():
        raise ValueError(f"{out} is the run's own evaluation; choose another --out, or leave it out for a new folder")
    return out


def _submit(task: tasks.Task, found: dict, counts: dict[str, float], out: Path) -> None:
    """The results of a split without annotations, and of nuScenes' test split what the server takes."""
    index, reading = task.data.evaluation, task.data.eval_reading
    t4 = index.judge == "t4"
    ranges = dict.fromkeys(reading.class_names, math.inf) if t4 else results.RANGES
    document = submission(index, found, reading, ranges, bottom=task.bottom)
    forget(out)
    for name in (RESULTS_T4,) if t4 else (RESULTS, "submission.zip"):
        results.write(out / name, document, reading.class_names)
    told = f"submit {out / 'submission.zip'} (its meta says use_external false: see results.Meta)"
    if t4:
        told = f"{index.root} has no annotations there, so they are not scored; detections are in {out / RESULTS_T4}"
    print(f"{len(found)} key frames; {told}")
    for line in tables.counted(counts):
        print(line)
