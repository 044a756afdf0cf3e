"""Checkpoints: bit for bit there and back, complete or absent, and errors that name file and tensor."""

import os
import random

import pytest
import small_net
import torch

from bevfn import checkpoint, optim, tree
from bevfn import compile as compilation


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
    checkpoint.save_tensors(tmp_path / "x.safetensors", {"x": x})
    assert torch.equal(checkpoint.load_tensors(tmp_path / "x.safetensors")["x"], x)


def test_only_the_last_written_checkpoints_are_kept_whatever_their_number(tmp_path):
    ts, _ = small_net.fresh("fp32")
    (tmp_path / "other").mkdir()
    for number in (5, 6, 7, 1):  # a run that began again
        checkpoint.save_step(tmp_path / f"step_{number}", ts, {}, keep=2)
        os.utime(tmp_path / f"step_{number}", ns=(number, number + 10**9 * (10 if number == 1 else 1)))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["other", "step_1", "step_7"]


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
    checkpoint.save_tensors(path, {"a": torch.randn(100)})
    whole = path.read_bytes()
    generator = random.Random(0)
    for length in [0, 1, 7, 8, len(whole) - 1, *(generator.randrange(len(whole)) for _ in range(20))]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.safetensors is damaged or not a safetensors file"):
            checkpoint.load_tensors(path)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged or not a safetensors file"):
        checkpoint.load_tensors(path)
