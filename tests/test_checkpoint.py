"""Checkpoints: bit for bit there and back, complete or absent whatever happens, and errors that name file and tensor."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import small_net
import torch
from safetensors.torch import save_file

from bevfn import compile as compilation
from bevfn import tree
from bevfn.training import checkpoint, optim


def same_bits(a, b) -> bool:
    def bits(leaf):
        return leaf.contiguous().reshape(-1).view(torch.uint8)

    return tree.diff(a, b) == [] and all(torch.equal(bits(x), bits(y)) for x, y in zip(tree.leaves(a), tree.leaves(b)))


def test_train_state_round_trip_is_bitwise_including_nan_and_negative_zero(tmp_path):
    ts, step = small_net.fresh("fp16", ema=optim.Ema())
    ts, _ = step(ts, small_net.batch())
    ts.optimizer.m[:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    checkpoint.save_step(tmp_path / "step_1", ts, {"step": 1, "note": "é"})
    like, _ = small_net.fresh("fp16", ema=optim.Ema())
    loaded, meta = checkpoint.load_step(tmp_path / "step_1", like)
    assert same_bits(loaded, ts)
    assert meta["step"] == 1 and meta["note"] == "é" and meta["torch"] == torch.__version__


def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path):
    ts, step = small_net.fresh("fp16")
    for i in range(2):
        ts, _ = step(ts, small_net.batch(i))
    checkpoint.save_step(tmp_path / "step_2", ts, {})
    loaded, _ = checkpoint.load_step(tmp_path / "step_2", small_net.fresh("fp16")[0])
    for i in range(2, 4):
        ts, _ = step(ts, small_net.batch(i))
        loaded, _ = step(loaded, small_net.batch(i))
    assert same_bits(loaded, ts)


def test_state_whose_leaves_are_views_of_one_vector_is_saved(tmp_path):
    ts, step = small_net.fresh("fp32")
    ts, _ = compilation.step(step, backend="eager", donate=False)(ts, small_net.batch())
    assert len({leaf.untyped_storage().data_ptr() for leaf in tree.leaves(ts.params)}) == 1
    checkpoint.save_step(tmp_path / "step_1", ts, {})
    assert same_bits(checkpoint.load_step(tmp_path / "step_1", ts)[0], ts)


def test_channels_last_tensors_keep_their_values(tmp_path):
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    checkpoint.save_step(tmp_path / "step_1", {"x": x}, {})
    assert torch.equal(checkpoint.load_step(tmp_path / "step_1", {"x": x})[0]["x"], x)


def test_only_the_last_written_checkpoints_are_kept_whatever_their_number(tmp_path):
    ts, _ = small_net.fresh("fp32")
    (tmp_path / "other").mkdir()
    for number in (5, 6, 7, 1):  # a run that began again
        checkpoint.save_step(tmp_path / f"step_{number:08d}", ts, {}, keep=2)
        os.utime(tmp_path / f"step_{number:08d}", ns=(0, 10**18 - number))  # copies and clocks do not matter
    assert sorted(f.name for f in tmp_path.iterdir()) == ["other", "step_00000001", "step_00000007"]
    assert [f.name for f in checkpoint.steps(tmp_path)] == ["step_00000007", "step_00000001"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000001"


def test_a_checkpoint_is_replaced_whole_and_leaves_nothing_behind(tmp_path):
    ts, step = small_net.fresh("fp32")
    checkpoint.save_step(tmp_path / "step_1", ts, {"run": 1})
    newer, _ = step(ts, small_net.batch())
    checkpoint.save_step(tmp_path / "step_1", newer, {"run": 2})
    loaded, meta = checkpoint.load_step(tmp_path / "step_1", ts)
    assert meta["run"] == 2 and same_bits(loaded, newer)
    assert [f.name for f in tmp_path.iterdir()] == ["step_1"]


def test_a_failed_save_leaves_the_old_checkpoint_and_no_litter(tmp_path):
    ts, _ = small_net.fresh("fp32")
    checkpoint.save_step(tmp_path / "step_1", ts, {"run": 1})
    with pytest.raises(TypeError):
        checkpoint.save_step(tmp_path / "step_1", ts, {"not json": object()})
    assert checkpoint.load_step(tmp_path / "step_1", ts)[1]["run"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["step_1"]


def test_another_structure_is_named(tmp_path):
    ts, _ = small_net.fresh("fp32")
    checkpoint.save_step(tmp_path / "step_1", ts, {})
    with pytest.raises(
        ValueError, match=r"step_1 does not fit this run: loss_scale\.scale: float32 \[\] only in the second"
    ):
        checkpoint.load_step(tmp_path / "step_1", small_net.fresh("fp16")[0])
    ts.params["head"]["bias"] = torch.zeros(5)
    with pytest.raises(
        ValueError, match=r"params\.head\.bias: float32 \[4\] in the first, float32 \[5\] in the second"
    ):
        checkpoint.load_step(tmp_path / "step_1", ts)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    ts, _ = small_net.fresh("fp32")
    with pytest.raises(ValueError, match="nowhere is not a training checkpoint"):
        checkpoint.load_step(tmp_path / "nowhere", ts)
    checkpoint.save_step(tmp_path / "step_1", ts, {})
    (tmp_path / "step_1" / checkpoint.META).write_text('{"step":')
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        checkpoint.load_step(tmp_path / "step_1", ts)


def test_missing_truncated_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"x\.safetensors does not exist"):
        checkpoint.load_tensors(path)
    save_file({"a": torch.randn(100)}, path)
    whole = path.read_bytes()
    generator = random.Random(0)
    for length in [0, 1, 7, 8, len(whole) - 1, *(generator.randrange(len(whole)) for _ in range(20))]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.safetensors is damaged or not a safetensors file"):
            checkpoint.load_tensors(path)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged or not a safetensors file"):
        checkpoint.load_tensors(path)


# ------------------------------------------------------------------------------------------------ latest and best


def numbered(step: int, size: int = 1000) -> dict:
    """A state that says which step it is, everywhere."""
    return {"params": {"a": torch.full((size,), float(step)), "b": torch.tensor(step)}}


def save(folder: Path, step: int, *, keep: int = 3, size: int = 1000) -> Path:
    made = folder / f"step_{step:08d}"
    checkpoint.save_step(made, numbered(step, size), {"step": step}, keep=keep)
    return made


def read(folder: Path, size: int = 1000) -> int:
    """The step of a checkpoint that is exactly what was written."""
    state, meta = checkpoint.load_step(folder, numbered(0, size))
    assert same_bits(state, numbered(meta["step"], size))
    return meta["step"]


def damage(path: Path) -> None:
    """Flips one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


def test_latest_skips_what_is_damaged_or_incomplete_with_a_sentence_each(tmp_path):
    folders = [save(tmp_path, step, keep=0) for step in range(1, 6)]
    damage(folders[4] / checkpoint.TENSORS)
    (folders[3] / checkpoint.TENSORS).unlink()
    with open(folders[2] / checkpoint.TENSORS, "r+b") as file:
        file.truncate(100)
    (folders[1] / checkpoint.META).write_text("{")
    (tmp_path / "step_00000009").mkdir()
    (tmp_path / ".step_00000010.77.new").mkdir()
    said = []
    found = checkpoint.latest(tmp_path, said.append)
    assert found is not None and read(found) == 1
    named = ("5/train_state.safetensors is damaged", "4 is incomplete", "3/train_state.safetensors is damaged",
             "step_00000009 is not a training checkpoint", "2/meta.json is damaged")  # fmt: skip
    assert len(said) == 5 and all(any(part in sentence for sentence in said) for part in named)
    with pytest.raises(ValueError, match=r"its size or CRC is not what meta\.json says; use an older checkpoint"):
        checkpoint.load_step(folders[4], numbered(0))


def test_there_is_no_latest_where_nothing_was_saved(tmp_path):
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "nowhere") is None
    assert checkpoint.best(tmp_path / "nowhere") is None


def test_a_damaged_checkpoint_makes_room_before_a_whole_one(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "step_00000003" / checkpoint.META).unlink()
    save(tmp_path, 4, keep=3)
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000004"]


def test_the_best_is_spared_until_another_is_better(tmp_path):
    for step, score in enumerate([0.1, 0.5, 0.3, 0.4, 0.45], start=1):
        made = save(tmp_path, step, keep=2)
        assert checkpoint.keep_best(tmp_path, made.name, score) == (step <= 2)
    assert checkpoint.best(tmp_path) == tmp_path / "step_00000002"
    assert names(tmp_path) == ["best.json", "step_00000002", "step_00000004", "step_00000005"]
    assert read(tmp_path / "step_00000002") == 2
    save(tmp_path, 6, keep=2)
    assert checkpoint.keep_best(tmp_path, "step_00000006", 0.6)
    save(tmp_path, 7, keep=2)
    assert names(tmp_path) == ["best.json", "step_00000006", "step_00000007"]


def test_a_score_of_nan_is_never_the_best_of_something(tmp_path):
    for step, score in ((1, 0.2), (2, float("nan"))):
        save(tmp_path, step)
        checkpoint.keep_best(tmp_path, f"step_{step:08d}", score)
    assert checkpoint.best(tmp_path) == tmp_path / "step_00000001"


def test_the_best_must_be_there(tmp_path):
    with pytest.raises(
        ValueError, match="has no checkpoint step_7 that could be the best; save it before its evaluation"
    ):
        checkpoint.keep_best(tmp_path, "step_7", 0.5)
    (tmp_path / checkpoint.BEST).write_text("{")
    with pytest.raises(ValueError, match=r"best\.json is damaged; delete it"):
        checkpoint.best(tmp_path)


def test_sweeping_deletes_leftovers_only(tmp_path):
    save(tmp_path, 1)
    checkpoint.keep_best(tmp_path, "step_00000001", 0.5)
    (tmp_path / ".step_00000002.4711.new").mkdir()
    (tmp_path / ".step_00000002.4711.new" / checkpoint.TENSORS).write_bytes(b"half")
    (tmp_path / ".best.json.4711").write_bytes(b"{")
    (tmp_path / ".gitignore").write_text("*")
    checkpoint.sweep(tmp_path)
    assert names(tmp_path) == [".gitignore", "best.json", "step_00000001"]


def test_sweeping_spares_what_a_user_hid_there(tmp_path):
    save(tmp_path, 1)
    mine = (".step_notes", ".step_00000001.backup", ".best.json.mine")
    for name in mine:
        (tmp_path / name).mkdir()
    checkpoint.sweep(tmp_path)
    assert names(tmp_path) == sorted([*mine, "step_00000001"])


def test_pruning_removes_only_what_was_written_here(tmp_path):
    mine = ("step_00000002.my_backup", "step_notes", "step_", "step_00000003 copy")
    for name in mine:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "text").write_text("mine")
    (tmp_path / "step_00000009").mkdir()  # empty, as bevfn leaves none
    for step in range(1, 6):
        made = save(tmp_path, step, keep=2)
        if step == 2:
            (made / "notes.md").write_text("mine")
    assert names(tmp_path) == sorted([*mine, "step_00000002", "step_00000004", "step_00000005", "step_00000009"])
    assert checkpoint.latest(tmp_path, lambda sentence: None) == tmp_path / "step_00000005"
    assert [f.name for f in checkpoint.steps(tmp_path)] == [
        "step_00000009", "step_00000002", "step_00000004", "step_00000005"
    ]  # fmt: skip


def test_copies_under_other_names_are_the_users(tmp_path):
    first = save(tmp_path, 2)
    for copy in ("step_00000099", "step_2", "step_000000002", "step_00000004"):
        shutil.copytree(first, tmp_path / copy)
    for step in (3, 4, 5, 6):
        save(tmp_path, step, keep=2)
    mine = ["step_00000004.replaced", "step_00000099", "step_2", "step_000000002"]
    assert names(tmp_path) == sorted(["step_00000005", "step_00000006", *mine])
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000006"


def test_a_folder_beside_a_checkpoint_that_is_replaced_stays_the_users(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_00000001+").mkdir()
    (tmp_path / "step_00000001+" / "notes.md").write_text("mine")
    save(tmp_path, 1)
    assert [path.read_text() for path in tmp_path.glob("*/notes.md")] == ["mine"]


def test_a_checkpoint_that_a_user_added_to_is_not_replaced_but_put_aside(tmp_path):
    (save(tmp_path, 1) / "notes.md").write_text("mine")
    save(tmp_path, 1)
    assert names(tmp_path) == ["step_00000001", "step_00000001.replaced"]
    assert (tmp_path / "step_00000001.replaced" / "notes.md").read_text() == "mine"


def test_a_linked_checkpoint_is_left_alone(tmp_path):
    save(tmp_path / "other", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step_00000001").symlink_to(tmp_path / "other" / "step_00000001")
    for step in (2, 3):
        save(tmp_path / "run", step, keep=1)
    assert names(tmp_path / "run") == ["step_00000001", "step_00000003"] and names(tmp_path / "other")


def trained(step: int) -> dict:
    """As `numbered`, with the step that a train state carries."""
    return {**numbered(step), "step": torch.tensor(step)}


def rewritten(folder: Path, change: Callable[[dict], object]) -> None:
    """meta.json with other values, as an editor leaves it."""
    meta = json.loads((folder / checkpoint.META).read_text())
    change(meta)
    (folder / checkpoint.META).write_text(json.dumps(meta))


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_of_meta_json_is_found_wherever_it_is(tmp_path, bit):
    checkpoint.save_step(tmp_path / "step_00000001", trained(1), {"step": 1})
    checkpoint.save_step(tmp_path / "step_00000002", trained(2), {"step": 2, "run": {"processes": 2}})
    path = tmp_path / "step_00000002" / checkpoint.META
    whole = path.read_bytes()
    for place in range(bit, len(whole), 8):  # each byte once, over the eight
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
        said: list[str] = []
        found = checkpoint.latest(tmp_path, said.append)
        if found == tmp_path / "step_00000002":  # one space for another
            assert checkpoint.read_meta(found)["step"] == 2 and said == []
        else:
            assert (
                found == tmp_path / "step_00000001"
                and len(said) == 1
                and "step_00000002/meta.json is damaged" in said[0]
            )


@pytest.mark.parametrize(
    "change",
    [
        {"step": 7}, {"step": "2"}, {"step": None}, {"step": -1}, {"step": 2.5}, {"step": [2]}, {"step": True},
        {"step": 10**400}, {"checkpoint": None}, {"checkpoint": []}, {"checkpoint": 3}, {"checkpoint": "x"},
        {"checkpoint": {"serial": "x"}}, {"checkpoint": {"serial": None}}, {"checkpoint": {"serial": 1e300}},
        {"checkpoint": {"serial": [1]}}, {"checkpoint": {"serial": {}}}, {"checkpoint": {"serial": 1, "bytes": "1"}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("sealed", [True, False])
def test_a_meta_json_with_wrong_values_is_skipped_by_name(tmp_path, change, sealed):
    for step in (1, 2):
        checkpoint.save_step(tmp_path / f"step_{step:08d}", trained(step), {"step": step})
    made = tmp_path / "step_00000002"
    rewritten(made, lambda meta: meta.update(change))
    if not sealed:  # as an older bevfn wrote it
        rewritten(made, lambda meta: (meta.pop("seal"), meta.pop("format")))
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append) == tmp_path / "step_00000001"
    assert len(said) == 1 and f"{made}" in said[0] and "\n" not in said[0]
    with pytest.raises(ValueError, match="step_00000002"):
        checkpoint.load_step(made, trained(0))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"7", b"[" * 200_000, b'{"step": NaN}', b"\xff\xfe", b'{"a":1e999}']
)
def test_a_meta_json_that_is_no_object_is_skipped_by_name(tmp_path, content):
    for step in (1, 2):
        checkpoint.save_step(tmp_path / f"step_{step:08d}", trained(step), {"step": step})
    (tmp_path / "step_00000002" / checkpoint.META).write_bytes(content)
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append) == tmp_path / "step_00000001"
    assert len(said) == 1 and "step_00000002/meta.json is damaged" in said[0]
    save(tmp_path, 3, keep=1)  # and the run goes on


def test_the_name_of_a_folder_is_its_step(tmp_path):
    checkpoint.save_step(tmp_path / "step_00000002", trained(2), {"step": 2})
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000020")
    with pytest.raises(ValueError, match=r"meta\.json is damaged \(it says step 2, its folder's name says 20\)"):
        checkpoint.load_step(tmp_path / "step_00000020", trained(0))


def test_the_tensors_are_of_the_step_that_meta_json_says(tmp_path):
    checkpoint.save_step(tmp_path / "step_00000003", trained(2), {"step": 3})
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append) is None
    assert "train_state.safetensors is of step 2, meta.json says 3" in said[0]


@pytest.mark.parametrize("step", [float("inf"), float("nan")])
def test_tensors_of_no_step_are_passed_over(tmp_path, step):
    checkpoint.save_step(tmp_path / "step_00000003", {"step": torch.tensor(step)}, {"step": 3})
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append) is None
    assert "train_state.safetensors has the step" in said[0]


def test_a_checkpoint_of_an_older_bevfn_is_read(tmp_path):
    checkpoint.save_step(tmp_path / "step_00000002", trained(2), {"step": 2})
    rewritten(tmp_path / "step_00000002", lambda meta: (meta.pop("seal"), meta.pop("format")))
    assert checkpoint.latest(tmp_path, pytest.fail) == tmp_path / "step_00000002"
    loaded, meta = checkpoint.load_step(tmp_path / "step_00000002", trained(0))
    assert same_bits(loaded, trained(2)) and meta["step"] == 2


@pytest.mark.parametrize(
    "content",
    ["[]", "7", "null", '"x"', "{}", '{"name": 3, "value": 1}', '{"name": "step_00000001", "value": "1"}',
     '{"name": "step_00000001", "value": NaN}', '{"name": "../elsewhere", "value": 1}', '{"name": null, "value": 1}',
     '{"name": "step_00000001", "value": 1' + "0" * 400 + "}", "[" * 200_000],
)  # fmt: skip
def test_a_best_json_of_another_type_is_named(tmp_path, content):
    save(tmp_path, 1)
    (tmp_path / checkpoint.BEST).write_text(content)
    with pytest.raises(ValueError, match=r"best\.json is damaged; delete it"):
        checkpoint.best(tmp_path)
    with pytest.raises(ValueError, match=r"best\.json is damaged; delete it"):
        checkpoint.keep_best(tmp_path, "step_00000001", 0.5)


def test_a_first_score_of_nan_is_not_written(tmp_path):
    save(tmp_path, 1)
    assert not checkpoint.keep_best(tmp_path, "step_00000001", float("nan"))
    assert names(tmp_path) == ["step_00000001"]


def test_a_checkpoint_that_was_loaded_is_not_tied_to_its_file(tmp_path):
    state, _ = checkpoint.load_step(save(tmp_path, 5), numbered(0))
    with open(tmp_path / "step_00000005" / checkpoint.TENSORS, "r+b") as file:
        file.truncate(0)  # were it mapped, the process would now die of SIGBUS
    assert same_bits(state, numbered(5))


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o022)
    try:
        made = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert [(made / name).stat().st_mode & 0o777 for name in (checkpoint.TENSORS, checkpoint.META)] == [0o644, 0o644]


# ------------------------------------------------------------------------------------------------- kills and disks


def child(run: Callable[[], None]) -> int:
    """A forked process that runs `run` and exits with 0, or 1 after an exception."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the pool of OpenMP threads did not survive the fork: waiting for it is for ever
            run()
            code = 0
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(event: int, run: Callable[[], None]) -> bool:
    """Runs `run` in a process that is killed at its `event`-th change of the file system; whether it came to that."""
    changes = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "os.chmod", "os.utime")
    seen = itertools.count(1)

    def hook(name: str, arguments: tuple) -> None:
        if name in changes and next(seen) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def hooked() -> None:
        sys.addaudithook(hook)
        run()

    code = exit_code(child(hooked))
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("before, step", [((), 1), ((1, 2), 3), ((1, 2), 2)])
def test_a_kill_between_any_two_changes_leaves_a_whole_checkpoint(tmp_path, monkeypatch, before, step):
    """Writing the first, one more with pruning, and one in place of another of the same step."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the kernel survives
    for event in itertools.count(1):
        folder = tmp_path / str(event)
        for number in before:
            checkpoint.save_step(folder / f"step_{number:08d}", numbered(number), {"step": number, "run": 1}, keep=2)
        new = folder / f"step_{step:08d}"
        killed = killed_at(event, lambda: checkpoint.save_step(new, numbered(step), {"step": step, "run": 2}, keep=2))  # noqa: B023
        said: list[str] = []
        found = checkpoint.latest(folder, said.append)
        assert said == []  # nothing visible is half
        written = [read(f) for f in checkpoint.steps(folder)]
        assert set(written) <= {*before, step} and (found is not None or not before)
        if found is not None:
            assert read(found) in (max(before, default=step), step)
        checkpoint.sweep(folder)
        assert all(not name.startswith(".") for name in (names(folder) if folder.exists() else ()))
        last = save(folder, step + 1, keep=2)  # and the run goes on
        assert checkpoint.latest(folder) == last
        if not killed:
            break
    assert event > 10


def kill_at_random(folder: Path, times: int) -> None:
    """Processes that save one step after the other, each killed at a random moment after its first, the next goes on."""
    generator, size = random.Random(0), 500_000  # 2 MB

    def train() -> None:
        checkpoint.sweep(folder)
        latest = checkpoint.latest(folder)
        for step in itertools.count(1 + (read(latest, size) if latest else 0)):
            save(folder, step, keep=2, size=size)

    reached = 0
    for _ in range(times):
        pid = child(train)
        while not any(int(made.name[5:]) > reached for made in checkpoint.steps(folder)):
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.3))
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == -signal.SIGKILL
        said: list[str] = []
        found = checkpoint.latest(folder, said.append)
        if found is not None:
            step = read(found, size)
            assert step >= reached and said == []
            reached = step
    assert reached >= times


def test_whenever_a_run_is_killed_its_latest_checkpoint_is_whole(tmp_path):
    kill_at_random(tmp_path, 3)


@pytest.mark.slow
def test_whenever_a_run_is_killed_its_latest_checkpoint_is_whole_20_times(tmp_path):
    kill_at_random(tmp_path, 20)


@pytest.mark.parametrize("announced", [True, False])
def test_a_full_disk_is_named_and_leaves_the_checkpoints_before(small_disk, monkeypatch, announced):
    """Known beforehand from the free space, or found out in the middle of writing."""
    if not announced:
        monkeypatch.setattr(checkpoint, "_check_room", lambda folder, leaves: None)
    size = 500_000  # 2 MB
    with pytest.raises(OSError) as error:
        for step in range(1, 9):
            save(small_disk, step, keep=0, size=size)
    message, whole = str(error.value), len(names(small_disk))
    assert message.startswith(f"{small_disk}/step_{whole + 1:08d} could not be written (No space left on device")
    assert "it takes 2000008 bytes and " in message and "\n" not in message
    assert names(small_disk) == [f"step_{step:08d}" for step in range(1, whole + 1)]  # no litter
    found = checkpoint.latest(small_disk)
    assert found is not None and read(found, size) == whole


def test_a_file_size_limit_is_named_and_leaves_the_checkpoints_before(tmp_path):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save(tmp_path, 2, size=100_000)
        except OSError as error:
            assert "step_00000002 could not be written (" in str(error) and "File too large" in str(error)
        else:
            raise AssertionError("no limit")

    save(tmp_path, 1)
    assert exit_code(child(limited)) == 0
    assert names(tmp_path) == ["step_00000001"]


def test_a_read_only_place_is_named():
    with pytest.raises(OSError, match=r"^/proc/run/step_1 could not be written"):
        checkpoint.save_step(Path("/proc/run/step_1"), numbered(1), {})


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from bevfn.training import checkpoint
state = {"a": torch.ones(2**25), "b": torch.ones(2**25)}  # 256 MB
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
checkpoint.save_step(Path(sys.argv[1]) / "step_0", {"a": torch.ones(10)}, {})
before = peak()
checkpoint.save_step(Path(sys.argv[1]) / "step_1", state, {})
print(peak() - before)
"""


def test_saving_takes_no_second_copy_of_the_state(tmp_path):
    printed = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(printed.stdout) < 64  # MB, of 256
