"""AWML's experiment: flags, whole runs on a T4 world, fusion from a LiDAR checkpoint, and what is refused in one sentence."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_t4_world
import small_world
import test_awml
import torch

from bevfn import cli, detector, synth, tree, upstream
from bevfn.commands import scoring as evaluate
from bevfn.data import scene, source
from bevfn.data.index import Frame
from bevfn.distributed import Replicas
from bevfn.evaluation import judge, results, t4_report
from bevfn.experiments import awml, bevfusion, bevfusion_lidar
from bevfn.metrics import read_metrics
from bevfn.models import awml as awml_models
from bevfn.models import bevfusion as family
from bevfn.training import assembly, checkpoint, command_line, pretrained, run, tasks

T4 = [model for model in awml.NETWORKS if model != awml.NUSCENES]
FAST = ("--backend", "eager", "--workers", "0")


def small(model: str, **changes) -> awml.Config:
    """The recipe of the synthetic world on a small one."""
    config = replace(
        awml.DEFAULTS[model]["synthetic"], data_root=small_t4_world.root(), backend="eager", eval_first=False, workers=0,
        batch_size=1, voxel_capacity=8_000, site_capacity=(8_000, 4_000, 3_000),
    )  # fmt: skip
    if changes.get("scale") == "published":
        changes = {"voxel_capacity": None, "site_capacity": None} | changes
    return replace(config, **changes)


# ---------------------------------------------------------------------------------------------------------------- flags


def parsed(root: Path | None, *words: str) -> awml.Config:
    return command_line.parse(awml.DEFAULTS, [*words, *(("--data-root", str(root)) if root else ())])


def test_what_lies_at_the_root_and_the_model_choose_the_recipe(tmp_path):
    t4, nuscenes = tmp_path, small_world.unmade()
    (t4 / "scene" / "annotation").mkdir(parents=True)
    assert parsed(small_t4_world.root()).scale == "mini"  # a world of `data synth`
    for model in T4:
        config = parsed(t4, "--model", model)
        assert config == replace(awml.VARIANTS[model], data_root=t4, run_dir=Path("runs") / model.replace("-", "_"))
        assert config.scale == "published" and config.world == "t4"
    assert parsed(t4) == parsed(t4, "--model", "awml-lidar")
    own = parsed(nuscenes, "--model", awml.NUSCENES, "--epochs", "3")
    assert (own.world, own.epochs, own.paste, own.sweeps) == ("nuscenes", 3, True, 9)
    made = parsed(None)
    assert (made.scale, made.world, made.published_resize, made.clip_norm) == ("mini", "t4", False, 35.0)


@pytest.mark.parametrize("model", T4)
@pytest.mark.parametrize("scale", ["published", "mini"])
def test_every_model_and_scale_reads_what_it_takes(model, scale):
    task = awml.task(small(model, scale=scale, augment=True))
    reading, network = task.data.reading(0), task.predict.keywords["config"]
    assert (reading.cameras is not None) == (network.camera is not None) == ("camera" in model)
    if reading.cameras is not None:
        assert reading.cameras.image_size == network.camera.view.grid.image_size
    assert reading.random and not task.data.eval_reading.random
    assert reading.capacities.points == 2 * awml.SCAN_POINTS
    tasks.check(task)


def test_more_sweeps_are_the_newest_with_room_for_their_points():
    data = awml.task(small("awml-lidar", augment=True, sweeps=3)).data
    for reading in (data.reading(0), data.eval_reading):
        assert (reading.points.sweeps, reading.points.sweep_choice) == (3, "newest")
        assert reading.capacities.points == 4 * awml.SCAN_POINTS


@pytest.mark.parametrize("model", T4)
def test_another_range_has_the_same_cells_and_weights_and_is_read(model):
    wide = awml.network(awml.VARIANTS[model])
    narrow = awml.ranged(wide, 61.2)
    for each in (awml.ranged(narrow, 122.4), wide):
        assert each.voxels.grid == narrow.voxels.grid and each.head.cells == narrow.head.cells
        np.testing.assert_allclose(each.voxels.size, [2 * x for x in narrow.voxels.size[:2]] + [0.2])
    with torch.device("meta"):
        shapes = [{k: v.shape for k, v in tree.flatten(family.init(each, 0)[0]).items()} for each in (wide, narrow)]
    assert shapes[0] == shapes[1]
    task = awml.task(small(model, range_m=61.2))
    half = task.predict.keywords["config"].head.cells[0] * task.predict.keywords["config"].head.stride / 2
    assert half * task.predict.keywords["config"].head.voxel[0] == pytest.approx(61.2)
    for reading in (task.data.reading(0), task.data.eval_reading):
        np.testing.assert_allclose(reading.range, (-61.2, -61.2, -3.0, 61.2, 61.2, 5.0))


def test_boxes_beyond_a_classs_reach_are_neither_learned_nor_scored(bare, monkeypatch, tmp_path):
    reach = (30.0, 120.0, 120.0, 120.0, 10.0)
    data = awml.task(small("awml-lidar", class_reach=reach)).data
    every = awml.task(small("awml-lidar")).data
    kept, whole = ([scene.load(d.training, k, d.reading(0)) for k in range(4)] for d in (data, every))
    for less, more in zip(kept, whole):
        far = np.hypot(more.boxes[:, 0], more.boxes[:, 1]) >= np.array(reach)[more.labels]
        np.testing.assert_array_equal(less.boxes, more.boxes[~far])
    assert sum(len(s.boxes) for s in kept) < sum(len(s.boxes) for s in whole)
    found = {frame.token: annotated(frame) for frame in every.evaluation}
    counts, extra = {}, t4_report.extra
    monkeypatch.setattr(
        t4_report, "extra", lambda evaluated: counts.setdefault(len(counts), evaluated) and extra(evaluated)
    )
    for d in (data, every):
        judgement = judge.judge(d.evaluation, found, d.eval_reading, tmp_path)
        assert judgement.numbers["T4 mAP"] == pytest.approx(1.0)
    less, more = ({label.name: label.num_gt for label in one.headline.labels} for one in counts.values())
    assert 0 < sum(less.values()) < sum(more.values()) and less["truck"] == more["truck"]


def annotated(frame: Frame) -> results.Detections:
    """What a perfect detector finds."""
    keep = [i for i, name in enumerate(frame.names) if name and frame.valid[i]]
    boxes = np.nan_to_num(frame.boxes[keep])
    boxes[:, 2] -= boxes[:, 5] / 2
    labels = np.array([awml.EVAL.class_names.index(frame.names[i]) for i in keep])
    return results.Detections(boxes, np.linspace(0.9, 0.5, len(keep)), labels)


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[awml.Config, dict]:
    """Two steps of the LiDAR model, and its summary."""
    config = small("awml-lidar", steps=2, checkpoint_every=1, run_dir=tmp_path_factory.mktemp("first") / "run")
    return config, run.main(awml.task, config)


def last(config: awml.Config) -> Path:
    return config.run_dir / "checkpoints" / "step_00000002"


def test_a_run_is_scored_by_the_t4_metric(first):
    config, summary = first
    steps = read_metrics(config.run_dir)
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step[name] == 0 for step in steps for name in step if name.startswith(("overflow", "bad")))
    assert {"T4 mAP", "mAP", "NDS"} <= summary["scores"].keys()
    out = config.run_dir / "evaluations" / "step_00000002"
    stored = json.loads((out / "metrics.json").read_text())
    assert set(stored["t4"]["bands"]) == {"0-50", "50-90", "90-121", "0-121"}
    assert set(stored["t4"]["bands"]["0-121"]["center_distance_bev"]["labels"]) == set(awml.EVAL.class_names)
    assert "T4 metric by class" in (out / "summary.md").read_text()
    assert len(json.loads((out / "results_t4.json").read_text())["results"]) == 4
    best = json.loads((config.run_dir / "checkpoints" / "best.json").read_text())
    assert best["value"] == summary["scores"]["T4 mAP"]  # what checkpoints are compared by


def test_a_resumed_run_is_the_run_that_was_never_stopped(first, bare, tmp_path):
    config, _ = first
    stopped = replace(config, run_dir=tmp_path / "run", resume=True)
    shutil.copytree(config.run_dir, stopped.run_dir)
    shutil.rmtree(last(stopped))
    shutil.rmtree(stopped.run_dir / "evaluations")
    run.main(awml.task, stopped)
    ours, theirs = (checkpoint.load_tensors(last(each) / checkpoint.TENSORS) for each in (stopped, config))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[leaf], theirs[leaf]) for leaf in ours)


def test_a_run_goes_on_with_other_evaluations_but_not_with_other_scenes(first, tmp_path):
    config, _ = first
    other = replace(config, run_dir=tmp_path / "run", resume=True, eval_last=3)
    shutil.copytree(config.run_dir, other.run_dir)
    assert run.main(awml.task, other)["steps"] == 2
    with pytest.raises(ValueError, match=r"was begun with another config \(.*data"):
        run.main(awml.task, replace(other, train_split="all", eval_split="all"))


def bevfn(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["bevfn", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_a_checkpoint_scores_as_its_run_did(first, bare, monkeypatch, tmp_path, capsys):
    config, _ = first
    assert bevfn(monkeypatch, "eval", "awml", "--checkpoint", last(config), "--out", tmp_path, *FAST) == 0
    said = capsys.readouterr().out
    assert "T4 mAP" in said and "T4 metric by range" in said
    theirs = config.run_dir / "evaluations" / "step_00000002" / "results_t4.json"
    assert json.loads((tmp_path / "results_t4.json").read_text()) == json.loads(theirs.read_text())


def test_scenes_that_were_trained_on_are_told(first, bare, monkeypatch, tmp_path, capsys):
    arguments = ("eval", "awml", "--checkpoint", last(first[0]), "--out", tmp_path, "--split", "train", *FAST)
    assert bevfn(monkeypatch, *arguments) == 0
    assert "1 of the 1 scenes of split 'train' were trained on" in capsys.readouterr().out


def test_a_split_without_annotations_gets_its_detections_alone(first, monkeypatch, tmp_path, capsys):
    root = Path(shutil.copytree(small_t4_world.root(), tmp_path / "world", ignore=shutil.ignore_patterns(".bevfn")))
    for path in root.glob("db_*/*/0/annotation/*.json"):
        if path.stem in ("sample_annotation", "instance"):
            path.write_text("[]")
    arguments = ("eval", "awml", "--checkpoint", last(first[0]), "--data-root", root, "--out", tmp_path / "out", *FAST)
    assert bevfn(monkeypatch, *arguments) == 0
    assert "has no annotations there, so they are not scored" in capsys.readouterr().out
    found = results.read(tmp_path / "out" / "results_t4.json")["results"]
    assert len(found) == 4 and max(map(len, found.values())) > 0
    assert not (tmp_path / "out" / "submission.zip").exists() and not (tmp_path / "out" / "metrics.json").exists()


def test_fusion_starts_from_the_lidar_detector_and_a_swin(first, tmp_path, capsys):
    config = small("awml-camera-lidar", seed=1)
    with torch.random.fork_rng():
        params, state = awml.task(replace(config, seed=2)).init()
    swin = tmp_path / "swin.safetensors"
    only = [{"camera": {"backbone": each["camera"]["backbone"]}} for each in (params, state)]
    upstream.write_imported(swin, *only, upstream.Account("swin-nuimages", "", "", "mmdet", "spconv2"), source="test")
    config = replace(config, pretrained=(last(first[0]), swin))
    task = awml.task(config)
    made, _ = assembly.initial(tasks.Run(task, config, tasks.plan(config, task.data.items)))
    ours, lidar = tree.flatten(made), tree.flatten(pretrained.read_weights(last(first[0]))[0])
    taken = {name for name, leaf in lidar.items() if torch.equal(leaf, ours[name])}
    # Fourier features of four numbers are 32 channels, where the fusion model reads five numbers as they are; at mini size the
    # BEV map of the LiDAR alone has another width too.
    other = {"lidar.conv_input.conv.weight", "bev.backbone.blocks.0.0.conv.weight"}
    assert set(lidar) - taken == other
    name = next(name for name in ours if name.startswith("camera.backbone."))
    assert torch.equal(ours[name], tree.flatten(params)[name])
    said = capsys.readouterr().out
    assert "2 another one" in said and "at init, params.fuser.conv.weight is in no file" in said


@pytest.mark.parametrize("intensity", [False, True])
def test_of_the_published_lidar_detector_fusion_takes_all_but_the_first_convolution(intensity):
    def built(config: awml.Config) -> tuple[dict, dict]:
        with torch.device("meta"):
            return family.init(awml.network(config), seed=0)

    *_, merged = awml.begin(*built(awml.FUSION), {"one": built(replace(awml.LIDAR, intensity=intensity))})
    assert set(merged.reshaped) == {"params.lidar.conv_input.conv.weight"} and not merged.unused
    assert {name.split(".")[1] for name in merged.absent} == {"camera", "fuser"}
    offline = built(awml.VARIANTS["awml-lidar-offline"])
    *_, merged = awml.begin(*built(awml.FUSION), {"one": offline})  # without Fourier features it fits whole
    assert not merged.reshaped


def test_a_fusion_step_trains_and_is_scored(first, bare, tmp_path):
    config = small("awml-camera-lidar", steps=1, pretrained=(last(first[0]),), run_dir=tmp_path / "run", augment=True)
    summary = run.main(awml.task, config)
    assert summary["steps"] == 1 and "T4 mAP" in summary["scores"]


@pytest.mark.parametrize("kernel", [3, 5])
def test_an_imported_release_is_evaluated_with_the_fuser_that_its_shapes_say(kernel, monkeypatch, tmp_path):
    tiny = test_awml.tiny(awml.NETWORKS["awml-camera-lidar"]())
    monkeypatch.setitem(awml.NETWORKS, "awml-camera-lidar", lambda: tiny)
    params, state = family.init(replace(tiny, fuser_kernel=kernel), 0)
    account = upstream.Account("awml-camera-lidar", "", "", "net", "spconv2")
    upstream.write_imported(tmp_path / "a.safetensors", params, state, account, source="test")
    flags = {"model": "awml-camera-lidar", "data_root": small_t4_world.root()}
    config = evaluate._config("awml", tmp_path / "a.safetensors", "cpu", flags)
    assert config.fuser_kernel == kernel and config.model == "awml-camera-lidar"
    detector.check_fits(awml.task(config), params, state, tmp_path)
    given = evaluate._config("awml", tmp_path / "a.safetensors", "cpu", flags | {"fuser_kernel": 8 - kernel})
    with pytest.raises(ValueError, match=r"does not fit awml-camera-lidar.*fuser.conv.weight"):
        detector.check_fits(awml.task(given), params, state, tmp_path)


def test_what_a_release_reads_is_told_by_its_first_convolution():
    for intensity in (False, True):
        assert awml.released(awml_models.lidar(intensity=intensity), "awml-lidar") == {"intensity": intensity}
    assert awml.released(awml_models.camera(), "awml-camera") == {}


def test_a_checkpoint_of_another_model_starts_nothing(tmp_path):
    path = tmp_path / "other.safetensors"
    account = upstream.Account("resnet50", "", "", "mmdet", "spconv2")
    upstream.write_imported(path, {"neck": {"weight": torch.ones(3)}}, {}, account, source="test")
    config = small("awml-camera-lidar", pretrained=(path,))
    task = awml.task(config)
    with pytest.raises(ValueError, match=r"other.safetensors has no tensor that fits this model; give a checkpoint of"):
        assembly.initial(tasks.Run(task, config, tasks.plan(config, task.data.items)))


def test_batch_norm_is_of_all_devices_and_the_loss_of_each(monkeypatch):
    """As published: sync_bn, and a head that looks at its own positives."""
    seen = {}
    monkeypatch.setattr(
        family, "apply", lambda *_, train, **__: (seen.update(norm=train) or {"head": {}, "overflow": {}}, {})
    )

    def loss(*_, train, **__):
        seen["loss"] = train
        return torch.ones(()), {name: torch.zeros(()) for name in ("matched_iou", "num_pos", "bad_boxes")}

    monkeypatch.setattr(family.transfusion_loss, "loss", loss)
    both = Replicas(rank=0, count=2, group="")
    batch = assembly.example(tasks.Run(awml.task(small("awml-lidar")), small("awml-lidar"), tasks.Plan(1, 1, 1)))
    for model, normalised in (("awml-lidar", True), (None, both)):
        task_loss = (
            awml.task(small(model)).loss if model else lambda *a, **k: family.loss(*a, config=family.lidar_only(), **k)
        )
        task_loss({}, {}, batch, train=both)
        assert seen == {"norm": both, "loss": normalised}


def test_without_a_root_a_t4_world_is_made_on_the_spot(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(source, "WORLDS", {kind: tmp_path / kind for kind in source.WORLDS})
    monkeypatch.setattr(
        synth, "write", lambda out, **how: made.append((out, how)) or shutil.copytree(small_t4_world.root(), out)
    )
    config = awml.DEFAULTS["awml-lidar"]["synthetic"]
    for _ in range(2):
        source.prepare(config.data_root, config.world)
    ((out, how),) = made
    scenes, frames = source.SIZES["t4"]
    assert out == tmp_path / "t4" and how == {
        "scenes": scenes, "seed": 0, "frames_per_scene": frames, "image_size": source.WORLD_IMAGE, "format": "t4",
    }  # fmt: skip
    data = awml.task(config).data
    assert (data.training.judge, data.training.split, data.evaluation.split) == ("t4", "train", "val")
    assert awml.DEFAULTS[awml.NUSCENES]["synthetic"].world == bevfusion.Config().world == "nuscenes"
    assert "1 of the 1 scenes" in source.trained_on(None, "v1.0-trainval", None, "train", "t4")


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("recipe", [bevfusion, bevfusion_lidar])
def test_a_nuscenes_recipe_refuses_t4_data(recipe):
    with pytest.raises(
        ValueError, match=r"is a T4 data set, but bevfusion-\S+ is trained on nuScenes roots.*models of bevfn.exper"
    ):
        command_line.parse(recipe.DEFAULTS, ["--data-root", str(small_t4_world.root())])


@pytest.mark.parametrize("model", awml.NETWORKS)
def test_a_root_of_the_other_kind_is_refused_by_flags_and_in_python(model):
    roots = {"nuscenes": small_world.index().root, "t4": small_t4_world.root()}
    other = "t4" if model == awml.NUSCENES else "nuscenes"
    what = "is a T4 data set, but" if other == "t4" else "is no T4 data set: neither it nor a folder"
    for call in (
        lambda: parsed(roots[other], "--model", model),
        lambda: awml.task(replace(awml.VARIANTS[model], data_root=roots[other])),
    ):
        with pytest.raises(ValueError, match=f"{what}.*{model} is trained on .*and single key frames"):
            call()


def test_evaluation_takes_the_runs_own_model_and_refuses_the_other_data(first, monkeypatch, capsys, tmp_path):
    root = small_world.index().root
    arguments = ("eval", "awml", "--checkpoint", last(first[0]), "--data-root", root, "--out", tmp_path, *FAST)
    assert bevfn(monkeypatch, *arguments) == 2
    assert "is no T4 data set: neither it nor" in " ".join(capsys.readouterr().err.split())
    stored = tmp_path / "run" / "config.json"
    (tmp_path / "run" / "checkpoints" / "step_1").mkdir(parents=True)
    stored.write_text(json.dumps(command_line.flags(awml.VARIANTS[awml.NUSCENES])))
    config = detector.run_config("awml", tmp_path / "run" / "checkpoints" / "step_1", root, None)
    assert config.model == awml.NUSCENES and config.sweeps == 9


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"paste": True}, "--paste is of awml-nuscenes-lidar: AWML pastes nothing on T4"),
        (
            {"model": "awml-camera-lidar", "intensity": True},
            "--intensity is of awml-lidar, and what awml-camera-lidar reads",
        ),
        ({"fuser_kernel": 3}, "--fuser-kernel is of awml-camera-lidar, and awml-lidar has no fuser"),
        ({"class_reach": (50.0,)}, r"--class-reach is of the models of T4 data sets, 5 numbers \(car, truck, bus, bic"),
        ({"model": awml.NUSCENES, "range_m": 60.0}, "--range-m is of the models of T4 data sets"),
        ({"eval_last": -1}, "--eval-last -1 must be at least 0"),
    ],
)
def test_flags_that_contradict_the_model_are_one_sentence(changes, what):
    with pytest.raises(ValueError, match=what):
        replace(awml.LIDAR, **changes)


def test_images_that_awmls_factor_makes_too_small_are_refused_with_the_flag_that_helps(tmp_path):
    config = small("awml-camera-lidar", scale="published", published_resize=True, run_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"CAM_FRONT.*resize 0.32 turns 160x90 into 51x28 .*--no-published-resize"):
        run.main(awml.task, config)
    tasks.check(awml.task(replace(config, published_resize=False)))


def test_a_camera_that_some_key_frames_lack_is_refused_or_left_out(tmp_path):
    root = Path(shutil.copytree(small_t4_world.root(), tmp_path / "world", ignore=shutil.ignore_patterns(".bevfn")))
    for path in root.glob("db_*/*/0/annotation/sample_data.json"):
        rows = json.loads(path.read_text())
        for row in rows:
            if row["filename"] in ("data/CAM_BACK_LEFT/00001.jpg", "data/CAM_BACK/00002.jpg"):
                row["is_valid"] = False
        path.write_text(json.dumps(rows))
    config = small("awml-camera-lidar", data_root=root)
    with pytest.raises(
        ValueError, match=r"has no image of CAM_BACK_LEFT at 1 of its 4 key frames; .*--on-damaged skip"
    ):
        tasks.check(awml.task(config))
    said = []
    task = tasks.on_what_is_there(awml.task(config), said.append)
    assert len(task.data.items) == 3 and len(task.data.evaluation) == 3  # CAM_BACK is none of its cameras
    tasks.check(awml.task(replace(config, model="awml-lidar")))


def test_one_scan_of_a_key_frame_has_a_frames_room_and_the_recipe_its_own(tmp_path):
    """`bevfn graph` looks at the recipe on a generated key frame, and must see the published capacities."""
    synth.key_frame.write_frame(tmp_path / "frame", image_size=(45, 80))
    model, flags = awml_models.lidar(), awml.DEFAULTS["awml-lidar"]
    for kind, voxels in (("frame", awml.FRAME_VOXELS), ("t4", model.voxels.max_voxels)):
        config = replace(flags[kind], data_root=tmp_path / "frame")
        assert awml.sized(config, model).voxels.max_voxels == voxels
