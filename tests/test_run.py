"""Whole runs of a tiny experiment: what they leave, and that killing, stopping and splitting them changes no number."""

import io
import json
import os
import random
import re
import shutil
import signal
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

from bevfn.data import sampling
from bevfn.metrics import METRICS_FILE, read_metrics
from bevfn.training import checkpoint, run

HERE = Path(__file__).parent
STEPS = 6  # 3 epochs of 2


@pytest.fixture(scope="module")
def root():
    return small_world.index().root


def command(root: Path, run_dir: Path, *flags: str) -> list[str]:
    return [str(HERE / "tiny_experiment.py"), "--data-root", str(root), "--run-dir", str(run_dir), *flags]


def launch(words: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start(root: Path, run_dir: Path, *flags: str) -> subprocess.Popen:
    return launch([sys.executable, *command(root, run_dir, *flags)])


def cli(root: Path, run_dir: Path, *flags: str) -> tuple[int, str]:
    """(exit code, what it printed) of the same in this process, which has imported everything already."""
    printed, words = io.StringIO(), command(root, run_dir, *flags)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        patch.setattr(sys, "argv", words)
        try:
            run.cli(tiny.DEFAULTS, tiny.task, tiny.__doc__)
            code = 0
        except SystemExit as end:
            code = end.code
    return code, printed.getvalue()


def finish(process: subprocess.Popen) -> str:
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
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
        flags = ["--checkpoint-every", "1", "--resume"]
    finish(start(root, run_dir, *flags))


def test_a_killed_run_is_bitwise_the_run_that_was_not(whole, root, tmp_path):
    kill_and_resume(root, tmp_path / "run", kills=3, seed=0)
    assert_same_run(whole[0], tmp_path / "run")


@pytest.mark.slow
def test_twenty_kills_change_nothing(whole, root, tmp_path):
    for i in range(4):
        kill_and_resume(root, tmp_path / f"run{i}", kills=5, seed=i + 1)
        assert_same_run(whole[0], tmp_path / f"run{i}")


STOPPING = """  # after its second step, and on no other process's clock
import os, runpy, signal, sys
sys.path.insert(0, sys.argv.pop(1))
from bevfn.training import reporter
log = reporter.Reporter.log
def log_and_stop(self, step, *arguments, **named):
    log(self, step, *arguments, **named)
    if step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
reporter.Reporter.log = log_and_stop
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_sigterm_saves_and_the_rest_of_the_epoch_follows(whole, root, tmp_path):
    ask = [sys.executable, "-c", STOPPING, str(HERE)]
    printed = finish(launch(ask + command(root, tmp_path / "run")))
    done = int(re.search(r"stopped by a signal after step (\d+)", printed)[1])
    assert done < STEPS and checkpoint.latest(tmp_path / "run" / "checkpoints").name == f"step_{done:08d}"
    code, printed = cli(root, tmp_path / "run", "--resume")
    assert code == 0 and f"from step {done}" in printed
    assert_same_run(whole[0], tmp_path / "run")


def test_a_damaged_file_stops_the_run_which_loses_nothing_and_goes_on_when_it_is_whole(whole, root, tmp_path):
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


def test_a_damaged_file_is_skipped_where_that_is_wanted_named_and_counted(root, tmp_path):
    broken = Path(shutil.copytree(root, tmp_path / "world"))
    file = broken / small_world.training()[1].lidar_path
    file.unlink()
    code, printed = cli(broken, tmp_path / "run", "--on-damaged", "skip", "--epochs", "1")
    assert code == 0 and f"warning: skipped a damaged sample: {file}: the point file does not exist" in printed
    assert sum(record["bad/samples"] for record in read_metrics(tmp_path / "run")) >= 1
    assert "bad/samples" in printed.split("warning: in all 2 steps: ")[1]


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_two_processes_train_like_two_microbatches_and_find_every_frame(root, tmp_path):
    flags = ("--batch-size", "1", "--epochs", "1")
    assert cli(root, tmp_path / "one", *flags, "--accumulate", "2")[0] == 0
    printed = finish(launch([*TWO, *command(root, tmp_path / "two", *flags)]))
    assert printed.count("samples an epoch") == 1  # one process speaks
    one, two = (
        checkpoint.load_tensors(checkpoint.latest(tmp_path / name / "checkpoints") / checkpoint.TENSORS)
        for name in ("one", "two")
    )
    for name, leaf in one.items():
        torch.testing.assert_close(two[name], leaf, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    found = json.loads(next((tmp_path / "two" / "evaluations").glob("*/results_nusc.json")).read_text())["results"]
    assert found.keys() == small_world.index().positions.keys()


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
    with pytest.raises(
        ValueError, match=r"step \d+: the gradients are not finite, first .*; samples [0-9a-f]{32}"
    ) as e:
        run.main(tiny.task, config(root, tmp_path / "run", lr=1e30))
    assert any(token in str(e.value) for token in source_tokens(root))


def source_tokens(root: Path) -> set[str]:
    return {row["token"] for row in json.loads((root / "v1.0-trainval" / "sample.json").read_text())}


def test_performance_mode_measures_and_neither_saves_nor_evaluates(root, tmp_path, capsys):
    summary = run.main(tiny.task, config(root, tmp_path / "run", mode="performance", warm_up=1, epochs=3))
    assert summary["steps"] == 2 and "scores" not in summary
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "evaluations").exists()
    assert "samples/s after 1 steps" in capsys.readouterr().out


def test_the_recipes_learning_rate_follows_the_batch(root, tmp_path):
    plan = run.Plan(steps_per_epoch=10, total_steps=10, batch=8)
    base = config(root, tmp_path, lr=None, recipe_lr=1e-3)
    rates = {way: run.scaled_lr(replace(base, lr_scaling=way), plan) for way in ("linear", "sqrt", "none")}
    assert rates == pytest.approx({"linear": 2.5e-4, "sqrt": 5e-4, "none": 1e-3})
    assert run.scaled_lr(replace(base, lr=0.5), plan) == 0.5


def test_what_lies_at_the_data_root_decides_on_the_defaults(root, tmp_path):
    from bevfn.experiments import bevfusion

    (tmp_path / "frame.json").write_text("{}")
    assert run.parse(bevfusion.DEFAULTS, ["--data-root", str(tmp_path)]).steps == 40
    assert run.parse(bevfusion.DEFAULTS, [f"--data-root={root}"]).epochs == 6
    assert run.parse(bevfusion.DEFAULTS, ["--lr", "1"]).scale == "mini"


@pytest.mark.parametrize("name", ["epochs", "batch_size", "accumulate", "steps"])
def test_a_number_below_one_is_refused_by_its_flag(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} 0 must be at least 1"):
        tiny.Config(**{name: 0})
