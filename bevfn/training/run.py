"""A training run, the same for every experiment: epochs of steps, checkpoints, evaluation, stop and resume.

An experiment says what is trained (`tasks.Task`); how long, where and from when are the flags of `command_line.Config`.
Everything random is a function of (seed, epoch, position) or in the train state, so a run is resumed from its step alone.
"""

import contextlib
import dataclasses
import functools
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bevfn import compile as compilation
from bevfn import distributed, exits, host, memory, provenance, tree, waiting
from bevfn.data import loader, sampling, scene, source
from bevfn.files import read_json, to_json, write_atomically
from bevfn.training import (
    assembly,
    checkpoint,
    evaluations,
    finite,
    loggers,
    origin,
    pretrained,
    profiling,
    run_folder,
    signals,
    speed,
    train,
)
from bevfn.training.command_line import Config, Defaults, flags, parse
from bevfn.training.moving import Mover
from bevfn.training.reporter import Reporter, peak_memory
from bevfn.training.tasks import Data, Plan, Run, Task, check, drawn, on_what_is_there, plan, say
from bevfn.training.unread import Unread

# What a resumed run may change without changing its numbers.
FREE = frozenset(
    {
        *("workers", "resume", "force", "keep", "checkpoint_every", "on_damaged", "run_dir"),
        *("eval_every", "eval_last", "eval_backend", "loggers", "log_every", "profile", "peak_tflops"),
    }
)
# Samples of a run on a CPU from which on compiling its step pays: more than the time that it takes is won in later steps. By
# experiments/results/step_*_fp32_cpu.json it did after 22 (MatrixVT) to 200 samples (BEVFusion LiDAR-camera) of published size.
PAYS = 200


def cli(
    defaults: Defaults,
    make_task: Callable[[Any], Task],
    description: str | None,
    *,
    arguments: list[str] | None = None,
    prog: str | None = None,
) -> None:
    """Parses the command line (`arguments`, of the command `prog`; by default this process' own); a user's mistake ends in one
    sentence and an exit code (see exits.py)."""
    with exits.one_sentence():
        config = parse(defaults, sys.argv[1:] if arguments is None else arguments, description, prog)
        main(make_task, config)


def main(make_task: Callable[[Any], Task], config: Config) -> dict:
    """Trains, evaluates, reports, on one process or as one of torchrun's; returns the summary that it writes.

    Raises ValueError and OSError of one sentence for what a user can mend, distributed.Lost where another process of the
    run is gone, and signals.Stopped, a SystemExit, after a signal.
    """
    host.keep_freed_memory()
    for backend in {config.backend, config.eval_backend} - {"auto"}:
        compilation.check_backend(backend)
    loggers.check(config.loggers)
    if config.resume:
        run_folder.check_resumable(config.run_dir, config.model)
    else:  # a checkpoint has all of them
        for path in config.pretrained:
            pretrained.check(path)
    replicas = distributed.start(config.device)
    try:
        leads = replicas is None or replicas.rank == 0
        with distributed.watched(replicas), contextlib.ExitStack() as stack:
            if leads:
                source.prepare(config.data_root, config.world)
            distributed.gather(None, replicas)  # the others wait for it
            config = on_device(config.completed(), leads=leads)
            with waiting.told("reading the data set") if leads else contextlib.nullcontext():
                task = make_task(config)
                check(task, whole=config.on_damaged == "stop")
                if config.on_damaged == "skip":
                    task = on_what_is_there(task, print if leads else lambda text: None)
            planned = plan(config, task.data.items, replicas)
            config = with_backend(config, planned, leads=leads)
            run = Run(task, config, planned, replicas)
            run = dataclasses.replace(run, facts=facts(run))
            latest = stack.enter_context(open_folder(run)) if run.leads else None
            agreed = distributed.gather(None if latest is None else str(latest), replicas)[0]  # of the one that leads
            return _train(run, None if agreed is None else Path(agreed))
    finally:
        distributed.stop()


def on_device(config: Config, *, leads: bool = True) -> Config:
    """The config with the device that "auto" means here, which is said."""
    device = distributed.chosen(config.device)
    if device != config.device and leads:
        print(
            f"device {device} (--device {config.device}: {', '.join(distributed.PREFERRED)}, the first that is there)",
            flush=True,
        )
    if device.startswith("npu") and config.backend == "inductor" and leads:
        print("hint: on an NPU --backend torchair --eval-backend torchair are made for it (docs/ascend.md)", flush=True)
    return dataclasses.replace(config, device=device)


def with_backend(config: Config, plan: Plan, *, leads: bool = True) -> Config:
    """The config with the backend that "auto" means for this run, which is said."""
    if config.backend != "auto":
        return config
    samples = plan.total_steps * config.batch_size * config.accumulate  # of one device
    backend: compilation.Backend
    if config.device.startswith("cpu"):
        backend = "eager" if samples < PAYS else "inductor"
        why = f"on a CPU compiling pays from about {PAYS} samples on, and this run has {samples}"
    elif config.device.startswith("npu"):
        backend, why = "torchair", "which is made for NPUs"
    else:
        backend, why = "inductor", "of GPUs it was not measured when compiling pays"
    if leads:
        print(f"backend {backend} (--backend auto: {why})", flush=True)
    compilation.check_backend(backend)
    return dataclasses.replace(config, backend=backend)


def _train(run: Run, latest: Path | None) -> dict:
    """The run from its latest checkpoint, or from the start; its summary."""
    started = time.perf_counter()
    if latest is not None and (summary := finished(run, latest)) is not None:
        return summary
    train_state, step = assembly.build(run, resumed=latest is not None)
    if latest is not None:
        train_state, _ = checkpoint.load_step(latest, train_state)
    start = int(train_state.step)
    say(run, describe(run, train_state, start))
    with reporting(run, start) as reporter:
        told = Told(run, reporter, start)
        if start == 0 and run.config.eval_first:
            told.summary["scores_before"] = told.evaluate(train_state, 0)
        if start and evaluations.due(run, start) and not evaluations.evaluated(run, start):  # killed before or in it
            told.summary["scores"] = told.evaluate(train_state, start)
        _steps(run, train_state, step, told)
    return finish(run, told.summary, told.seconds, started)


class Told:
    """What a run has told so far: its summary, the seconds of its steps, and its reporter."""

    def __init__(self, run: Run, reporter: Any, start: int) -> None:
        self.reporter, self.start, self.unread = reporter, start, Unread(run)
        self.evaluate = functools.partial(evaluations.evaluate, run, report=reporter.evaluated)
        self.summary: dict[str, Any] = {"steps": start}
        self.seconds: list[float] = []

    def read(self, train_state: train.TrainState) -> None:
        """Reads and tells the metrics of all steps that were not read yet."""
        for made, values, took in self.unread.read(train_state):
            self.seconds.append(took)
            self.reporter.log(made, values, took)
            loss = values["loss/total"]
            self.summary.update({"first_loss": self.summary.get("first_loss", loss), "last_loss": loss, "steps": made})


def _steps(run: Run, train_state: train.TrainState, step: Callable, told: Told) -> None:
    """The steps that are left, with their checkpoints and evaluations. Raises `signals.Stopped` where the run is ended."""
    problems: list[Exception] = []
    less = memory.smaller(run.config.batch_size, run.config.accumulate, run.config.checkpoint_activations)
    with (
        signals.on_terminate() as stop,
        contextlib.closing(microbatches(run, told.start)) as stream,
        saved_when_others_end(run, train_state),
        profiling.traced(run) as next_traced,
    ):
        mover, done = Mover(readable(run, stream, problems), run.device), told.start
        told.unread.start_clock()
        while (item := mover.take()) is not None:
            done, loaded, batches = item
            first = done == told.start + 1
            if first and run.leads:
                told.reporter.work = speed.counted(run, train_state, batches[0], told.reporter.work)
            what = doing(run, train_state) if first else f"step {done}"
            with memory.advised(less), told.reporter.working(what), profiling.phase("step"):
                train_state, metrics = step(train_state, batches)
            told.unread.add(done, metrics, loaded, batches)
            if not evaluations.due(run, done):  # which wants the memory, and no reading processes beside its own
                mover.fetch()
            due = first or report_due(run, done)
            with profiling.phase("report"):
                if due:
                    told.read(train_state)
            if distributed.agree(stop.requested, run.replicas):
                break
            if checkpoint_due(run, done):
                save(run, train_state, done)
            if evaluations.due(run, done):
                told.summary["scores"] = told.evaluate(train_state, done)
            next_traced()
            if due:
                told.unread.start_clock()
        told.read(train_state)
        if distributed.agree(stop.requested or bool(problems), run.replicas):
            save_at_stop(run, train_state, told.start, done, stop, problems)
            raise signals.Stopped(stop.number or signal.SIGTERM)  # which another process got


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
            sampling.order(drawn(data, config.seed, epoch), config.seed, epoch, shuffle=True),
            settings,
            seed=config.seed,
            epoch=epoch,
            capacities=reading.capacities,
            rank=rank,
            replicas=count,
            accumulate=config.accumulate,
            start_step=within,
            finish=run.task.finishing(train=True),
        )
        with contextlib.closing(stream):
            for step in range(epoch * plan.steps_per_epoch + within, (epoch + 1) * plan.steps_per_epoch):
                if step == plan.total_steps:
                    return
                yield step + 1, [next(stream) for _ in range(config.accumulate)]
        within = 0


# -------------------------------------------------------------------------------------------- saving, stopping, ending


def checkpoint_due(run: Run, done: int) -> bool:
    return run.config.mode == "full" and (done % checkpoint_every(run) == 0 or done == run.plan.total_steps)


def report_due(run: Run, done: int) -> bool:
    """Whether the metrics of the steps so far are read: every so often, and before anything is kept or judged."""
    kept = checkpoint_due(run, done) or evaluations.due(run, done)
    return done % run.log_every == 0 or done == run.plan.total_steps or kept


def checkpoint_every(run: Run) -> int:
    return run.config.checkpoint_every or run.plan.steps_per_epoch


def save(run: Run, train_state: train.TrainState, done: int) -> None:
    """A checkpoint; every process has the same state, one writes. Raises ValueError where it is of no use."""
    finite.check_state(train_state, done)
    if run.leads:
        write(run, train_state, done)


def write(run: Run, train_state: train.TrainState, done: int) -> None:
    """A checkpoint of this process' state, with what the run's numbers depend on."""
    folder = run.config.run_dir / run_folder.CHECKPOINTS / run_folder.step_name(done)
    meta = {"step": done, run_folder.FACTS: run.facts, run_folder.FLAGS: flags(run.config)}
    checkpoint.save_step(folder, train_state, meta, keep=run.config.keep)


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
            folder = run.config.run_dir / run_folder.CHECKPOINTS / run_folder.step_name(done)
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
    done, path = checkpoint.read_meta(latest).get("step"), run.config.run_dir / run_folder.SUMMARY
    if done is not None and done > run.plan.total_steps:
        raise ValueError(f"{latest} has made {done} steps, the run has {run.plan.total_steps}; give the old flags")
    if done != run.plan.total_steps or not path.is_file() or not evaluations.evaluated(run, done):
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
        **provenance.head(run.device),
    }
    if run.leads:
        write_atomically(run.config.run_dir / run_folder.SUMMARY, to_json(summary, indent=1))
    counted_from = (
        f"after {run.config.warm_up} steps" if len(seconds) > run.config.warm_up else "without the first step"
    )
    pace = "no step was left to make" if speed is None else f"{speed:.3g} samples/s {counted_from}"
    say(run, f"{pace}, {summary['minutes']:.1f} minutes; all in {run.config.run_dir}")
    return summary


# -------------------------------------------------------------------------------------------------- folder and report


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
        first=min(checkpoint_every(run), run.plan.total_steps) if config.mode == "full" else None,
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
    weights = [f"{share.root} {share.weight:g}" for share in data.training.shares]
    return {
        "processes": processes,
        "accumulate": run.config.accumulate,
        "microbatches": processes * run.config.accumulate,
        "samples_per_epoch": len(data.items),
        "total_steps": plan.total_steps,
        "data": origin.data(data.training, data.items),
        "evaluation_data": origin.data(data.evaluation, np.arange(len(data.evaluation))),  # the best is of one's scores
        "code": origin.code(),
        **({} if data.database is None else {"database": data.database.key}),
        **({"weights": weights} if weights else {}),
    }


def doing(run: Run, train_state: train.TrainState) -> str:
    """What the first step is doing. How long it compiles is told by the number of parameters: for BEVFusion's 560, 4 minutes on
    two cores with AVX-512, 6 without."""
    if run.config.backend != "inductor":
        return "first step"
    minutes = max(1, round(len(tree.leaves(train_state.params)) / 110))
    return f"first step, compiling (about {minutes} minute{'s' if minutes > 1 else ''} the first time, less from the cache)"


def describe(run: Run, train_state: train.TrainState, done: int) -> str:
    """What is about to be trained, on what, for how long, and where the learning rate comes from."""
    config, plan, data = run.config, run.plan, run.task.data
    lr = run.task.optimizer(plan).lr
    peak = max((lr.start, *(phase.target for phase in lr.phases)))
    same = ", which its scores are of too" if data.training.split == data.evaluation.split else ""
    scaling = "--lr" if config.lr is not None else f"{config.lr_scaling} scaling from batch {config.recipe_batch}"
    return (
        f"{run.task.title}: {tree.num_elements(train_state.params) / 1e6:.1f} M parameters, {config.precision} on "
        f"{run.device} through {config.backend}\n"
        f"{data.training.root} ({data.training.split or 'one frame'}{same}): {len(data.items)} samples an epoch{shares(data)}, "
        f"{plan.total_steps} steps of {plan.batch}{f', from step {done} on' if done else ''}; "
        f"peak learning rate {peak:.4g} ({scaling})"
    )


def shares(data: Data) -> str:
    """Of how many samples of an epoch are of which data set of a mixture, for a sentence; empty of one data set."""
    of = data.training.shares
    told = (f"{count:,} of {share.root}" for share, count in zip(of, sampling.counts(len(data.items), of)))
    return f" ({', '.join(told)})" if of else ""


def reporting(run: Run, start: int) -> contextlib.AbstractContextManager:
    """The Reporter of the process that leads, a silent one elsewhere."""
    if run.leads:
        config = run.config
        return Reporter(
            *(config.run_dir, run.plan.total_steps),
            start_step=start,
            config=flags(config),
            others=config.loggers,
            work=speed.Work(run.plan.batch, peak=speed.peak(run)),
        )
    return contextlib.nullcontext(_Silent())


class _Silent:
    def log(self, *_: Any) -> None:
        """Nothing: another process reports."""

    def evaluated(self, *_: Any) -> None:
        """Nothing: what is reported is the leading process'."""

    def working(self, _: str) -> contextlib.AbstractContextManager[None]:
        """Nothing either."""
        return contextlib.nullcontext()
