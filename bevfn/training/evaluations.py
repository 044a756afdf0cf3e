"""When a run is evaluated, how, and where that is written; the best checkpoint is kept."""

from collections.abc import Callable
from pathlib import Path

from bevfn import waiting
from bevfn.evaluation.detect import collect, detect
from bevfn.evaluation.score import METRICS
from bevfn.training import checkpoint, finite, run_folder, train
from bevfn.training.command_line import flags
from bevfn.training.tasks import Run, say


def due(run: Run, done: int) -> bool:
    config, (epoch, rest) = run.config, divmod(done, run.plan.steps_per_epoch)
    asked = config.eval_every > 0 and epoch % config.eval_every == 0
    now = rest == 0 and (asked or epoch > run.plan.epochs - config.eval_last)
    return config.mode == "full" and (now or done == run.plan.total_steps)


def evaluate(
    run: Run, train_state: train.TrainState, done: int, report: Callable[[int, dict, Path | None], None]
) -> dict[str, float]:
    """Scores of the evaluation split after `done` steps, by name; files in evaluations/step_... report: `Reporter.evaluated`."""
    finite.check_state(train_state, done)
    weights = train_state.ema or {"params": train_state.params, "state": train_state.state}
    data, config = run.task.data, run.config
    over_all: Callable[..., tuple[dict, dict[str, float]]] = detect if run.task.score is None else collect
    with waiting.batches(f"evaluating step {done}", len(data.evaluation), quiet=not run.leads) as progress:
        found, counts = over_all(
            *(run.task.predict, weights["params"], weights["state"]),
            *(data.evaluation, data.eval_reading),
            batch_size=config.batch_size,
            workers=config.workers,
            backend=config.eval_backend,
            device=run.device,
            replicas=run.replicas,
            finish=run.task.finishing(train=False),
            warn=print,
            progress=progress,
        )
    if not run.leads:
        return {}
    from bevfn.evaluation.judge import judge, measure  # imports matplotlib, which help need not wait for

    out = folder(run, done)
    counts |= {"missing/key_frames": data.left_out}
    title = f"{run.task.title}, step {done}"
    with waiting.told("scoring"):
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
    report(done, judgement.numbers | judgement.by_class, judgement.picture)
    if done:
        checkpoint.keep_best(config.run_dir / run_folder.CHECKPOINTS, out.name, judgement.value)
    return judgement.numbers


def folder(run: Run, done: int) -> Path:
    """Where the evaluation after `done` steps is written."""
    return run.config.run_dir / run_folder.EVALUATIONS / run_folder.step_name(done)


def evaluated(run: Run, done: int) -> bool:
    """Whether that evaluation came to its end, which is when its metrics are written."""
    return (folder(run, done) / METRICS).is_file()
