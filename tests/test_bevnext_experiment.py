"""BEVNeXt's experiment: published numbers, flags, whole runs of one stage after the other, what is refused in one sentence."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_world
import test_bevdepth_experiment
import test_bevnext
import torch
from PIL import Image

from bevfn import cli, tree, upstream
from bevfn.data import sampling
from bevfn.data.batch import Base
from bevfn.distributed import Replicas
from bevfn.evaluation import results
from bevfn.experiments import bevdepth, bevnext
from bevfn.metrics import read_metrics
from bevfn.synth import key_frame
from bevfn.training import assembly, checkpoint, command_line, pretrained, run, tasks, train

ONE, TWO = "bevnext-stage1", "bevnext-stage2"
FAST = ("--backend", "eager", "--workers", "0")


def small(model: str, **changes) -> bevnext.Config:
    """The published recipe at mini size on the small world."""
    config = replace(
        bevnext.DEFAULTS[model]["nuscenes"], data_root=small_world.index().root, scale="mini", backend="eager",
        eval_backend="eager", workers=0, batch_size=1, class_balanced=False,
    )  # fmt: skip
    return replace(config, **changes)


# ------------------------------------------------------------------------------------------------ the published numbers


def test_the_recipes_are_the_published_ones():
    """Golden READMEs bevnext_stage1 and bevnext_stage2, "Training recipe"."""
    recipes = {model: of["nuscenes"] for model, of in bevnext.DEFAULTS.items()}
    assert all(c.model == name and c.scale == "published" for name, c in recipes.items())
    assert all((c.batch_size, c.recipe_batch, c.recipe_lr) == (8, 64, 2e-4) for c in recipes.values())
    assert all((c.weight_decay, c.clip_norm, c.depth_loss) == (1e-2, 5.0, 3.0) for c in recipes.values())
    assert all((c.ema, c.ema_ramp, c.ema_updates) == (0.999, 2000.0, 10560) for c in recipes.values())
    assert all((c.warmup_steps, c.warmup_factor) == (200, 1e-3) for c in recipes.values())
    assert all(c.class_balanced and c.augment and c.redraw and not c.drop_last for c in recipes.values())
    assert all(c.published_draw and c.published_history and c.published_z for c in recipes.values())
    assert not any(c.from_scratch for c in recipes.values())
    different = {
        name: (c.stage, c.epochs, c.image_backbone_lr, c.sync_statistics, c.sync_after) for name, c in recipes.items()
    }
    assert different == {
        "bevnext-stage1": (1, 2, 1.0, False, 0), "bevnext-stage2": (2, 12, 1.0, True, 8),
        "bevnext-pers-stage1": (1, 2, 0.75, False, 0), "bevnext-pers-stage2": (2, 12, 0.75, True, 8),
    }  # fmt: skip


def test_warm_up_is_as_long_as_published_in_any_run_that_is_longer():
    for steps, warmup in ((3862, 200), (201, 200), (200, 20), (5, 0)):
        made = bevnext.optimizer(bevnext.Config(), tasks.Plan(steps, steps, 64))
        assert made.lr.warmup_steps == warmup + 1
        rates = made.lr.at(torch.arange(steps))
        assert rates[[0, -1]].tolist() == pytest.approx([2e-4 * (1e-3 if warmup else 1.0), 2e-4])


@pytest.mark.parametrize("model", bevnext.VARIANTS)
def test_every_model_and_scale_reads_what_it_takes(model):
    for scale in ("published", "mini"):
        task = bevnext.task(small(model, scale=scale, class_balanced=True, pretrained=(Path("one"),)))
        reading, at_test, network = task.data.reading(0), task.data.eval_reading, task.predict.keywords["config"]
        for each in (reading, at_test):
            assert each.base is Base.EGO_AT_FRONT and each.range[:2] == (-51.2, -51.2)
            assert each.cameras.image_size == network.grid.image_size and each.cameras.frames == network.frames
            assert each.cameras.history == ("time" if network.frames > 1 else "scene")
        assert reading.random and reading.depth and reading.redraw and reading.depths == "nearest"
        assert not at_test.random and not at_test.depth
        tasks.check(task)
        assert (len(task.data.items) > len(task.data.training)) and task.bottom and task.start.averages
    plain = bevnext.task(small(model, augment=False, pretrained=(Path("one"),))).data.reading(0)
    assert plain.cameras.augmentation is None and plain.redraw and plain.depths == "nearest"


@pytest.mark.parametrize("past, frames", [(None, 3), (0, 3), (2, 3), (5, 6), (8, 9)])
def test_the_number_of_past_frames_is_a_flag(past, frames):
    config = small(TWO, scale="mini", past_frames=past, from_scratch=True)
    task = bevnext.task(config)
    network = task.predict.keywords["config"]
    assert (network.frames, network.with_prev) == (frames, past != 0)
    assert task.data.reading(0).cameras.frames == (frames if past != 0 else 1)
    tasks.check(task)
    assert bevnext.other_stage(config)  # stage 1's has one frame, whatever the flag


def test_quirks_have_their_switches(monkeypatch):
    drawn = []
    monkeypatch.setattr(sampling, "cbgs", lambda *_: drawn.append("ours") or np.arange(2))
    monkeypatch.setattr(sampling, "published_cbgs", lambda *_: drawn.append("upstream's") or np.arange(2))
    for published in (True, False):
        switches = {f"published_{name}": published for name in ("draw", "history", "z")}
        task = bevnext.task(small(TWO, class_balanced=True, redraw=published, depth_loss=0.0, **switches))
        reading = task.data.reading(0)
        assert reading.cameras.history == ("time" if published else "scene") and task.bottom == published
        assert reading.redraw == published and not reading.depth
    assert drawn == ["upstream's", "ours"]
    for model, kinds in bevnext.DEFAULTS.items():
        for kind in ("frame", "synthetic"):
            config = kinds[kind]
            assert not (config.published_draw or config.published_history or config.published_z), model
            assert (bevnext.unready(config) == "") == (config.stage == 1), model


# ---------------------------------------------------------------------------------------------------------------- flags


def parsed(*words: str) -> bevnext.Config:
    return command_line.parse(bevnext.DEFAULTS, [*words, "--data-root", str(small_world.unmade())])


def test_the_stage_chooses_the_model_and_its_defaults():
    assert parsed() == parsed("--stage", "1") == parsed("--model", ONE)
    assert parsed("--stage=2") == parsed("--stage", "2") == parsed("--model", TWO)
    assert (parsed("--stage", "2").epochs, parsed("--stage", "2").sync_after) == (12, 8)
    perspective = parsed("--model", "bevnext-pers-stage2", "--epochs", "3")
    assert (perspective.stage, perspective.epochs, perspective.image_backbone_lr) == (2, 3, 0.75)
    assert parsed("--model", "bevnext-pers-stage2", "--stage", "2").model == "bevnext-pers-stage2"
    assert command_line.parse(bevnext.DEFAULTS, ["--stage", "2"]).scale == "mini"  # the synthetic world's


@pytest.mark.parametrize(
    "words, what",
    [
        (("--stage", "2", "--model", ONE), "is not the stage of --model bevnext-"),
        (("--model=bevnext-pers-stage2", "--stage=1"), "is not the stage of --model bevnext-"),
        (("--norm-momentum", "0.1"), "BEVNeXt has none; leave it out"),
        (("--stage", "1", "--past-frames", "5"), "stage 1 has none; add --stage 2"),
        (("--stage", "2", "--past-frames", "3"), "invalid choice '3'"),
        (("--stage", "1", "--sync-after", "3"), "--sync-after 3 is of --sync-statistics; add that"),
    ],
)
def test_flags_that_contradict_the_model_are_one_sentence(words, what, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bevnext", *words])
    with pytest.raises(SystemExit) as stop:
        run.cli(bevnext.DEFAULTS, bevnext.task, bevnext.__doc__)
    said = " ".join("".join(capsys.readouterr()).replace("│", " ").split())
    assert stop.value.code == 2 and what in said and "Traceback" not in said


@pytest.mark.parametrize(
    "words, choices", [(("--stage", "3"), "('1','2')"), (("--model", "bevnext-stage3"), "bevnext-stage2")]
)
def test_an_unknown_stage_or_model_names_the_choices(words, choices, capsys):
    with pytest.raises((SystemExit, ValueError)) as refused:
        parsed(*words)
    said = "".join("".join((*capsys.readouterr(), str(refused.value))).replace("│", "").split())
    assert choices in said, said


# ----------------------------------------------------------------------------------------------------------- whole runs


def start(config: bevnext.Config) -> tuple[dict, dict]:
    task = bevnext.task(config)
    tasks.check(task)
    return assembly.initial(tasks.Run(task, config, tasks.plan(config, task.data.items)))


@pytest.fixture(scope="module")
def first(bare_runs, tmp_path_factory) -> bevnext.Config:
    """Two steps of stage 1."""
    config = small(ONE, steps=2, checkpoint_every=1, lr=1e-3, run_dir=tmp_path_factory.mktemp("first") / "run")
    with bare_runs():
        run.main(bevnext.task, config)
    return config


@pytest.fixture(scope="module")
def second(first, bare_runs, tmp_path_factory) -> tuple[bevnext.Config, dict]:
    """Two steps of stage 2 from them, and its summary."""
    config = small(
        TWO, steps=2, checkpoint_every=1, pretrained=(last(first),), run_dir=tmp_path_factory.mktemp("second") / "run"
    )
    with bare_runs():
        return config, run.main(bevnext.task, config)


def last(config: bevnext.Config) -> Path:
    return config.run_dir / "checkpoints" / "step_00000002"


def test_stage_two_starts_from_the_averages_of_stage_one(first, capsys):
    params, state = start(small(TWO, pretrained=(last(first),)))
    averages, weights = (pretrained.read_weights(last(first), ema=ema) for ema in (True, False))
    name = "image.backbone.stem.conv.weight"
    ours, theirs, raw = (tree.flatten(each)[name] for each in (params, averages[0], weights[0]))
    assert torch.equal(ours, theirs) and not torch.equal(ours, raw)
    taken = {path for path, leaf in tree.flatten(state).items() if tree.flatten(averages[1]).get(path) is not None}
    assert taken and not any(path.startswith("bev.backbone.") for path in taken)
    said = capsys.readouterr().out
    assert "tensors have their shape there, 0 another one, " in said  # both stages are as wide at mini size
    assert "at init, params.bev.backbone.fusion.reduce.conv.weight is in no file" in said
    assert "unused, params.bev.backbone.stages.0.0.layers.0.conv.weight of " in said


def test_a_run_of_both_stages_leaves_checkpoints_metrics_and_scores(second):
    config, summary = second
    steps = read_metrics(config.run_dir)
    assert [step["step"] for step in steps] == [1, 2]
    assert {"loss/heatmap", "loss/bbox", "loss/depth", "missing/frames", "empty/redrawn"} <= steps[0].keys()
    assert {"NDS", "mAP", "mAVE"} <= summary["scores"].keys()
    out = config.run_dir / "evaluations" / "step_00000002"
    assert results.read(out / "results_nusc.json")["meta"]["use_camera"]
    stored = json.loads((config.run_dir / "config.json").read_text())
    assert (stored["model"], stored["stage"], stored["sync_after"]) == (TWO, 2, 8)


def test_a_resumed_stage_two_is_the_run_that_was_never_stopped(second, bare, tmp_path):
    config, _ = second
    stopped = replace(config, run_dir=tmp_path / "run", resume=True)
    shutil.copytree(config.run_dir, stopped.run_dir)
    shutil.rmtree(last(stopped))
    shutil.rmtree(stopped.run_dir / "evaluations")
    (start_file,) = config.pretrained
    away = start_file.rename(start_file.with_name("away"))  # a run that goes on does not need it any more
    try:
        run.main(bevnext.task, stopped)
    finally:
        away.rename(start_file)
    ours, theirs = (checkpoint.load_tensors(last(each) / checkpoint.TENSORS) for each in (stopped, config))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[leaf], theirs[leaf]) for leaf in ours)


def bevfn(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["bevfn", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_a_checkpoint_scores_as_its_run_did_and_not_as_the_other_stage(second, bare, monkeypatch, tmp_path, capsys):
    config, _ = second
    assert bevfn(monkeypatch, "eval", "bevnext", "--checkpoint", last(config), "--out", tmp_path, *FAST) == 0
    theirs = config.run_dir / "evaluations" / "step_00000002" / "results_nusc.json"
    assert json.loads((tmp_path / "results_nusc.json").read_text()) == json.loads(theirs.read_text())
    arguments = ("eval", "bevnext", "--checkpoint", last(config), "--model", ONE, *FAST)
    assert bevfn(monkeypatch, *arguments) == 2
    assert "--stage 2 is not the stage of --model bevnext-stage1" in capsys.readouterr().err


def test_one_frame_is_nine_copies_of_itself(tmp_path):
    frame = key_frame.write_frame(tmp_path / "frame", image_size=test_bevdepth_experiment.SIZE)
    config = replace(
        bevnext.DEFAULTS[TWO]["frame"], data_root=frame, scale="mini", backend="eager", steps=1, eval_first=False,
        run_dir=tmp_path / "run", from_scratch=True,
    )  # fmt: skip
    assert "recall" in run.main(bevnext.task, config)["scores"]
    frames = bevnext.task(config).data.eval_reading.cameras.frames
    assert read_metrics(config.run_dir)[0]["missing/frames"] == frames - 1


# ------------------------------------------------------------------------------------------------------------ bad input


def test_stage_two_without_stage_one_trains_on_request_only(first):
    with pytest.raises(
        ValueError, match=r"^stage 2 starts from stage 1: give --pretrained .*--from-scratch trains wit"
    ):
        start(small(TWO))
    bevnext.task(small(TWO)).predict  # noqa: B018  # it may be evaluated
    tasks.check(bevnext.task(small(TWO)), train=False)
    start(small(TWO, from_scratch=True))
    start(small(ONE))


def test_checkpoints_of_the_other_stage_are_one_sentence(first, second):
    config, _ = second
    with pytest.raises(
        ValueError, match=r"step_00000002 is a checkpoint of BEVNeXt's stage 2, and stage 1 comes before"
    ):
        start(small(ONE, pretrained=(last(config),)))
    with pytest.raises(
        ValueError, match=r"step_00000002 is a checkpoint of BEVNeXt's stage 2, which starts from one of"
    ):
        start(small(TWO, pretrained=(last(config),)))
    start(small(ONE, pretrained=(last(first),)))  # the same stage again
    again = start(small(TWO, pretrained=(last(config),), from_scratch=True))
    for ours, theirs in zip(again, pretrained.read_weights(last(config), ema=True)):
        theirs = tree.flatten(theirs)
        assert all(torch.equal(leaf, theirs[path]) for path, leaf in tree.flatten(ours).items())
    with pytest.raises(ValueError, match=r"step_00000002 is a checkpoint of BEVNeXt's stage 2, which starts"):
        start(small(TWO, pretrained=(last(config),), past_frames=5))  # of whatever number of frames
    with pytest.raises(ValueError, match=r"params.bev.backbone.fusion.* in .*step_00000002"):
        start(small(TWO, pretrained=(last(config),), past_frames=5, from_scratch=True))


def part(tmp_path: Path) -> Path:
    """A file with an image backbone alone, of the mini size."""
    with torch.random.fork_rng():
        params, state = bevnext.task(small(ONE)).init()
    path = tmp_path / "backbone.safetensors"
    only = [{"image": {"backbone": each["image"]["backbone"]}} for each in (params, state)]
    upstream.write_imported(path, *only, upstream.Account("resnet50", "", "", "mmdet", "spconv2"), source="test")
    return path


def test_an_image_backbone_starts_stage_one_and_stage_two_only_beside_stage_one_or_on_request(first, tmp_path, capsys):
    backbone = part(tmp_path)
    start(small(ONE, pretrained=(backbone,)))
    assert "tensors from" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"none of .*backbone.safetensors is a checkpoint of BEVNeXt's stage 1.*--from-s"
    ):
        start(small(TWO, pretrained=(backbone,)))
    start(small(TWO, pretrained=(backbone,), from_scratch=True))
    with pytest.raises(ValueError, match=r"both .* and .* hold params.image.backbone"):
        start(small(TWO, pretrained=(last(first), backbone)))


def test_a_checkpoint_of_another_model_or_size_is_one_sentence(first, tmp_path):
    params, state = bevdepth.task(test_bevdepth_experiment.small("bevdepth", depth_loss=0.0)).init()
    path = tmp_path / "bevdepth.safetensors"
    upstream.write_imported(
        path, params, state, upstream.Account("resnet50", "", "", "mmdet", "spconv2"), source="test"
    )
    for model in (ONE, TWO):
        with pytest.raises(ValueError, match=r"bevdepth.safetensors.*(which the model lacks|in the model)"):
            start(small(model, pretrained=(path,)))


def test_images_of_mixed_sizes_end_a_run_with_one_sentence(tmp_path):
    root = small_world.copy(tmp_path / "world")
    for path in (root / "samples" / "CAM_BACK").iterdir():
        Image.new("RGB", (80, 45)).save(path)
    config = small(TWO, steps=1, data_root=root, run_dir=tmp_path / "run", from_scratch=True)
    with pytest.raises(ValueError, match=r"CAM_BACK.*: the image is 80x45 but the calibration is for 160x90"):
        run.main(bevnext.task, config)


# ------------------------------------------------------------------------------------------------------ many processes


def test_detection_normalisers_are_of_all_devices_and_batch_norm_too_from_its_epoch_on(monkeypatch):
    bound = []
    monkeypatch.setattr(train, "make_accumulated", lambda loss, *_, **__: bound.append(loss) or (lambda *_: None))
    monkeypatch.setattr(assembly, "initial_state", lambda run, **_: None)
    both = Replicas(rank=0, count=2, group="")
    config = small(TWO, from_scratch=True)
    task = bevnext.task(config)
    made = tasks.Run(task, config, tasks.plan(config, task.data.items, both), both)
    for synchronised in (False, True):
        assembly.compiled_step(made, synchronised=synchronised)
        assert bound[-1].keywords["replicas"] is both
        assert bound[-1].keywords["train"] is (both if synchronised else True)


def test_a_stage_two_that_is_killed_before_its_batch_norms_are_of_all_goes_on_across_it_bit_for_bit(tmp_path):
    """The mini model itself, of three frames, with dropout and averages; its other process is made up, see test_run.py for two."""
    config = small(TWO, from_scratch=True, epochs=2, steps=3, lr=1e-3, sync_after=1, run_dir=tmp_path)
    other = test_bevnext.Twin(ratio=1.1)
    task = bevnext.task(config)
    made = tasks.Run(task, config, tasks.plan(config, task.data.items, other), other)
    assert (made.plan.steps_per_epoch, made.plan.total_steps) == (2, 3)

    def steps(after=None):
        """[(collectives of batch norms, metrics, train state)] of every step behind a checkpoint."""
        train_state, step = assembly.build(made, resumed=after is not None)
        if after is not None:
            train_state, _ = checkpoint.load_step(after, train_state)
        found = []
        for done, loaded in run.microbatches(made, int(train_state.step)):
            other.asked.clear()
            train_state, metrics = step(train_state, [item.batch for item in loaded])
            if after is None and done == 1:
                checkpoint.save_step(tmp_path / "step_00000001", train_state, {"step": done})
            kept = tree.map(torch.clone, tree.flatten({"metrics": metrics, "state": train_state}))
            found.append((len(other.asked), kept))
        return found

    whole, resumed = steps(), steps(tmp_path / "step_00000001")
    names = [name for name in whole[0][1] if name.startswith("state.state.") and name.endswith("mean")]
    shared = sum(name.startswith(("state.state.image.", "state.state.view.")) for name in names)
    assert [asked for asked, _ in whole] == [0, 0, len(names) + shared]  # the earlier frames in one call
    assert [asked for asked, _ in resumed] == [0, len(names) + shared]
    for (_, ours), (_, theirs) in zip(whole[1:], resumed, strict=True):
        assert ours.keys() == theirs.keys() and any(".ema." in name for name in ours)
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
