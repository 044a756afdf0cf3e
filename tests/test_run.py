"""Whole runs of a tiny experiment: what they leave, and that killing, stopping and splitting them changes no number."""

import dataclasses
import gzip
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_world
import tiny_experiment as tiny
import torch
from fuzz import bounded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from bevfn.data import loader, paste, sampling, scene
from bevfn.data.reading import CLASS_NAMES
from bevfn.distributed import Replicas
from bevfn.files import read_json
from bevfn.kernels import native
from bevfn.metrics import METRICS_FILE, read_metrics
from bevfn.training import (
    assembly,
    checkpoint,
    command_line,
    optim,
    origin,
    pretrained,
    profiling,
    reporter,
    run,
    tasks,
    train,
    unread,
)
from bevfn.training.board import FOLDER as BOARD
from bevfn.training.reporter import WORST

HERE = Path(__file__).parent
STEPS = 6  # 3 epochs of 2


@pytest.fixture(scope="module")
def root():
    return small_world.index().root


def command(root: Path, run_dir: Path, *flags: str) -> list[str]:
    return [str(HERE / "tiny_experiment.py"), "--data-root", str(root), "--run-dir", str(run_dir), *flags]


def launch(words: list[str], **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start(root: Path, run_dir: Path, *flags: str) -> subprocess.Popen:
    return launch([sys.executable, *command(root, run_dir, *flags)])


def cli(root: Path, run_dir: Path, *flags: str) -> tuple[int, str]:
    """(exit code, what it printed) of the same in this process, which has imported everything already."""
    printed, words = io.StringIO(), command(root, run_dir, *flags)
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            as_typed(words)
            code = 0
        except SystemExit as end:
            code = end.code
    return code, printed.getvalue()


def as_typed(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        run.cli(tiny.DEFAULTS, tiny.task, tiny.__doc__)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    printed, _ = process.communicate()
    assert process.returncode == code, printed
    assert "Traceback" not in printed
    return printed


def numbers(run_dir: Path) -> list[dict]:
    """Every step's metrics that do not depend on the clock."""
    return [{k: v for k, v in record.items() if not k.startswith("seconds")} for record in read_metrics(run_dir)]


def steps_done(run_dir: Path) -> int:
    begun = (run_dir / METRICS_FILE).is_file()
    return int(max((record["step"] for record in numbers(run_dir)), default=0)) if begun else 0


def assert_same_run(a: Path, b: Path) -> None:
    last = max(folder.name for folder in checkpoint.steps(a / "checkpoints"))
    ours, theirs = (
        checkpoint.load_tensors(folder / "checkpoints" / last / checkpoint.TENSORS).items() for folder in (a, b)
    )
    assert numbers(a) == numbers(b)
    for (name, x), (other, y) in zip(ours, theirs, strict=True):
        assert name == other and torch.equal(x, y), name


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """The run that nothing disturbs: 3 epochs of 2 steps."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    printed = finish(start(root, run_dir, "--checkpoint-every", "1"))
    return run_dir, printed


def test_a_run_leaves_checkpoints_metrics_evaluation_and_summary(whole):
    run_dir, printed = whole
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["samples_per_second"] > 0
    assert {"NDS", "mAP"} <= summary["scores"].keys()
    assert [step["step"] for step in read_metrics(run_dir)] == list(range(1, 7))
    assert {"loss/total", "lr", "overflow/voxels_l0", "bad/samples"} <= read_metrics(run_dir)[0].keys()
    assert len(checkpoint.steps(run_dir / "checkpoints")) == 3  # the last ones
    assert checkpoint.best(run_dir / "checkpoints").name == "step_00000006"
    assert (run_dir / "evaluations" / "step_00000006" / "report.html").is_file()
    assert "peak learning rate 0.001 (--lr)" in printed and "samples/s" in printed
    tags = EventAccumulator(str(run_dir / BOARD)).Reload().Tags()
    assert {"loss/total", "eval/NDS", "eval/mAP", "eval/AP/car"} <= set(tags["scalars"])
    assert (tags["images"], tags["tensors"]) == ([WORST], ["config"])


def kill_and_resume(root: Path, run_dir: Path, kills: int, seed: int) -> None:
    """Kills the run soon after random steps, anywhere from its start-up to its evaluation, and then lets it end."""
    chance, flags = random.Random(seed), ["--checkpoint-every", "1"]
    for after in sorted(chance.choices(range(STEPS + 1), k=kills)):
        process = start(root, run_dir, *flags)
        while process.poll() is None and steps_done(run_dir) < after:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if (run_dir / "config.json").is_file():  # else it came to nothing
            flags = ["--checkpoint-every", "1", "--resume"]
    finish(start(root, run_dir, *flags))


def test_a_killed_run_is_bitwise_the_run_that_was_not(whole, root, tmp_path):
    kill_and_resume(root, tmp_path / "run", kills=3, seed=0)
    assert_same_run(whole[0], tmp_path / "run")


def test_a_killed_run_whose_tables_come_with_the_batches_is_bitwise_the_run_whose_step_makes_them(
    whole, root, tmp_path, monkeypatch
):
    monkeypatch.setenv("BEVFN_TINY_TABLES", "1")
    kill_and_resume(root, tmp_path / "run", kills=1, seed=1)
    assert_same_run(whole[0], tmp_path / "run")
    results = "evaluations/step_00000006/results_nusc.json"
    assert (tmp_path / "run" / results).read_bytes() == (whole[0] / results).read_bytes()


@pytest.mark.slow
def test_twenty_kills_change_nothing(whole, root, tmp_path):
    for i in range(4):
        kill_and_resume(root, tmp_path / f"run{i}", kills=5, seed=i + 1)
        assert_same_run(whole[0], tmp_path / f"run{i}")


STOPPING = """  # after its second step, and on no other process's clock
import os, runpy, signal, sys
number = int(sys.argv.pop(1))
sys.path.insert(0, sys.argv.pop(1))
from bevfn.training import reporter
log = reporter.Reporter.log
def log_and_stop(self, step, *arguments, **named):
    log(self, step, *arguments, **named)
    if step == 2:
        os.kill(os.getpid(), number)
reporter.Reporter.log = log_and_stop
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_exits_with_its_code_and_the_rest_of_the_epoch_follows(
    whole, root, bare, tmp_path, number, code
):
    ask = [sys.executable, "-c", STOPPING, str(int(number)), str(HERE)]
    printed = finish(launch(ask + command(root, tmp_path / "run")), code)  # so that `train && next` stops too
    done = int(re.search(r"stopped by a signal after step (\d+)", printed)[1])
    assert done < STEPS and checkpoint.latest(tmp_path / "run" / "checkpoints").name == f"step_{done:08d}"
    code, printed = cli(root, tmp_path / "run", "--resume")
    assert code == 0 and f"from step {done}" in printed
    assert_same_run(whole[0], tmp_path / "run")


def test_a_second_ctrl_c_ends_the_run_in_one_sentence_and_what_was_saved_is_whole(root, tmp_path):
    def child() -> None:
        def log_and_stop(self, step, *arguments, **named):
            log(self, step, *arguments, **named)
            if step == 3:  # before anything can end between two steps
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

        log, reporter.Reporter.log = reporter.Reporter.log, log_and_stop
        as_typed(command(root, tmp_path / "run", "--checkpoint-every", "1"))

    outcome = bounded.run(child, memory=2**33, seconds=120)
    assert outcome.code == 130 and "Traceback" not in outcome.out
    assert outcome.out.endswith("bevfn: stopped by Ctrl-C; what was written before is whole\n")
    assert checkpoint.latest(tmp_path / "run" / "checkpoints", pytest.fail).name == "step_00000002"


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_run_without_a_compiler_is_one_sentence(root, tmp_path, monkeypatch, backend):
    def child() -> None:
        native.load.cache_clear()
        as_typed(command(root, tmp_path / "run", "--backend", backend))

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    outcome = bounded.run(child, memory=2**33, seconds=120)
    assert outcome.refused and "need a C++17 compiler and 'g++' is not on PATH: install g++" in outcome.out, outcome


def test_a_step_that_does_not_fit_is_one_sentence_with_flags_that_need_less(root, tmp_path, monkeypatch):
    def build(run, resumed):
        return assembly.initial_state(run), lambda train_state, batches: torch.empty(1 << 55, dtype=torch.uint8)

    monkeypatch.setattr(assembly, "build", build)
    code, printed = cli(root, tmp_path / "run", "--backend", "eager")
    assert code == 2 and "Traceback" not in printed
    (told,) = (line for line in printed.splitlines() if line.startswith("bevfn: "))
    assert told.startswith("bevfn: there is not enough memory for this: 33,554,432 GiB more are wanted")
    assert "--batch-size 1 --accumulate 2 and --checkpoint-activations" in told


def test_the_codes_are_in_the_help(root, capsys):
    with pytest.raises(SystemExit):
        command_line.parse(tiny.DEFAULTS, ["--data-root", str(root), "--help"])
    assert "exits with 143 or 130" in " ".join(capsys.readouterr().out.replace("│", "").split())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_finished_run_says_so_and_keeps_its_files(whole, root, tmp_path):
    run_dir = Path(shutil.copytree(whole[0], tmp_path / "run"))
    flags = ("--checkpoint-every", "1", "--resume")
    moved = json.loads((run_dir / "config.json").read_text()) | {"run_dir": str(run_dir), "resume": True}
    (run_dir / "config.json").write_text(json.dumps(moved, indent=1))
    before = contents(run_dir)
    code, printed = cli(root, run_dir, *flags)
    assert code == 0
    assert f"{run_dir} is finished: all 6 steps are made and evaluated, and nothing is changed" in printed
    assert contents(run_dir) == before


def test_a_finished_run_without_its_summary_gets_one_that_is_json(whole, root, tmp_path):
    run_dir = Path(shutil.copytree(whole[0], tmp_path / "run"))
    (run_dir / "summary.json").unlink()
    code, printed = cli(root, run_dir, "--checkpoint-every", "1", "--resume")
    assert code == 0 and "no step was left to make" in printed
    summary = read_json((run_dir / "summary.json").read_bytes())
    assert summary["steps"] == 6 and summary["samples_per_second"] is None


def test_what_a_checkpoint_was_made_with_is_in_it_and_compared(whole, root, tmp_path):
    run_dir = Path(shutil.copytree(whole[0], tmp_path / "run"))
    latest = checkpoint.latest(run_dir / "checkpoints")
    facts = checkpoint.read_meta(latest)["run"]
    assert facts | {"data": "", "evaluation_data": "", "code": ""} == {
        "processes": 1, "accumulate": 1, "microbatches": 1, "samples_per_epoch": 3, "total_steps": 6, "data": "",
        "evaluation_data": "", "code": "",
    }  # fmt: skip
    training = small_world.training()
    assert facts["data"] == origin.data(training, np.arange(3)) != origin.data(training, np.arange(2))
    assert facts["code"] == origin.code()
    other = replace(training, frames=tuple(training)[:2])
    task = lambda config: replace(  # noqa: E731
        tiny.task(config), data=replace(tiny.task(config).data, training=other, items=np.array([0, 1, 1]))
    )
    with pytest.raises(ValueError, match=r"begun with another config \(data: \"[0-9a-f]{16}\" -> \"[0-9a-f]{16}\"\)"):
        run.main(task, config(root, run_dir, checkpoint_every=1, resume=True))


def test_a_run_without_its_config_or_checkpoints_is_not_taken_for_another(whole, root, tmp_path):
    run_dir = Path(shutil.copytree(whole[0], tmp_path / "run"))
    (run_dir / "config.json").unlink()
    code, printed = cli(root, run_dir, "--resume", "--checkpoint-every", "1", "--lr", "0.5")
    assert code == 2 and "was begun with another config (lr: 0.001 -> 0.5); give the old values" in " ".join(
        printed.split()
    )
    shutil.rmtree(run_dir / "checkpoints")
    code, printed = cli(root, run_dir, "--resume", "--checkpoint-every", "1")
    what = "has no checkpoint, but metrics.jsonl and evaluations and summary.json of later steps than its first one, due at step 1"
    assert code == 2 and what in " ".join(printed.split())


def test_a_resumed_run_whose_evaluation_boxes_moved_is_refused(whole, root, tmp_path):
    """Its best would compare scores of different data."""
    run_dir = Path(shutil.copytree(whole[0], tmp_path / "run"))
    moved = [replace(frame, boxes=frame.boxes + 1e-3) for frame in small_world.index()]
    other = replace(small_world.index(), frames=tuple(moved))
    task = lambda config: replace(tiny.task(config), data=replace(tiny.task(config).data, evaluation=other))  # noqa: E731
    with pytest.raises(ValueError, match=r'another config \(evaluation_data: "[0-9a-f]{16}" -> "[0-9a-f]{16}"\); give'):
        run.main(task, config(root, run_dir, checkpoint_every=1, resume=True))
    run.main(task, config(root, run_dir, checkpoint_every=1, resume=True, force=True))


def test_a_resumed_run_on_another_database_is_refused(whole, root, tmp_path):
    run_dir = Path(shutil.copytree(whole[0], tmp_path / "run"))
    database = paste.build(small_world.training(), tmp_path, class_names=CLASS_NAMES, progress=False)
    task = lambda config: replace(tiny.task(config), data=replace(tiny.task(config).data, database=database))  # noqa: E731
    with pytest.raises(ValueError, match=rf'begun with another config \(database: \(none\) -> "{database.key}"\)'):
        run.main(task, config(root, run_dir, checkpoint_every=1, resume=True))


def test_a_resumed_run_on_other_processes_is_refused(whole, root, tmp_path):
    run_dir = Path(shutil.copytree(whole[0], tmp_path / "run"))
    leads, other = start_two(root, run_dir, "--checkpoint-every", "1", "--resume")
    printed, _ = leads.communicate()
    other.communicate()
    assert leads.returncode == other.returncode == 2
    assert "microbatches: 1 -> 2; total_steps: 6 -> 3" in printed and "--force" in printed


def test_a_folder_without_a_run_is_not_resumed(root, tmp_path):
    code, printed = cli(root, tmp_path / "typo", "--resume")
    assert code == 2 and "typo holds no run to go on with" in printed and not (tmp_path / "typo").exists()


def test_a_damaged_file_stops_the_run_which_loses_nothing_and_goes_on_when_it_is_whole(whole, root, bare, tmp_path):
    broken = Path(shutil.copytree(root, tmp_path / "world"))
    index = small_world.training()
    third = index[int(sampling.order(np.arange(len(index)), 0, 0, shuffle=True)[2])]  # of the second step
    file = broken / third.lidar_path
    content = file.read_bytes()
    file.write_bytes(content[:-7])
    code, printed = cli(broken, tmp_path / "run")
    assert code == 2
    assert f"bevfn: {file}: {len(content) - 7} bytes are not a whole number of points" in printed
    assert "stopped because a sample cannot be read after step 1, which is saved; add --resume" in printed
    assert "Traceback" not in printed
    file.write_bytes(content)
    code, printed = cli(broken, tmp_path / "run", "--resume")
    assert code == 0 and "from step 1 on" in printed
    assert_same_run(whole[0], tmp_path / "run")


def test_a_damaged_file_is_skipped_where_that_is_wanted_named_and_counted(root, bare, tmp_path):
    broken = Path(shutil.copytree(root, tmp_path / "world"))
    file = broken / small_world.training()[1].lidar_path
    file.write_bytes(file.read_bytes()[:-3])
    code, printed = cli(broken, tmp_path / "run", "--on-damaged", "skip", "--epochs", "1")
    assert code == 0 and re.search(rf"warning: skipped a damaged sample: {file}: \d+ bytes are not a whole", printed)
    assert sum(record["bad/samples"] for record in read_metrics(tmp_path / "run")) >= 1
    assert "bad/samples" in printed.split("warning: in all 2 steps: ")[1]


def test_a_data_set_that_is_there_in_part_is_trained_on_and_judged_by_what_is_there(root, bare, tmp_path):
    part = Path(shutil.copytree(root, tmp_path / "world"))
    lost, unseen = small_world.training()[1], small_world.index()[2]
    for frame in (lost, unseen):
        (part / frame.lidar_path).unlink()
    code, printed = cli(part, tmp_path / "run", "--on-damaged", "skip")
    assert code == 0
    for split in ("train", "val"):
        assert f"warning: left out of '{split}', since not all their files are there: 1 of 3 key frames" in printed
    assert printed.count(f"key frame {lost.token} has no {lost.lidar_path}") == 1
    records = read_metrics(tmp_path / "run")
    assert len(records) == 3 and not any(record["bad/samples"] for record in records)  # a step an epoch
    found = json.loads(next((tmp_path / "run/evaluations").glob("*/results_nusc.json")).read_text())["results"]
    assert found.keys() == small_world.index().positions.keys() - {unseen.token}
    assert "missing/key_frames: 1 key frames of the split lack files and were left out" in printed
    code, printed = cli(part, tmp_path / "other")
    assert code == 2 and f"{lost.lidar_path}: the point file does not exist" in printed


BARE = {"BEVFN_TINY_BARE": "1"}  # see tiny_experiment.py
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start_two(root: Path, run_dir: Path, *flags: str, **variables: str) -> list[subprocess.Popen]:
    """Two processes that nobody watches, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *command(root, run_dir, *flags)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **world, "RANK": str(rank), "LOCAL_RANK": str(rank), **variables},
        )
        for rank in range(2)
    ]  # fmt: skip


def finish_two(processes: list[subprocess.Popen]) -> None:
    """Both; without torchrun, which is a third process that imports torch."""
    for process in processes:
        finish(process)


@pytest.fixture(scope="module")
def two(root, tmp_path_factory):
    """What two processes with a sample each print and leave: 2 epochs of 2 steps, all checkpoints kept."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    printed = finish(
        launch(
            [
                *TWO,
                *command(root, run_dir, "--batch-size", "1", "--epochs", "2", "--checkpoint-every", "1", "--keep", "9"),
            ],
            **BARE,
        )
    )
    return run_dir, printed


def test_two_processes_train_like_two_microbatches_and_find_every_frame(two, root, bare, tmp_path):
    assert cli(root, tmp_path / "one", "--batch-size", "1", "--epochs", "2", "--accumulate", "2")[0] == 0
    assert two[1].count("samples an epoch") == 1  # one process speaks
    ours, theirs = (
        checkpoint.load_tensors(checkpoint.latest(folder / "checkpoints") / checkpoint.TENSORS)
        for folder in (tmp_path / "one", two[0])
    )
    for name, leaf in ours.items():
        torch.testing.assert_close(
            theirs[name], leaf, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )
    found = json.loads(next((two[0] / "evaluations").glob("*/results_nusc.json")).read_text())["results"]
    assert found.keys() == small_world.index().positions.keys()


def test_a_run_of_two_processes_goes_on_in_one_with_two_microbatches_bit_for_bit(two, root, bare, tmp_path):
    """The same sum of two gradients, the same samples, random numbers and schedule."""
    run_dir = Path(shutil.copytree(two[0], tmp_path / "run"))
    for made in ("checkpoints/step_00000002", "checkpoints/step_00000003", "checkpoints/step_00000004", "evaluations"):
        shutil.rmtree(run_dir / made)  # as if it had been killed in its second step
    (run_dir / "summary.json").unlink()
    (run_dir / "checkpoints" / "best.json").unlink()
    same = ("--batch-size", "1", "--epochs", "2", "--checkpoint-every", "1", "--keep", "9", "--resume")
    code, printed = cli(root, run_dir, *same, "--accumulate", "2")
    assert code == 0 and "from step 1 on" in printed
    assert_same_run(two[0], run_dir)
    code, printed = cli(root, run_dir, *same, "--accumulate", "3")
    assert code == 2 and "microbatches: 2 -> 3" in printed


def test_more_microbatches_than_two_are_bound_to_their_processes_since_their_sums_are_rounded_by_order(
    root, bare, tmp_path
):
    """(a + b) + (c + d), of two processes, is not ((a + b) + c) + d."""
    four = {"batch_size": 1, "epochs": 1, "accumulate": 4}
    run.main(tiny.task, config(root, tmp_path / "run", **four))
    made = tmp_path / "run/checkpoints/step_00000001"
    meta = checkpoint.read_meta(made)
    meta["run"] |= {"processes": 2, "accumulate": 2}
    checkpoint.save_step(made, checkpoint.read(made), meta)
    with pytest.raises(ValueError, match=r"processes: 2 -> 1; accumulate: 2 -> 4"):
        run.main(tiny.task, config(root, tmp_path / "run", **four, resume=True))


def test_what_is_summed_over_processes_binds_their_number(two, root, tmp_path):
    shared = lambda config: replace(tiny.task(config), shared_normalisers=True)  # noqa: E731
    run_dir = Path(shutil.copytree(two[0], tmp_path / "run"))
    with pytest.raises(ValueError, match=r"accumulate: 1 -> 2.*processes: 2 -> 1"):
        run.main(
            shared,
            config(root, run_dir, batch_size=1, epochs=2, checkpoint_every=1, keep=9, accumulate=2, resume=True),
        )


# ------------------------------------------------------------------------- batch norm over all devices, from an epoch on

LATER = ("--batch-size", "1", "--epochs", "3", "--checkpoint-every", "1", "--keep", "9")
LATER += ("--sync-statistics", "--sync-after", "1")


@pytest.fixture(scope="module")
def later(root, tmp_path_factory):
    """What two processes leave whose batch norms are of both from the second epoch on: 3 epochs of 2 steps."""
    run_dir = tmp_path_factory.mktemp("later") / "run"
    finish_two(start_two(root, run_dir, *LATER, **BARE))
    return run_dir


def cut(run_dir: Path, done: int) -> None:
    """As if the run had been killed after that many steps."""
    for made in [*checkpoint.steps(run_dir / "checkpoints")[done:], run_dir / "evaluations"]:
        shutil.rmtree(made)
    (run_dir / "summary.json").unlink()
    (run_dir / "checkpoints" / "best.json").unlink()


def test_batch_norm_is_of_all_processes_from_its_epoch_on(later, root, bare, tmp_path):
    found, plain = numbers(later), ("--batch-size", "1", "--epochs", "3")
    assert cli(root, tmp_path / "never", *plain, "--accumulate", "2")[0] == 0  # two microbatches, each by its own
    never = numbers(tmp_path / "never")
    for k in range(STEPS):
        assert (found[k]["loss/total"] == pytest.approx(never[k]["loss/total"], rel=1e-5)) == (k < 2)
    always = Path(shutil.copytree(later, tmp_path / "always"))
    cut(always, 2)
    flags = (*plain, "--checkpoint-every", "1", "--keep", "9", "--sync-statistics", "--resume", "--force")
    finish_two(start_two(root, always, *flags, **BARE))
    assert_same_run(later, always)


def test_a_run_that_is_killed_before_the_change_goes_on_across_it_bit_for_bit(later, root, tmp_path):
    run_dir = Path(shutil.copytree(later, tmp_path / "run"))
    cut(run_dir, 1)
    finish_two(start_two(root, run_dir, *LATER, "--resume", **BARE))
    assert_same_run(later, run_dir)


def test_the_step_is_made_anew_once_and_not_at_all_in_one_process(root, tmp_path, monkeypatch):
    made = []

    def compiled(run, synchronised):
        made.append(synchronised)
        return lambda train_state, batches: (train_state, synchronised)

    monkeypatch.setattr(assembly, "compiled_step", compiled)
    settings = config(root, tmp_path, batch_size=1, epochs=3, sync_statistics=True, sync_after=1)
    task = tiny.task(settings)
    alone = tasks.Run(task, settings, tasks.plan(settings, task.data.items))
    train_state, _ = assembly.build(alone)
    assert made == [False]  # batch norm over one device
    both = replace(alone, plan=tasks.plan(settings, task.data.items, Replicas("", 0, 2)), replicas=Replicas("", 0, 2))
    assert both.plan.steps_per_epoch == 2
    _, step = assembly.build(both)
    made.clear()
    for done in range(6):
        assert step(replace(train_state, step=torch.tensor(done)), [])[1] == (done >= 2)
    assert made == [False, True]
    with pytest.raises(ValueError, match="--sync-after -1 must be at least 0"):
        replace(settings, sync_after=-1)


@pytest.mark.parametrize("killed", [1, 0])
def test_when_one_process_dies_the_other_names_it_saves_and_ends(root, tmp_path, killed):
    """Today's fault was to hang for ever at exit, joining a process that reads samples."""
    processes = start_two(root, tmp_path / "run", "--batch-size", "1", "--workers", "1", "--epochs", "10000")
    try:
        while processes[0].poll() is None and steps_done(tmp_path / "run") < 3:
            time.sleep(0.02)
        processes[killed].kill()
        printed, _ = processes[1 - killed].communicate(
            timeout=90
        )  # seconds alone; its pipe closes when its workers end
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
    assert processes[1 - killed].returncode == 2, printed
    assert f"bevfn: rank {killed} of the run's 2 processes ended or does not answer" in printed
    assert "Traceback" not in printed and "gloo" not in printed
    done = int(re.search(r"step (\d+) is saved; add --resume to go on", printed)[1])
    latest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert latest.name == f"step_{done:08d}" and done >= 2


@pytest.mark.slow
def test_a_file_that_one_process_cannot_read_stops_all_of_them_at_a_saved_step(root, tmp_path):
    broken = Path(shutil.copytree(root, tmp_path / "world"))
    index = small_world.training()
    order = sampling.order(np.arange(len(index)), 0, 0, shuffle=True)  # its third is of the second step
    file = broken / index[int(order[2])].lidar_path
    file.unlink()
    process = launch([*TWO, *command(broken, tmp_path / "run", "--batch-size", "1")])
    printed, _ = process.communicate()
    assert process.returncode and f"bevfn: {file}: the point file does not exist" in printed
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step_00000001"


def config(root: Path, run_dir: Path, **changes) -> tiny.Config:
    return replace(tiny.Config(data_root=root, run_dir=run_dir), **changes)


def test_gradients_that_are_not_finite_stop_fp32_with_step_samples_and_tensor(root, tmp_path):
    def task(config: tiny.Config) -> tasks.Task:
        made = tiny.task(config)

        def loss(params, *rest, **options):
            value, aux = made.loss(params, *rest, **options)
            # 0, with an infinite derivative
            return value + (params["head"]["shared"]["bias"] * 0).abs().sum().sqrt(), aux

        return replace(made, loss=loss)

    with pytest.raises(
        ValueError, match=r"step 1: the gradients are not finite, first the gradient of .*; samples [0-9a-f]{32}"
    ) as e:
        run.main(task, config(root, tmp_path / "run"))
    assert any(token in str(e.value) for token in source_tokens(root))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite_stops_and_names_samples_and_terms(root, tmp_path, precision):
    with pytest.raises(ValueError, match=r"step \d+: the loss is not finite, sample [0-9a-f]{32}: loss/total, loss/"):
        run.main(tiny.task, config(root, tmp_path / "run", lr=1e30, precision=precision))


@pytest.fixture
def poisoned(monkeypatch):
    """Takes tokens: the velocities in these samples then have a sum that float32 cannot hold, so that the loss is
    infinite, and all gradients are finite. The loader's own check of samples, which refuses them, is off: what is left is
    whatever no check knows."""
    read = scene.load
    monkeypatch.setattr(loader, "checked", lambda sample, like: sample)

    def poison(bad: set[str]) -> None:
        def load(*arguments, **options):
            sample = read(*arguments, **options)
            if sample.token in bad:
                assert len(sample.boxes) > 3
                sample.boxes[:, 7:9] = 3e38
            return sample

        monkeypatch.setattr(scene, "load", load)

    return poison


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_sample_whose_loss_is_not_finite_is_named_alone(root, tmp_path, accumulate, poisoned):
    tokens = [frame.token for frame in small_world.training()]
    poisoned({tokens[1]})
    with pytest.raises(ValueError, match="the loss is not finite") as error:
        run.main(tiny.task, config(root, tmp_path / "run", accumulate=accumulate))
    told = str(error.value)
    assert f"sample {tokens[1]}: loss/total, loss/bbox; samples " in told
    assert not any(f"sample {token}:" in told for token in (tokens[0], tokens[2]))


def test_in_fp16_a_loss_that_stays_not_finite_stops_after_some_steps_and_is_named(root, tmp_path, capsys, poisoned):
    poisoned({frame.token for frame in small_world.training()})
    with pytest.raises(ValueError, match=r"step 5: the loss is not finite, sample [0-9a-f]{32}: loss/total, loss/"):
        run.main(tiny.task, config(root, tmp_path / "run", precision="fp16"))
    printed = capsys.readouterr().out
    assert printed.count(" is skipped: loss/total, loss/bbox not finite, with samples ") == 4


def test_in_fp16_one_bad_sample_is_skipped_and_told(root, tmp_path, capsys, poisoned):
    tokens = [frame.token for frame in small_world.training()]
    poisoned({tokens[1]})
    summary = run.main(tiny.task, config(root, tmp_path / "run", precision="fp16", mode="performance"))
    printed = capsys.readouterr().out
    assert summary["steps"] == 2 and tokens[1] in printed.split("is skipped: ")[1]


def test_a_loss_scale_that_cannot_fall_is_told_and_stops_the_run(root, tmp_path, capsys):
    def task(config: tiny.Config) -> tasks.Task:  # gradients that no loss scale makes finite; the loss is
        made = tiny.task(config)

        def loss(params, *rest, **options):
            value, aux = made.loss(params, *rest, **options)
            return value + (params["head"]["shared"]["bias"] * 0).abs().sum().sqrt(), aux

        return replace(made, loss=loss)

    with pytest.raises(ValueError, match=r"step 20: the gradients are not finite, first the gradient of "):
        run.main(task, config(root, tmp_path / "run", precision="fp16", steps=100))
    assert (
        "warning: step 16: the loss scale has fallen to its lowest, 1; lower --lr, or take bf16"
        in capsys.readouterr().out
    )
    assert read_metrics(tmp_path / "run")[-1]["loss_scale"] == 1.0


def test_weights_of_a_damaged_checkpoint_are_refused(whole, tmp_path):
    made = Path(shutil.copytree(checkpoint.latest(whole[0] / "checkpoints"), tmp_path / "step_00000006"))
    params, _ = pretrained.read_weights(made)
    assert params
    content = bytearray((made / checkpoint.TENSORS).read_bytes())
    content[-5] ^= 1
    (made / checkpoint.TENSORS).write_bytes(content)
    with pytest.raises(
        ValueError, match=r"step_00000006/train_state\.safetensors is damaged: its size or CRC is not what"
    ):
        pretrained.read_weights(made)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(whole, tmp_path, value):
    leaves = checkpoint.read(checkpoint.latest(whole[0] / "checkpoints"))
    name = next(name for name in leaves if name.startswith("params.head"))
    leaves[name].view(-1)[0] = value
    checkpoint.save_step(tmp_path / "step_00000006", leaves, {"step": 6})
    with pytest.raises(
        ValueError, match=rf"step_00000006: {re.escape(name)} is NaN or infinite; take an older checkpoint"
    ):
        pretrained.read_weights(tmp_path / "step_00000006")


def source_tokens(root: Path) -> set[str]:
    return {row["token"] for row in json.loads((root / "v1.0-trainval" / "sample.json").read_text())}


def test_performance_mode_measures_and_neither_saves_nor_evaluates(root, tmp_path, capsys):
    summary = run.main(tiny.task, config(root, tmp_path / "run", mode="performance", warm_up=1, epochs=3))
    assert summary["steps"] == 2 and "scores" not in summary
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "evaluations").exists()
    assert "samples/s after 1 steps" in capsys.readouterr().out


class Copies(TorchDispatchMode):
    """Counts what asks a device for a number: .item(), float(), int(), bool()."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


def test_metrics_leave_the_device_together_and_between_two_readings_nothing_does(root, tmp_path, monkeypatch):
    """Steps are those that are read one by one, and the host asks for nothing between the first step, the third and the sixth."""
    monkeypatch.setattr(loader, "checked", lambda sample, like: sample)  # asks the loader's own tensors, on the host
    plain = {"mode": "performance", "steps": STEPS}
    run.main(tiny.task, config(root, tmp_path / "each", **plain))
    asked, packets = [], []
    step_made, read = unread.Unread.add, train.read

    def add(self, *arguments):
        asked.append(copies.count)
        step_made(self, *arguments)

    monkeypatch.setattr(unread.Unread, "add", add)
    monkeypatch.setattr(train, "read", lambda made: packets.append(len(made)) or read(made))
    with Copies() as copies:
        run.main(tiny.task, config(root, tmp_path / "three", log_every=3, **plain))
    assert [packet for packet in packets if packet] == [1, 2, 3]
    assert asked[1] == asked[2] and asked[3] == asked[4] == asked[5]
    assert numbers(tmp_path / "three") == numbers(tmp_path / "each")


def test_a_loss_that_is_not_finite_is_seen_at_the_next_reading_with_its_step_terms_and_samples(root, tmp_path):
    settings = config(root, tmp_path / "run", lr=1e30, log_every=4, mode="performance", steps=STEPS)
    said = r"step 2: the loss is not finite, loss/\S+.* \(with --log-every 1 the run says of which sample\); samples [0-9a-f]{32}"
    with pytest.raises(ValueError, match=said):
        run.main(tiny.task, settings)
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1]
    with pytest.raises(ValueError, match=r"step 2: the loss is not finite, sample [0-9a-f]{32}: loss/"):
        run.main(tiny.task, replace(settings, log_every=1, run_dir=tmp_path / "asked"))


def test_a_profile_opens_in_perfetto_and_has_the_phases_of_its_steps(root, tmp_path, capsys):
    settings = config(root, tmp_path / "run", profile=2, mode="performance", steps=STEPS)
    run.main(tiny.task, settings)
    trace = tmp_path / "run" / profiling.TRACE
    assert f"trace of 2 steps: {trace}" in capsys.readouterr().out
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    ranges = [
        e for e in events if e.get("cat") == "user_annotation" and e["name"] in ("read", "move", "step", "report")
    ]
    ranges.sort(key=lambda event: event["ts"])
    assert [event["name"] for event in ranges] == ["read", "move", "step", "report"] * 2
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in itertools.pairwise(ranges))
    inside = [e for e in events if e.get("cat") == "cpu_op" and ranges[2]["ts"] <= e["ts"] <= ranges[3]["ts"]]
    assert any(event["name"].startswith("bevfn::") for event in inside)  # our operators are in the step
    run.main(tiny.task, replace(settings, steps=2, run_dir=tmp_path / "short"))
    assert "no trace, since --profile begins after 3 steps" in capsys.readouterr().out
    assert not list((tmp_path / "short").glob("*trace*"))


def test_the_recipes_learning_rate_follows_the_batch(root, tmp_path):
    plan = tasks.Plan(steps_per_epoch=10, total_steps=10, batch=8)
    base = config(root, tmp_path, lr=None, recipe_lr=1e-3)
    rates = {way: tasks.scaled_lr(replace(base, lr_scaling=way), plan) for way in ("linear", "sqrt", "none")}
    assert rates == pytest.approx({"linear": 2.5e-4, "sqrt": 5e-4, "none": 1e-3})
    assert tasks.scaled_lr(replace(base, lr=0.5), plan) == 0.5


def test_what_lies_at_the_data_root_decides_on_the_defaults(root, tmp_path):
    from bevfn.experiments import bevfusion

    (tmp_path / "frame.json").write_text("{}")
    assert command_line.parse(bevfusion.DEFAULTS, ["--data-root", str(tmp_path)]).steps == 40
    assert command_line.parse(bevfusion.DEFAULTS, [f"--data-root={root}"]).scale == "mini"  # a world of `data synth`
    (tmp_path / "real" / "v1.0-trainval").mkdir(parents=True)
    assert command_line.parse(bevfusion.DEFAULTS, [f"--data-root={tmp_path / 'real'}"]).epochs == 6
    assert command_line.parse(bevfusion.DEFAULTS, ["--lr", "1"]).scale == "mini"


@pytest.mark.parametrize("name", ["epochs", "batch_size", "accumulate", "steps"])
def test_a_number_below_one_is_refused_by_its_flag(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} 0 must be at least 1"):
        tiny.Config(**{name: 0})


IMPOSSIBLE = {
    **{name: (float("nan"), float("inf"), -1.0, 0.0) for name in ("lr", "recipe_lr", "clip_norm")},
    "weight_decay": (float("nan"), float("inf"), -1e-3),
    "ema": (float("nan"), -0.1, 1.0, 2.0),
    "norm_momentum": (float("nan"), 0.0, 5.0),
    **dict.fromkeys(("checkpoint_every", "eval_every", "warm_up", "workers", "sync_after", "seed"), (-1, 2**40)),
    **dict.fromkeys(("box_capacity", "keep", "recipe_batch"), (0, -1, 2**40)),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_number_that_cannot_be_meant_is_refused_by_its_flag(name):
    for value in IMPOSSIBLE[name]:
        with pytest.raises(
            ValueError, match=rf"^--{name.replace('_', '-')} \S+ must be (at least|above) [\d.]+[^\n]*$"
        ):
            tiny.Config(**{name: value})


def test_every_number_of_every_recipe_has_its_limit_and_keeps_it():
    from bevfn import catalogue, recipes
    from bevfn.training import limits

    for experiment in catalogue.EXPERIMENTS:
        config = recipes.published(experiment)
        for field in dataclasses.fields(config):
            if re.search(r"\b(int|float)\b", str(field.type)):
                assert field.name in limits.LIMITS, f"{experiment}: {field.name}"
                wrong = float("nan") if "float" in str(field.type) else -7
                with pytest.raises(ValueError, match=f"--{field.name.replace('_', '-')} "):
                    replace(config, **{field.name: (wrong,) if "tuple" in str(field.type) else wrong})


def test_parameters_that_an_update_made_not_finite_are_neither_saved_nor_evaluated(root, tmp_path):
    """Loss and gradient of every step are finite: only what the last one made is not."""

    def task(config: tiny.Config) -> tasks.Task:
        schedule = optim.Schedule(1e-3, drops=(2,), drop=1e42)
        return replace(tiny.task(config), optimizer=lambda plan: optim.Config(lr=schedule))

    with pytest.raises(
        ValueError, match=r"^step 3: its update made params\.\S+ NaN or infinite, so that it is neither"
    ):
        run.main(task, config(root, tmp_path / "run", steps=3, checkpoint_every=1))
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step_00000002"
    assert not (tmp_path / "run" / "evaluations").exists()
