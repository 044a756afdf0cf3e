"""The recipes of BEVDepth and MatrixVT: published numbers, what they read, whole runs, scores, checkpoints that do not fit."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import small_world
import torch
from PIL import Image

from bevfn import cli, detector, recipes, upstream
from bevfn.data import annotations, sampling
from bevfn.data.batch import Base
from bevfn.data.reading import CLASS_NAMES
from bevfn.distributed import Replicas
from bevfn.evaluation import results, score
from bevfn.evaluation.judge import submission
from bevfn.evaluation.results import Detections
from bevfn.experiments import bevdepth, bevfusion_lidar, matrixvt
from bevfn.metrics import read_metrics
from bevfn.models import bevdepth as network
from bevfn.synth import key_frame
from bevfn.training import assembly, checkpoint, command_line, pretrained, run, tasks, train

EXPERIMENTS = {"bevdepth": bevdepth, "matrixvt": matrixvt}
SIZE = (90, 160)  # of the small world's images


def small(name: str, **changes):
    """The published recipe at mini size on the small world."""
    config = replace(
        recipes.defaults(name)["nuscenes"], data_root=small_world.index().root, scale="mini",
        backend="eager", eval_backend="eager", workers=0, batch_size=1, class_balanced=False, norm_momentum=0.1,
    )  # fmt: skip
    return replace(config, **changes)


# ------------------------------------------------------------------------------------------------ the published numbers


def test_the_recipes_are_the_published_ones():
    """Golden README bevdepth_r50_2key, "Training recipe"; matrixvt_r50, "Recipe"."""
    recipes = {**bevdepth.VARIANTS, "matrixvt": matrixvt.DEFAULTS["matrixvt"]["nuscenes"]}
    assert all(c.model == name and c.scale == "published" for name, c in recipes.items())
    assert all((c.batch_size, c.recipe_batch, c.recipe_lr) == (8, 64, 2e-4) for c in recipes.values())
    assert all((c.weight_decay, c.clip_norm, c.depth_loss) == (1e-7, 5.0, 3.0) for c in recipes.values())
    assert all(c.augment and not c.sync_statistics and c.norm_momentum is None for c in recipes.values())
    different = {name: (c.epochs, c.milestones, c.ema, c.class_balanced) for name, c in recipes.items()}
    assert different == {
        "bevdepth-2key": (24, (19, 23), None, False), "bevdepth-2key-ema": (24, (19, 23), 0.999, False),
        "bevdepth-2key-da": (20, (16, 19), None, True), "bevdepth-2key-da-ema": (20, (16, 19), 0.999, True),
        "bevdepth-1key-ema": (24, (), 0.999, False), "bevdepth-4key": (24, (19, 23), None, False),
        "matrixvt": (24, (), 0.999, True),
    }  # fmt: skip
    frames = {name: make().frames for name, make in bevdepth.NETWORKS.items()}
    assert frames == {name: int(name[len("bevdepth-")]) for name in bevdepth.VARIANTS}
    assert {name for name, make in bevdepth.NETWORKS.items() if make().aggregation} == {
        "bevdepth-2key-da", "bevdepth-2key-da-ema",
    }  # fmt: skip


def test_the_optimizer_is_multi_step_adamw_that_leaves_the_stem():
    config = bevdepth.VARIANTS["bevdepth-2key"]
    plan = tasks.Plan(steps_per_epoch=10, total_steps=240, batch=64)
    made = bevdepth.optimizer(config, network.two_key(), plan)
    at = [float(made.lr.at(torch.tensor(s))) for s in (0, 189, 190, 229, 230, 239)]
    assert at == pytest.approx([2e-4, 2e-4, 2e-5, 2e-5, 2e-6, 2e-6])
    assert (made.beta1.start, made.beta1.phases, made.beta2, made.eps) == (0.9, (), 0.999, 1e-8)
    assert [(g.pattern, g.frozen) for g in made.groups] == [("image.backbone.stem.*", True)]
    one = bevdepth.optimizer(bevdepth.VARIANTS["bevdepth-1key-ema"], network.key_frames(1), replace(plan, batch=8))
    assert float(one.lr.at(torch.tensor(239))) == pytest.approx(2e-4 / 8)  # never falls; linear in the batch


def test_the_average_starts_at_its_published_decay():
    """Upstream counts updates from len(dataset) * epochs on; on nuScenes the ramp is over before it starts."""
    ema = bevdepth.task(small("bevdepth", model="bevdepth-2key-ema", ema=0.999, epochs=24)).ema
    assert ema is not None and ema.first_update == 24 * 3
    assert float(replace(ema, first_update=28130 * 24).keep(torch.tensor(0))) == pytest.approx(0.999)


@pytest.mark.parametrize("model", [*bevdepth.VARIANTS, "matrixvt"])
def test_every_model_and_scale_reads_what_it_takes(model):
    experiment = "matrixvt" if model == "matrixvt" else "bevdepth"
    for scale in ("published", "mini"):
        recipe = matrixvt.DEFAULTS["matrixvt"]["nuscenes"] if model == "matrixvt" else bevdepth.VARIANTS[model]
        config = replace(recipe, data_root=small_world.index().root, scale=scale)
        task = EXPERIMENTS[experiment].task(config)
        reading, at_test = task.data.reading(0), task.data.eval_reading
        grid = task.predict.keywords["config"].grid
        assert reading.cameras.image_size == at_test.cameras.image_size == grid.image_size
        assert reading.cameras.frames == at_test.cameras.frames == task.predict.keywords["config"].frames
        assert reading.random and reading.depth and not at_test.random and not at_test.depth
        assert reading.cameras.augmentation.resize == (0.386, 0.55) and at_test.cameras.resize is None
        tasks.check(task)
        assert (len(task.data.items) > len(task.data.training)) == config.class_balanced


def test_the_flags_follow_the_model():
    root = ["--data-root", str(small_world.unmade())]
    one = command_line.parse(bevdepth.DEFAULTS, ["--model", "bevdepth-1key-ema", *root])
    aggregated = command_line.parse(bevdepth.DEFAULTS, ["--model=bevdepth-2key-da", "--epochs", "3", *root])
    assert (one.model, one.milestones, one.ema, one.epochs) == ("bevdepth-1key-ema", (), 0.999, 24)
    assert (aggregated.model, aggregated.class_balanced, aggregated.epochs) == ("bevdepth-2key-da", True, 3)
    with pytest.raises(SystemExit):
        command_line.parse(bevdepth.DEFAULTS, ["--model", "three-key"])


@pytest.mark.parametrize("model", ["bevdepth-2key-da", "matrixvt"])
def test_class_balance_counts_categories_as_published_or_boxes(model, monkeypatch):
    asked = []
    monkeypatch.setattr(
        sampling, "cbgs", lambda index, names, seed, classes_of: asked.append(classes_of) or np.arange(2)
    )
    name = "matrixvt" if model == "matrixvt" else "bevdepth"
    for published in (True, False):
        EXPERIMENTS[name].task(small(name, model=model, class_balanced=True, published_cbgs=published))
    assert asked == [sampling.categorised, sampling.boxed]
    assert all(c.published_cbgs for c in (*bevdepth.VARIANTS.values(), matrixvt.DEFAULTS["matrixvt"]["nuscenes"]))


def test_an_epoch_leaves_out_its_incomplete_batch_as_published():
    for drop_last, expected in ((True, [2, 2]), (False, [2, 2, 2, 2])):
        config = small("bevdepth", model="bevdepth-1key-ema", batch_size=2, epochs=2, drop_last=drop_last)
        task = bevdepth.task(config)
        stream = run.microbatches(tasks.Run(task, config, tasks.plan(config, task.data.items)), 0)
        assert [len(loaded[0].tokens) for _, loaded in stream] == expected  # of three key frames


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module", params=EXPERIMENTS)
def trained(request, tmp_path_factory):
    """(experiment's name, config, summary) of two steps."""
    config = small(request.param, steps=2, checkpoint_every=1, run_dir=tmp_path_factory.mktemp("run") / request.param)
    return request.param, config, run.main(EXPERIMENTS[request.param].task, config)


def test_a_run_leaves_checkpoints_metrics_and_scores(trained):
    name, config, summary = trained
    steps = read_metrics(config.run_dir)
    assert [step["step"] for step in steps] == [1, 2]
    assert {"loss/heatmap", "loss/bbox", "loss/depth", "num_pos", "missing/frames", "empty/depth"} <= steps[0].keys()
    assert (sum(step["missing/frames"] for step in steps) > 0) == (name == "bevdepth")  # two of three frames, two steps
    assert [folder.name for folder in checkpoint.steps(config.run_dir / "checkpoints")] == [
        "step_00000001", "step_00000002",
    ]  # fmt: skip
    assert {"NDS", "mAP", "mAVE"} <= summary["scores"].keys()
    document = results.read(config.run_dir / "evaluations" / "step_00000002" / "results_nusc.json")
    assert document["meta"]["use_camera"] and not document["meta"]["use_lidar"]
    assert (config.run_dir / "evaluations" / "step_00000002" / "report.html").is_file()


@pytest.mark.parametrize("trained", ["matrixvt"], indirect=True)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_resumed_run_is_the_run_that_was_never_stopped(trained, recompute, bare, tmp_path):
    name, config, _ = trained
    stopped = replace(config, run_dir=tmp_path / name, resume=True, checkpoint_activations=recompute)
    shutil.copytree(config.run_dir, stopped.run_dir)
    shutil.rmtree(stopped.run_dir / "checkpoints" / "step_00000002")
    shutil.rmtree(stopped.run_dir / "evaluations")
    run.main(EXPERIMENTS[name].task, stopped)
    ours, theirs = (
        checkpoint.load_tensors(folder / "checkpoints" / "step_00000002" / checkpoint.TENSORS)
        for folder in (stopped.run_dir, config.run_dir)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[leaf], theirs[leaf]) for leaf in ours)


@pytest.mark.parametrize("trained", ["matrixvt"], indirect=True)
def test_a_run_whose_compiler_rounds_anew_does_not_begin_to_recompute(trained, tmp_path):
    name, config, _ = trained
    folder = tmp_path / name
    shutil.copytree(config.run_dir, folder)

    def write(**changes):
        (folder / "config.json").write_text(json.dumps(command_line.flags(replace(config, **changes))))

    write(backend="inductor", run_dir=folder)
    changed = replace(config, backend="inductor", run_dir=folder, resume=True, checkpoint_activations=True)
    task = EXPERIMENTS[name].task(changed)
    made = tasks.Run(task, changed, tasks.plan(changed, task.data.items))
    with (
        pytest.raises(ValueError, match="checkpoint_activations"),
        run.open_folder(replace(made, facts=run.facts(made))),
    ):
        pass


FAST = ("--backend", "eager", "--workers", "0")


def bevfn(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["bevfn", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.mark.parametrize("trained", ["bevdepth"], indirect=True)
def test_a_checkpoint_scores_as_its_run_did(trained, bare, monkeypatch, tmp_path):
    name, config, _ = trained
    folder = config.run_dir / "checkpoints" / "step_00000002"
    assert bevfn(monkeypatch, "eval", name, "--checkpoint", folder, "--out", tmp_path, *FAST) == 0
    ours, theirs = (
        json.loads((where / "results_nusc.json").read_text())
        for where in (tmp_path, config.run_dir / "evaluations" / folder.name)
    )
    assert ours == theirs


def test_a_single_frame_gets_recall_and_a_picture(tmp_path):
    """Its previous key frame is missing: the current one stands in its place."""
    frame = key_frame.write_frame(tmp_path / "frame", image_size=SIZE)
    config = replace(
        bevdepth.DEFAULTS["bevdepth-2key"]["frame"], data_root=frame, scale="mini", backend="eager", steps=1,
        eval_first=False, run_dir=tmp_path / "run",
    )  # fmt: skip
    summary = run.main(bevdepth.task, config)
    assert summary["scores"].keys() >= {"recall"}
    assert read_metrics(config.run_dir)[0]["missing/frames"] == 1
    out = config.run_dir / "evaluations" / "step_00000001"
    assert list(out.glob("*.png"))
    assert json.loads((out / "metrics.json").read_text())["counts"]["missing/frames"] == 1


# ------------------------------------------------------------------------------------- where boxes and detections lie


def annotated() -> dict[str, Detections]:
    """What a perfect BEVDepth finds in the small world: the boxes that it is trained on."""
    index, found = small_world.index(), {}
    for frame in index:
        boxes, labels = annotations.ego_boxes(frame, bevdepth.CHANNELS, CLASS_NAMES)
        found[frame.token] = Detections(boxes.astype(np.float64), np.linspace(0.9, 0.5, len(boxes)), labels)
    return found


def test_boxes_that_it_learns_from_score_as_perfect():
    index = small_world.index()
    reading = bevdepth.EVAL
    perfect = score.score(index, submission(index, annotated(), reading), tables=small_world.tables())
    present = [c for c in perfect.classes if c.annotated]
    assert present and all(c.ap == pytest.approx(1.0) for c in present)
    for c in present:  # the frame's tilt, and velocities unknown at a scene's ends
        assert c.errors["ATE"] < 0.01 and c.errors["ASE"] < 0.01 and not c.errors["AOE"] > 0.01
        assert not c.errors["AVE"] > 0.05
    # taken for boxes in the lidar frame, they are elsewhere
    elsewhere = replace(reading, base=Base.LIDAR)
    wrong = score.score(index, submission(index, annotated(), elsewhere), tables=small_world.tables())
    assert wrong.mean_ap < 0.5 * perfect.mean_ap


def test_pictures_show_boxes_where_the_lidar_frame_has_them():
    frame = small_world.index()[1]
    ours = annotated()[frame.token]
    moved = results.moved(ours, annotations.lidar_from_base(frame, Base.EGO_AT_CAMERAS, bevdepth.CHANNELS))
    theirs = small_world.annotations(frame)
    np.testing.assert_allclose(moved.boxes[:, :6], theirs.boxes[:, :6], atol=1e-4)
    np.testing.assert_allclose(np.sin(moved.boxes[:, 6] - theirs.boxes[:, 6]), 0.0, atol=1e-3)
    np.testing.assert_allclose(moved.boxes[:, 7:], theirs.boxes[:, 7:], atol=1e-2)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_checkpoint_of_the_other_model_is_refused(trained, monkeypatch, capsys):
    name, config, _ = trained
    folder = config.run_dir / "checkpoints" / "step_00000002"
    other = "matrixvt" if name == "bevdepth" else "bevdepth"
    assert bevfn(monkeypatch, "eval", other, "--checkpoint", folder, *FAST) == 2
    assert f"not of {other}: `bevfn eval {name} --checkpoint {config.run_dir}`" in capsys.readouterr().err
    assert bevfn(monkeypatch, "eval", "bevfusion", "--checkpoint", folder, *FAST) == 2
    assert f"not of bevfusion: `bevfn eval {name} --checkpoint {config.run_dir}`" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"step_00000002(,| ).*(which the model lacks|in the model)"):
        start(small(other, pretrained=(folder,)), other)


def start(config, name: str) -> None:
    task = EXPERIMENTS[name].task(config)
    assembly.initial(tasks.Run(task, config, tasks.plan(config, task.data.items)))


def test_a_bevfusion_checkpoint_is_refused(monkeypatch, capsys, tmp_path):
    root = small_world.index().root
    made = bevfusion_lidar.task(
        replace(bevfusion_lidar.DEFAULTS["bevfusion-lidar"]["nuscenes"], data_root=root, paste=False)
    ).init()
    file = tmp_path / "lidar.safetensors"
    exported = upstream.export_state(*made, "bevfusion-lidar", {})
    upstream.write_imported(file, *upstream.import_state(exported, "bevfusion-lidar"), source="test")
    with pytest.raises(ValueError, match=r"which the model lacks: it is a checkpoint of another model"):
        start(small("bevdepth", pretrained=(file,)), "bevdepth")
    assert bevfn(monkeypatch, "eval", "bevdepth", "--checkpoint", file, "--data-root", root, *FAST) == 2
    assert "does not fit bevdepth-2key" in capsys.readouterr().err


def test_a_published_checkpoint_is_evaluated_as_the_model_it_is_of(monkeypatch, capsys, tmp_path):
    """`bevfn eval --model`: an imported file has no config."""
    file = tmp_path / "one.safetensors"
    params, state = network.init(network.key_frames(1), seed=0)
    exported = upstream.export_state(params, state, "bevdepth-1key", {})
    upstream.write_imported(file, *upstream.import_state(exported, "bevdepth-1key"), source="test")
    loaded = pretrained.read_weights(file)
    config = replace(bevdepth.VARIANTS["bevdepth-1key-ema"], data_root=small_world.index().root)
    detector.check_fits(bevdepth.task(config), *loaded, file)
    with pytest.raises(ValueError, match="does not fit bevdepth-2key"):
        detector.check_fits(bevdepth.task(replace(config, model="bevdepth-2key")), *loaded, file)
    assert bevfn(monkeypatch, "eval", "bevfusion", "--checkpoint", file, "--model", "bevdepth-1key-ema", *FAST) == 2
    assert (
        "model bevdepth-1key-ema is none of bevfusion's (bevfusion-lidar-camera, bevfusion-camera); name the experiment bevdepth"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("trained", ["bevdepth"], indirect=True)
def test_damaged_images_end_a_run_with_one_sentence(trained, tmp_path):
    """Images of mixed sizes; `on_damaged` "skip" takes the next sample, as for every reader."""
    name, config, _ = trained
    root = small_world.copy(tmp_path / "world")
    for path in (root / "samples" / "CAM_BACK").iterdir():
        Image.new("RGB", (80, 45)).save(path)
    broken = replace(config, data_root=root, run_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"CAM_BACK.*: the image is 80x45 but the calibration is for 160x90"):
        run.main(EXPERIMENTS[name].task, broken)


def test_the_detection_losses_normalisers_are_those_of_all_devices(monkeypatch):
    """As published, while batch norm and the depth loss stay each device's own."""
    bound = []
    monkeypatch.setattr(train, "make_accumulated", lambda loss, *_, **__: bound.append(loss))
    monkeypatch.setattr(assembly, "initial_state", lambda run, **_: None)
    two = Replicas(rank=0, count=2, group="")
    lidar = replace(
        bevfusion_lidar.DEFAULTS["bevfusion-lidar"]["nuscenes"], data_root=small_world.index().root, paste=False
    )
    for task, config in ((bevdepth.task, small("bevdepth")), (bevfusion_lidar.task, lidar)):
        made = task(config)
        assembly.build(tasks.Run(made, config, tasks.plan(config, made.data.items, two), two))
    ours, theirs = (loss.keywords for loss in bound)
    assert ours["replicas"] is two and ours["train"] is True
    assert "replicas" not in theirs and theirs["train"] is True
