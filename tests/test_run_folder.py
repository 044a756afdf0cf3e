"""A run folder: one process at a time, one config, and where to go on; stopping on a signal."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from bevfn.metrics import METRICS_FILE
from bevfn.training import checkpoint, run_folder, signals

CONFIG = {"epochs": 20, "optimizer": {"lr": 1e-3, "betas": (0.9, 0.99)}, "root": Path("/data"), "workers": 4}


def state(step: int) -> dict:
    return {"params": torch.full((10,), float(step))}


def run_to(folder: Path, step: int, config: dict = CONFIG) -> None:
    """A run that was killed after a checkpoint at `step`."""
    with run_folder.open(folder, config):
        (folder / METRICS_FILE).write_text(json.dumps({"step": step}) + "\n")
        checkpoint.save_step(folder / "checkpoints" / f"step_{step:08d}", state(step), {"step": step})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# ------------------------------------------------------------------------------------------------ begin and resume


def test_a_new_run_writes_its_config_and_has_nothing_to_go_on_from(tmp_path):
    with run_folder.open(tmp_path / "a" / "b", CONFIG) as latest:
        assert latest is None
        written = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert written == {"epochs": 20, "optimizer": {"lr": 1e-3, "betas": [0.9, 0.99]}, "root": "/data", "workers": 4}


def test_a_resumed_run_goes_on_from_the_latest_whole_checkpoint(tmp_path):
    run_to(tmp_path, 10)
    checkpoint.save_step(tmp_path / "checkpoints" / "step_00000020", state(20), {"step": 20})
    (tmp_path / "checkpoints" / ".step_00000030.123.new").mkdir()
    with run_folder.open(tmp_path, CONFIG, resume=True) as latest:
        assert latest == tmp_path / "checkpoints" / "step_00000020"
        assert not list((tmp_path / "checkpoints").glob(".*"))  # swept
    (latest / checkpoint.TENSORS).write_bytes(b"")
    said = []
    with run_folder.open(tmp_path, CONFIG, resume=True, say=said.append) as latest:
        assert latest == tmp_path / "checkpoints" / "step_00000010"
    assert len(said) == 2 and "step_00000020/train_state.safetensors is damaged" in said[0]
    assert said[1] == f"going on from the older {tmp_path / 'checkpoints' / 'step_00000010'}"


def test_resume_begins_where_there_is_nothing_to_go_on_from(tmp_path):
    with run_folder.open(tmp_path, CONFIG):
        pass
    with run_folder.open(tmp_path, CONFIG, resume=True) as latest:  # killed before its first step
        assert latest is None
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n')  # killed before its first checkpoint
    said = []
    with run_folder.open(tmp_path, CONFIG, resume=True, say=said.append) as latest:
        assert latest is None
    assert said == [f"{tmp_path} has no whole checkpoint yet: the run begins from its start"]


def test_resume_of_a_folder_without_a_run_is_refused_and_makes_nothing(tmp_path):
    with (
        pytest.raises(ValueError, match=r"typo holds no run to go on with \(it has no config\.json\); check --run-dir"),
        run_folder.open(tmp_path / "typo", CONFIG, resume=True),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_resume_is_refused_where_every_checkpoint_is_damaged(tmp_path):
    run_to(tmp_path, 10)
    checkpoint.save_step(tmp_path / "checkpoints" / "step_00000020", state(20), {"step": 20})
    for folder in checkpoint.steps(tmp_path / "checkpoints"):
        (folder / checkpoint.TENSORS).write_bytes(b"")
    before = snapshot(tmp_path)
    with (
        pytest.raises(ValueError, match=r"none of its 2 checkpoints is whole \(.*step_00000020.*\); copy one back"),
        run_folder.open(tmp_path, CONFIG, resume=True),
    ):
        pass
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "name, content, refused",
    [
        (METRICS_FILE, '{"step": 10}\n{"step": 11}\n', True), (METRICS_FILE, '{"step": 9}\n{"step": 10}\n', False),
        ("summary.json", "{}", True), ("evaluations/step_00000010/metrics.json", "{}", True),
        ("evaluations/step_00000000/metrics.json", "{}", False), ("evaluations/step_00000010_val/metrics.json", "{}", False),
    ],
)  # fmt: skip
def test_resume_is_refused_where_a_run_came_further_and_has_no_checkpoint(tmp_path, name, content, refused):
    with run_folder.open(tmp_path, CONFIG):
        (tmp_path / METRICS_FILE).write_text('{"step": 1}\n')
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    before, said = snapshot(tmp_path), []
    how = {"resume": True, "first": 10, "say": said.append}
    if refused:
        what = rf"has no checkpoint, but {name.split('/')[0]} of later steps than its first one, due at step 10; copy its checkpoints/"
        with pytest.raises(ValueError, match=what), run_folder.open(tmp_path, CONFIG, **how):
            pass
        assert snapshot(tmp_path) == before
        how["force"] = True
    with run_folder.open(tmp_path, CONFIG, **how) as latest:
        assert latest is None
    assert said == [f"{tmp_path} has no whole checkpoint yet: the run begins from its start"]


# ----------------------------------------------------------------------------------------------------------- facts

FACTS = {"processes": 2, "accumulate": 4, "microbatches": 8, "total_steps": 100, "data": "00ff"}


def run_with(folder: Path, facts: dict | None, config: dict = CONFIG) -> None:
    run_to(folder, 10, config)
    meta = {"step": 20} | ({} if facts is None else {run_folder.FACTS: facts})
    checkpoint.save_step(folder / "checkpoints" / "step_00000020", state(20), meta)


@pytest.mark.parametrize("name, value", [("processes", 1), ("total_steps", 50), ("data", "ff00")])
def test_another_fact_is_refused_and_named(tmp_path, name, value):
    run_with(tmp_path, FACTS)
    before = snapshot(tmp_path)
    changed = f"{name}: {json.dumps(FACTS[name])} -> {json.dumps(value)}"
    with (
        pytest.raises(ValueError, match=f"begun with another config \\({changed}\\)"),
        run_folder.open(tmp_path, CONFIG, resume=True, facts={**FACTS, name: value}),
    ):
        pass
    assert snapshot(tmp_path) == before
    said = []
    with run_folder.open(
        tmp_path, CONFIG, resume=True, force=True, facts={**FACTS, name: value}, say=said.append
    ) as latest:
        assert latest is not None
    assert said == [f"warning: --force goes on although this differs: {changed}"]


def test_a_fact_that_is_free_may_change(tmp_path):
    run_with(tmp_path, FACTS)
    free = frozenset({"processes", "accumulate"})
    other = {**FACTS, "processes": 4, "accumulate": 2}
    with run_folder.open(tmp_path, CONFIG, resume=True, facts=other, free=free) as latest:
        assert latest is not None


def test_a_checkpoint_of_an_older_bevfn_is_taken_with_a_sentence_and_its_configs_facts_bind(tmp_path):
    run_with(tmp_path, None, {**CONFIG, "accumulate": 4})
    free, said = frozenset({"processes", "accumulate"}), []
    config = {**CONFIG, "accumulate": 4}
    with run_folder.open(tmp_path, config, resume=True, facts=FACTS, free=free, say=said.append) as latest:
        assert latest is not None
    assert len(said) == 1 and "is of an older bevfn, which did not note its data, processes and code" in said[0]
    other = {**FACTS, "processes": 4, "accumulate": 2}
    with (
        pytest.raises(ValueError, match=r"another config \(accumulate: 4 -> 2\)"),
        run_folder.open(tmp_path, {**CONFIG, "accumulate": 2}, resume=True, facts=other, free=free),
    ):
        pass


def test_a_folder_with_a_run_is_refused_unless_resumed_and_left_alone(tmp_path):
    run_to(tmp_path, 10)
    before = snapshot(tmp_path)
    with (
        pytest.raises(
            ValueError, match=r"already holds a run; add --resume to go on with it, or choose another folder"
        ),
        run_folder.open(tmp_path, {**CONFIG, "epochs": 1}),
    ):
        pass
    assert snapshot(tmp_path) == before


def test_a_run_that_failed_before_its_first_step_does_not_block_the_folder(tmp_path):
    with pytest.raises(KeyError), run_folder.open(tmp_path, CONFIG):
        raise KeyError("no data")
    with run_folder.open(tmp_path, {**CONFIG, "epochs": 1}):
        assert json.loads((tmp_path / "config.json").read_text())["epochs"] == 1


# ---------------------------------------------------------------------------------------------------------- config


def test_another_config_is_refused_with_every_difference_named(tmp_path):
    run_to(tmp_path, 10)
    before = snapshot(tmp_path)
    changed = {"epochs": 24, "optimizer": {"lr": 2e-3, "betas": [0.9, 0.99], "clip": 35}, "workers": 8}
    with (
        pytest.raises(ValueError) as error,
        run_folder.open(tmp_path, changed, resume=True, free=frozenset({"workers"})),
    ):
        pass
    assert str(error.value).startswith(
        f'{tmp_path} was begun with another config (epochs: 20 -> 24; optimizer.lr: 0.001 -> 0.002; root: "/data" -> '
        "(none); optimizer.clip: (none) -> 35); give the old values"
    )
    assert "--force" in str(error.value) and snapshot(tmp_path) == before


@pytest.mark.parametrize("free", ["workers", "optimizer.lr", "optimizer"])
def test_free_fields_may_change(tmp_path, free):
    run_to(tmp_path, 10)
    changed = (
        {**CONFIG, "workers": 8} if free == "workers" else {**CONFIG, "optimizer": {"lr": 5, "betas": (0.9, 0.99)}}
    )
    with run_folder.open(tmp_path, changed, resume=True, free=frozenset({free})) as latest:
        assert latest is not None
    assert sorted(f.name for f in tmp_path.glob("config*")) == ["config.json"]


def test_force_goes_on_with_another_config_and_keeps_the_old_ones(tmp_path):
    run_to(tmp_path, 10)
    for epochs in (24, 30):
        with run_folder.open(tmp_path, {**CONFIG, "epochs": epochs}, resume=True, force=True) as latest:
            assert latest is not None
    names = ("config.1.json", "config.2.json", "config.json")
    assert [json.loads((tmp_path / name).read_text())["epochs"] for name in names] == [20, 24, 30]


def run_with_flags(folder: Path, config: dict = CONFIG) -> None:
    run_to(folder, 10, config)
    meta = {"step": 20, run_folder.FLAGS: json.loads(json.dumps(config, default=str))}
    checkpoint.save_step(folder / "checkpoints" / "step_00000020", state(20), meta)


@pytest.mark.parametrize("config", [None, {"epochs": 3}, {**CONFIG, "optimizer": {"lr": 0.5}}])
def test_a_run_whose_config_is_gone_or_anothers_has_that_of_its_checkpoint(tmp_path, config):
    run_with_flags(tmp_path)
    (tmp_path / "config.json").unlink()
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    other = {**CONFIG, "optimizer": {"lr": 0.5, "betas": (0.9, 0.99)}}
    refused = pytest.raises(
        ValueError, match=r"begun with another config \(optimizer.lr: 0.001 -> 0.5\); give the old values"
    )
    with refused, run_folder.open(tmp_path, other, resume=True):
        pass
    with run_folder.open(tmp_path, CONFIG, resume=True, say=pytest.fail) as latest:
        assert latest == tmp_path / "checkpoints" / "step_00000020"
    assert run_folder.read_config(tmp_path / "config.json") == json.loads(json.dumps(CONFIG, default=str))


def test_a_forced_config_holds_although_the_checkpoint_is_older(tmp_path):
    run_with_flags(tmp_path)
    with run_folder.open(tmp_path, {**CONFIG, "epochs": 24}, resume=True, force=True):
        pass
    with run_folder.open(
        tmp_path, {**CONFIG, "epochs": 24, "workers": 8}, resume=True, free=frozenset({"workers"})
    ) as latest:
        assert latest is not None
    refused = pytest.raises(ValueError, match=r"another config \(epochs: 24 -> 20\)")
    with refused, run_folder.open(tmp_path, CONFIG, resume=True, free=frozenset({"workers"})):
        pass


def test_where_nothing_notes_the_flags_it_is_said(tmp_path):
    run_to(tmp_path, 10)
    (tmp_path / "config.json").unlink()
    said = []
    with run_folder.open(tmp_path, {**CONFIG, "epochs": 1}, resume=True, say=said.append) as latest:
        assert latest is not None
    assert said == [
        f"{tmp_path} has no config.json, and no checkpoint that notes its flags: nothing compares them with these"
    ]


def test_values_that_are_equal_after_json_are_no_difference(tmp_path):
    run_to(tmp_path, 10)
    same = json.loads(json.dumps(CONFIG, default=str))
    with run_folder.open(tmp_path, same, resume=True) as latest:
        assert latest is not None


def test_a_damaged_config_is_named(tmp_path):
    run_to(tmp_path, 10)
    (tmp_path / "config.json").write_text('{"epochs": ')
    what = r"config\.json is damaged .* copy it back\. Without it --resume compares the flags with those that the last checkpoint"
    with pytest.raises(ValueError, match=what), run_folder.open(tmp_path, CONFIG, resume=True):
        pass


@pytest.mark.parametrize(
    "content", [b"[]", b"7", b'"x"', b"null", b"[" * 200_000, b'{"lr": NaN}', b'{"lr": 1e999}', b"\xff"]
)
def test_a_config_of_another_type_is_named(tmp_path, content):
    run_to(tmp_path, 10)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged"), run_folder.open(tmp_path, CONFIG, resume=True):
        pass


@pytest.mark.parametrize(
    "line", [b"[1]", b"7", b'{"loss": 1}', b'{"step": [2]}', b'{"step": 2, "loss": {}}', b'{"step": null}', b"{",
             b'{"step": 2, "loss": 1' + b"0" * 400 + b"}", b'{"step": 2, "loss": NaN}', b"[" * 200_000],
)  # fmt: skip
def test_damaged_metrics_are_named_before_the_run_goes_on(tmp_path, line):
    run_to(tmp_path, 10)
    with open(tmp_path / METRICS_FILE, "ab") as file:
        file.write(line + b"\n")
    with (
        pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged; delete that line"),
        run_folder.open(tmp_path, CONFIG, resume=True),
    ):
        pass


def test_a_damaged_note_of_the_best_is_named_before_the_run_goes_on(tmp_path):
    run_to(tmp_path, 10)
    (tmp_path / "checkpoints" / checkpoint.BEST).write_text('{"name": "step_00000010", "value": "high"}')
    with pytest.raises(ValueError, match=r"best\.json is damaged"), run_folder.open(tmp_path, CONFIG, resume=True):
        pass


@dataclass(frozen=True)
class Stored:
    epochs: int = 1
    lr: float | None = None
    root: Path | None = None
    mode: Literal["full", "performance"] = "full"
    pretrained: tuple[Path, ...] = ()
    size: tuple[int, int] = (1, 2)
    resume: bool = False


def stored(folder: Path, values: dict) -> Stored:
    (folder / "config.json").write_text(json.dumps(values, default=str))
    return run_folder.stored_config(folder / "config.json", Stored())


def test_a_config_comes_back_as_it_was(tmp_path):
    config = Stored(3, 1e-3, Path("/data"), "performance", (Path("a"), Path("b")), (3, 4), True)
    assert stored(tmp_path, asdict(config)) == config
    assert stored(tmp_path, {"lr": 1}) == Stored(lr=1)


@pytest.mark.parametrize(
    "name, value",
    [("epochs", "four"), ("epochs", 1.5), ("epochs", True), ("epochs", None), ("lr", "x"), ("lr", 10**400), ("root", 3), ("root", "a\0b"), ("root", "\ud800"), ("mode", "other"),
     ("mode", 0), ("pretrained", "a"), ("pretrained", [1]), ("size", [1]), ("size", {"a": 1}), ("resume", 1)],
)  # fmt: skip
def test_a_field_of_another_type_is_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"config\.json is damaged: {name} is "):
        stored(tmp_path, {name: value})


def test_a_config_of_another_experiment_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is of another experiment \(it sets depth\)"):
        stored(tmp_path, {"depth": 1})


# ------------------------------------------------------------------------------------------------- who may write

HOLD = """
import os, sys
from pathlib import Path
from bevfn.training import run_folder
with run_folder.open(Path(sys.argv[1]), {}):
    if len(sys.argv) > 2 and os.fork() == 0:   # as a data loader's worker
        import time; time.sleep(float(sys.argv[2])); os._exit(0)
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path, *arguments: str) -> subprocess.Popen:
    """A process with a run in `folder`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_a_second_run_in_the_same_folder_is_refused_and_told_by_whom(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 0.0)
    process = hold(tmp_path)
    try:
        expected = f"is in use by another run \\(process {process.pid} on .+\\); wait for it"
        with pytest.raises(ValueError, match=expected), run_folder.open(tmp_path, {}):
            pass
    finally:
        process.communicate("")
    with run_folder.open(tmp_path, {}):
        pass


def test_the_lock_of_a_killed_run_is_free_as_soon_as_its_workers_are_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", math.inf)  # a busy machine ends a worker when it can
    process = hold(tmp_path, "0.7")
    process.kill()
    process.wait()
    with run_folder.open(tmp_path, {}):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"The run folder .* cannot be written \(.+\); choose another one with --run-dir"
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=message), run_folder.open(folder, {}):
            pass


def test_a_read_only_folder_is_named(tmp_path):
    run_to(tmp_path / "run", 10)
    if os.geteuid() == 0:  # root may write anywhere but on a read-only mount
        mount = ["mount", "--bind", "-o", "ro", str(tmp_path / "run"), str(tmp_path / "run")]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting is not permitted here")
    else:
        (tmp_path / "run").chmod(0o555)
    try:
        refused = pytest.raises(ValueError, match="run cannot be written")
        with refused, run_folder.open(tmp_path / "run", CONFIG, resume=True):
            pass
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(tmp_path / "run")], check=True)
        else:
            (tmp_path / "run").chmod(0o755)


# --------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_only_asks_to_stop(number, capfd):
    before = signal.getsignal(number)
    with signals.on_terminate() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)  # again: still saving
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_a_second_ctrl_c_aborts():
    with pytest.raises(KeyboardInterrupt), signals.on_terminate():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_nothing_is_requested_and_nothing_fails():
    seen = []

    def run():
        with signals.on_terminate() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]
