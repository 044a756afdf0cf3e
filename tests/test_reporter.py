"""Progress and metrics of a run: with and without a terminal, after a crash, and with values that are not finite."""

import io
import json
import os
import re
import time

import pytest
import torch
from rich.console import Console

from bevfn import waiting
from bevfn.metrics import METRICS_FILE, read_metrics
from bevfn.training.reporter import Reporter, peak_memory
from bevfn.training.speed import Work


def run(folder, *, steps=20, terminal=False, metrics=lambda step: {"loss": 1.0 / step}, **options) -> str:
    """Logs `steps` steps of 0.5 s (the first 30 s) and returns what the console got."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    with Reporter(folder, steps, console=console, **options) as reporter:
        for step in range(1, steps + 1):
            reporter.log(step, metrics(step), seconds=30.0 if step == 1 else 0.5)
    return console.file.getvalue()


def test_without_a_terminal_a_plain_line_comes_every_n_steps(tmp_path):
    text = run(tmp_path, every=8)
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/20", "8/20", "16/20", "20/20"]
    assert "\x1b" not in text
    assert re.fullmatch(r"step 8/20  0\.5 s/step  ETA 0:00:06  loss 0\.125  [\d.]+ GiB", lines[1])


def test_the_compiling_step_is_reported_and_left_out_of_the_estimate(tmp_path):
    text = run(tmp_path)
    assert "first step: 30.00 s" in text
    assert "step 1/20  30 s/step  loss 1" in text  # no estimate from it
    assert "ETA 0:00:05" in text


def test_a_terminal_gets_a_live_line(tmp_path):
    text = run(tmp_path, terminal=True)
    assert "\x1b" in text and "20/20" in text and "0.5 s/step" in text


def test_every_step_is_one_json_object_at_once(tmp_path):
    with Reporter(tmp_path, 3, console=Console(file=io.StringIO())) as reporter:
        reporter.log(1, {"loss": torch.tensor(2.5), "overflow/points": 0}, seconds=0.25)
        line = (tmp_path / METRICS_FILE).read_text()  # while the run goes on
        assert json.loads(line) == {"step": 1, "seconds": 0.25, "loss": 2.5, "overflow/points": 0.0}
        reporter.log(2, {"loss": 2.0}, seconds=0.25)
    assert [record["loss"] for record in read_metrics(tmp_path)] == [2.5, 2.0]


def test_values_that_are_not_finite_stay_valid_json_and_warn_once(tmp_path):
    text = run(tmp_path, metrics=lambda step: {"loss": float("nan") if step > 2 else 1.0, "grad_norm": float("inf")})
    for line in (tmp_path / METRICS_FILE).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read_metrics(tmp_path)[0]["grad_norm"] == float("inf")
    assert text.count("warning: loss is nan at step 3.") == 1 and text.count("warning: loss") == 1


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("overflow/points", "7 points did not fit and were dropped; raise --point-capacity, or accept the loss."),
        ("overflow/boxes", "7 annotated boxes did not fit and were dropped; raise --box-capacity."),
        (
            "overflow/voxels_l2",
            "7 sites of the sparse encoder did not fit and were dropped; raise --site-capacity of that level.",
        ),
        (
            "overflow/voxels_l0",
            "7 voxels did not fit, as published, and were dropped with their points; --voxel-capacity keeps more.",
        ),
        ("bad/samples", "7 samples are damaged and others took their place; check the files that are named."),
        (
            "bad/points",
            "7 points have numbers that are not finite or cannot be, and were dropped; check the point files.",
        ),
        ("empty/points", "7 samples have no point in range; check the point files and point_cloud_range."),
        ("empty/depth", "7 images have no LiDAR point and teach no depth; check the calibration if there are many."),
        (
            "missing/frames",
            "7 earlier key frames do not exist, as at a scene's start, and one that does (the current one, or the scene's first) stands for each.",
        ),
        ("overflow/other", "7 did not fit a fixed capacity and were dropped; raise that capacity, or accept the loss."),
    ],
)
def test_a_counter_that_is_not_zero_warns_with_its_remedy_once_and_sums_up(tmp_path, name, sentence):
    text = run(tmp_path, metrics=lambda step: {"loss": 1.0, name: 7 if step > 4 else 0})
    assert text.count(f"warning: {name} at step 5: {sentence}") == 1
    assert f"warning: in all 20 steps: {name} 112." in text


def test_counters_at_zero_are_silent(tmp_path):
    text = run(tmp_path, metrics=lambda step: {"loss": 1.0, "overflow/points": 0, "matched_ious": 0.3})
    assert "warning" not in text and "overflow" not in text and "matched" not in text


def test_tensorboard_gets_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, metrics=lambda step: {"loss": 1.0 / step, "overflow/points": 0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "overflow/points", "seconds"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 21))


def test_speed_and_memory_are_in_the_line_and_in_tensorboard_and_not_in_the_file(tmp_path):
    """The file has what does not depend on the clock, and the seconds that speed follows from."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    text = run(tmp_path, every=8, work=Work(samples=4, flops=3e12, peak=24e12))
    assert re.search(r"step 8/20  0\.5 s/step  ETA 0:00:06  8 samples/s  loss 0\.125  MFU 25%  [\d.]+ GiB\n", text)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    named = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert named["speed/samples_per_second"] == 8 and named["speed/mfu"] == 0.25 and named["memory/host_gib"] > 0.05
    assert not any(name.startswith(("speed/", "memory/")) for name in read_metrics(tmp_path)[-1])


def test_without_a_known_peak_there_is_no_mfu(tmp_path):
    text = run(tmp_path, work=Work(samples=4, flops=3e12))
    assert "8 samples/s  loss" in text and "MFU" not in text


def test_a_continued_run_appends_and_drops_the_half_line_of_a_killed_one(tmp_path):
    run(tmp_path, steps=3)
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 4, "lo')
    assert len(read_metrics(tmp_path)) == 3
    run(tmp_path, steps=5, metrics=lambda step: {"loss": 100.0})
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert all(record["loss"] == 100.0 for record in records)


def logged(folder, steps, loss: float, start_step: int = 0) -> None:
    with Reporter(folder, 20, start_step=start_step, console=Console(file=io.StringIO())) as reporter:
        for step in steps:
            reporter.log(step, {"loss": loss}, seconds=0.5)


def test_what_a_killed_run_logged_behind_its_last_checkpoint_no_longer_counts(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged(tmp_path, range(1, 13), loss=1.0)  # killed after step 12, its last checkpoint at 8
    logged(tmp_path, range(9, 11), loss=2.0, start_step=8)  # killed again
    expected = [(step, 1.0) for step in range(1, 9)] + [(9, 2.0), (10, 2.0)]
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path)] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected
    logged(tmp_path, range(9, 12), loss=3.0, start_step=8)
    assert [record["loss"] for record in read_metrics(tmp_path)][8:] == [3.0] * 3


def test_an_error_in_the_loop_is_passed_on_and_keeps_what_was_logged(tmp_path):
    with pytest.raises(KeyError), Reporter(tmp_path, 9, console=Console(file=io.StringIO())) as reporter:
        reporter.log(1, {"loss": 1.0}, seconds=0.1)
        raise KeyError("stop")
    assert len(read_metrics(tmp_path)) == 1


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"total_steps 0 and every 10; both must be at least 1"):
        Reporter(tmp_path, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file, so no run folder can be made there"):
        Reporter(tmp_path / "file", 5)
    assert os.listdir(tmp_path) == ["file"]


def test_peak_memory_is_plausible():
    host = peak_memory()["host"]
    assert 2**26 < host < 2**40


def test_a_full_disk_is_one_sentence_and_keeps_the_lines_before(small_disk, capfd):
    """Metrics and TensorBoard's events; nothing is tried, or printed, again when they are closed."""
    metrics = {f"loss/{i}": 1.0 for i in range(100)}
    with (
        pytest.raises(OSError, match=r"could not be written \(No space left on device\); make room") as error,
        Reporter(small_disk / "run", 10_000, console=Console(file=io.StringIO())) as reporter,
    ):
        for step in range(1, 10_001):
            reporter.log(step, metrics, seconds=0.5)
    assert f"{small_disk}/run/" in str(error.value) and capfd.readouterr().err == ""
    steps = [record["step"] for record in read_metrics(small_disk / "run")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 100


@pytest.mark.parametrize("width", [40, 60, 80, 160])
def test_of_a_narrow_terminal_the_metrics_are_cut_and_not_step_and_eta(tmp_path, width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    many = {"loss/total": 12.34, "loss/heatmap": 5.678, "loss/boxes": 3.21, "lr": 1e-3, "grad_norm": 35.0}
    with Reporter(tmp_path, 1200, console=console, work=Work(samples=4, flops=1e12, peak=1e13)) as reporter:
        for step in range(1, 4):
            reporter.log(step, many, seconds=30.0 if step == 1 else 1.25)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()).replace("\r", "\n").splitlines()
    last = [line for line in lines if "3/1200" in line.replace(" ", "")][-1]
    assert "1.25 s/step  ETA 0:24:56" in last and len(last.rstrip()) <= width
    assert ("grad_norm" in last) == (width == 160) and ("loss/total 12.3" in last) == (width > 40)


def test_the_gradient_of_fp16s_first_steps_is_no_warning(tmp_path):
    skipped = {"loss": 1.0, "grad_norm": float("inf"), "skipped": 1.0, "loss_scale": 32768.0}
    assert "warning" not in run(tmp_path / "a", metrics=lambda step: skipped)
    still = run(tmp_path / "b", metrics=lambda step: skipped | {"skipped": 0.0})
    assert "warning: grad_norm is inf at step 1." in still


def test_in_a_log_no_silence_is_long(tmp_path, monkeypatch):
    """A long step is said while it lasts, and steps are when they are slow."""
    monkeypatch.setattr(waiting, "EVERY_S", 0.05)
    console = Console(file=io.StringIO(), width=160)
    with Reporter(tmp_path, 40, console=console) as reporter:
        for step in range(1, 5):
            with reporter.working(
                "first step, compiling (about 4 minutes the first time)" if step == 1 else f"step {step}"
            ):
                time.sleep(0.12)
            reporter.log(step, {"loss": 1.0}, seconds=0.12)
    text = console.file.getvalue()
    assert text.startswith("first step, compiling (about 4 minutes the first time)\nfirst step, compiling")
    assert "step 3: 0 s so far" in text


def test_slow_steps_are_said_before_the_tenth(tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, "EVERY_S", 0.01)
    console = Console(file=io.StringIO(), width=160)
    with Reporter(tmp_path, 40, console=console) as reporter:
        for step in range(1, 4):
            time.sleep(0.02)
            reporter.log(step, {"loss": 1.0}, seconds=0.12)
    assert "step 2/40" in console.file.getvalue() and "step 3/40" in console.file.getvalue()
