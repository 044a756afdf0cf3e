"""AWML's recipes against what upstream computes and configures for them (shared/goldens), item by item.

The golden's tolerance, 1e-9 relative, is of formulas in float64, in which ours are evaluated here too; the step's graph has them
in float32, whose rounding (1.2e-7 a number) is allowed. Categories, attributes and merges: test_t4_classes.py.
"""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pytest
import small_t4_world
import torch
from PIL import Image
from safetensors.numpy import load_file
from test_recipes import Draws

from bevfn import catalogue, precision
from bevfn.data import annotations, augment, cameras, image, infos, points, scene, sweeps, t4_classes
from bevfn.data.reading import Cameras, Reading
from bevfn.evaluation import t4_config, t4_report
from bevfn.experiments import awml, bevfusion, bevfusion_lidar
from bevfn.training import evaluations, optim, tasks

SHARED = Path(__file__).parents[1].parent / "shared"
GOLDENS = SHARED / "goldens/recipe_bevnext_awml"
FLOAT32 = 1.2e-7
J6GEN2 = replace(awml.LIDAR, intensity=True, epochs=30, lr_turn=8 / 30, beta1_turn=8 / 30)
SCHEDULES = {  # the golden's names
    "nuscenes_20e_cosine": awml.VARIANTS[awml.NUSCENES],
    "20e_linear_cosine": awml.FUSION,
    "30e_cosine": J6GEN2,
    "50e_cosine": awml.LIDAR,
}
CONFIGS = {  # in the names of AWML's files: our config
    "BEVFusion-CL/": awml.FUSION,
    "BEVFusion-C/": awml.VARIANTS["awml-camera"],
    "BEVFusion-L-offline/": awml.VARIANTS["awml-lidar-offline"],
    "30e_8xb8": J6GEN2,
    "50e_8xb8_base": awml.LIDAR,
    "nuscenes/": awml.VARIANTS[awml.NUSCENES],
}

if not GOLDENS.is_dir():
    pytest.skip(f"{GOLDENS} is not here", allow_module_level=True)


def told(name: str) -> dict:
    return json.loads((GOLDENS / f"{name}.json").read_text())


# ------------------------------------------------------------------------------------------- schedules and optimizers


def optimizer(config: awml.Config, steps_per_epoch: int) -> optim.Config:
    plan = tasks.Plan(steps_per_epoch, config.epochs * steps_per_epoch, config.recipe_batch)
    return bevfusion.optimizer(config, plan)


LENGTHS = [
    (name, int(key.rpartition("_")[2]))
    for name in SCHEDULES
    for key in told("awml_schedule")[name]
    if "per_epoch" in key
]


@pytest.mark.parametrize("name, steps_per_epoch", LENGTHS)
def test_rates_and_beta1_are_upstreams_at_every_step_of_the_golden(name, steps_per_epoch):
    case = told("awml_schedule")[name][f"iterations_per_epoch_{steps_per_epoch}"]
    made = optimizer(SCHEDULES[name], steps_per_epoch)
    assert case["total"] == SCHEDULES[name].epochs * steps_per_epoch
    at = torch.arange(case["total"]) if isinstance(case["iteration"], str) else torch.tensor(case["iteration"])
    for schedule, values in ((made.lr, case["lr"]), (made.beta1, case["beta1"])):
        np.testing.assert_allclose(schedule.at(at, torch.float64), values, rtol=1e-9)
        np.testing.assert_allclose(schedule.at(at).double(), values, rtol=4 * FLOAT32)
    # the golden has its beta1 as doubles, of which 1 - beta1 has few digits at the end
    fresh = 1 - np.array(case["beta1"])
    np.testing.assert_allclose(made.beta1.complement().at(at).double(), fresh, rtol=4 * FLOAT32, atol=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_clipping_groups_and_evaluations_are_upstreams(name):
    case, config = told("awml_schedule")[name], SCHEDULES[name]
    made = optimizer(config, 10)
    assert (config.epochs, config.accumulate, len(made.groups) + 1) == (
        case["epochs"],
        case["accumulate"],
        case["param_groups"],
    )
    assert (made.clip_norm, made.weight_decay, made.beta2, made.eps) == (
        case["clip"]["max_norm"], case["weight_decay"], case["beta2"], case["eps"],
    )  # fmt: skip
    plan = tasks.Plan(10, 10 * config.epochs, 64)
    due = [done for done in range(1, plan.total_steps + 1) if evaluations.due(tasks.Run(None, config, plan), done)]
    assert due == [10 * epoch for epoch in case["validation_after_epochs"]]


def test_a_run_of_few_steps_climbs_by_steps_and_a_longer_one_by_epochs():
    """The last stair is the peak, an epoch before the fall, as upstream's."""
    short, long = (
        bevfusion.optimizer(awml.FUSION, tasks.Plan(per, total, 64)).lr for per, total in ((100, 40), (20, 400))
    )
    at = short.at(torch.arange(13))
    assert (at[1:12] > at[:11]).all() and at[0] == pytest.approx(1e-4 / 3) and at[11] == pytest.approx(1e-4)
    rates = long.at(torch.arange(400), torch.float64).numpy().round(15)
    assert [len(set(rates[20 * k : 20 * k + 20])) for k in range(7)] == [1, 1, 1, 1, 1, 1, 20]
    assert rates[99] < rates[100] == rates[120] == pytest.approx(1e-4)


def test_the_last_steps_are_finite_and_adamws_though_beta1_is_one_in_float32():
    """beta1 is a Python double upstream; in float32 1 - beta1 and 1 - beta1^t are 0 here, and their quotient no number."""
    case = told("awml_schedule")["50e_cosine"]["iterations_per_epoch_2222"]
    made = replace(optimizer(awml.LIDAR, 2222), clip_norm=None)
    assert np.float32(case["beta1"][-1]) == 1.0 and 1 - case["beta1"][-1] > 4e-11
    rng = np.random.default_rng(0)
    param, m, v = rng.normal(size=(3, 50)) * [[1.0], [1e-2], [1e-3]]
    v = v**2
    begin = case["total"] - 4
    state = optim.State(*(torch.tensor(x, dtype=torch.float32) for x in (m, v)), torch.tensor(begin))
    layout = optim.Layout(("x",), (optim.Segment(0, 50, 1.0, 1.0),))
    ours = torch.tensor(param, dtype=torch.float32)
    for k in range(4):
        place = case["iteration"].index(begin + k)
        lr, beta1 = case["lr"][place], case["beta1"][place]
        grad = 1e-2 * rng.normal(size=50)
        given = torch.tensor(grad, dtype=torch.float32)
        ours, state = optim.update(made, layout, state, ours, given, torch.tensor(begin + k), torch.tensor(True))
        m, v = beta1 * m + (1 - beta1) * grad, 0.999 * v + 0.001 * grad**2
        unbiased = m / (1 - beta1 ** (begin + k + 1)), v / (1 - 0.999 ** (begin + k + 1))
        step = lr * (0.01 * param + unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8))
        param = param - step
        assert torch.isfinite(ours).all() and np.abs(step).max() > 1e-3  # upstream's last steps are large
        np.testing.assert_allclose(ours, param, rtol=1e-5, atol=1e-6)
    assert int(state.count) == case["total"]


def test_mixed_precision_is_asked_for_by_a_flag_and_scales_as_upstreams():
    case = told("awml_schedule")["amp"]
    assert all(config.precision == "fp32" for config in awml.VARIANTS.values())
    scale, scaler = precision.init_loss_scale(), case["scaler"]
    assert float(scale.scale) == scaler["init_scale"]
    full = replace(scale, good_steps=torch.tensor(scaler["growth_interval"] - 1))
    for finite, start, factor in ((True, full, "growth_factor"), (True, scale, ""), (False, full, "backoff_factor")):
        after = precision.update_loss_scale(start, torch.tensor(finite))
        assert float(after.scale / scale.scale) == scaler.get(factor, 1.0)
    assert awml.FUSION.clip_norm == case["clip"]["max_norm"]


# -------------------------------------------------------------------------------------------------- what is configured


def merged(base: dict, changes: dict) -> dict:
    """`base` with the golden's `except_for`: dicts are merged, others replaced."""
    both = {
        k: merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
        for k, v in changes.items()
    }
    return {k: v for k, v in (base | both).items() if k not in changes.get("(absent)", ())}


def configured() -> dict[str, dict]:
    """AWML's configs by file, in full."""
    found = told("awml_configs")["configs"]
    return {
        name: merged(found[of["same_as"]], of["except_for"]) if "same_as" in of else of for name, of in found.items()
    }


def ours(file: str) -> awml.Config:
    return next(config for part, config in CONFIGS.items() if part in file)


FILES = configured()


@pytest.mark.parametrize("file", FILES)
def test_every_config_of_awmls_is_ours(file):
    case, config = FILES[file], ours(file)
    assert (config.epochs, config.batch_size) == (case["train_cfg"]["max_epochs"], case["batch_size"]["train"])
    assert config.sync_statistics == (case["sync_bn"] == "torch") and case["optim_wrapper"]["type"] == "OptimWrapper"
    assert config.clip_norm == case["optim_wrapper"]["clip_grad"]["max_norm"]
    assert config.weight_decay == case["optim_wrapper"]["optimizer"]["weight_decay"] and config.ema is None
    assert config.class_balanced == (case["dataset_wrapper"] == "CBGSDataset")
    first = config.recipe_lr * (config.start_lr if config.schedule == "cycle" else 1.0)
    assert first == pytest.approx(case["optim_wrapper"]["optimizer"]["lr"], rel=1e-12)
    turn, *_ = (s["end"] for s in case["param_scheduler"] if "Cosine" in s["type"] or "Linear" in s["type"])
    assert config.lr_turn == config.beta1_turn == pytest.approx(turn / config.epochs)
    assert (config.schedule == "stairs") == (case["param_scheduler"][0]["type"] == "LinearLR")
    assert not config.frozen and config.paste == any(step["type"] == "ObjectSample" for step in case["train_pipeline"])
    if config.model != awml.NUSCENES:
        devices = case["gpus_of_the_schedule"]
        assert config.recipe_batch == devices * config.batch_size == case["auto_scale_lr"]["base_batch_size"]
        assert tuple(case["class_names"]) == t4_classes.CLASSES == awml.EVAL.class_names
        assert [tuple([name, *names]) for name, names in case["merge_objects"]] == list(t4_classes.Rules().merged)


@pytest.mark.parametrize("file", FILES)
def test_networks_have_the_sizes_that_the_config_says(file):
    case, config = FILES[file], ours(file)
    network = awml.network(config)
    assert [*network.voxels.lower, *network.voxels.upper] == case["point_cloud_range"]
    assert [*network.voxels.size] == case["voxel_size"] and network.head.classes == len(case["class_names"])
    assert network.head.queries == case["model"]["bbox_head"]["num_proposals"]
    encoder = case["model"]["pts_middle_encoder"]
    assert (network.lidar is None) == (encoder is None)
    if network.lidar is not None:
        assert [*network.sparse_grid] == encoder["sparse_shape"]
        assert [*network.voxels.max_voxels] == case["voxelization"]["max_voxels"]
        assert len(network.lidar.features) == encoder["in_channels"]
        assert (network.lidar.fourier is not None) == bool(encoder.get("num_aug_features"))
    assert (network.camera is not None) == (case["camera_order"] is not None)
    if network.camera is not None:
        assert [*network.camera.view.grid.image_size] == case["image_size"]


def step_of(pipeline: list[dict], kind: str) -> dict:
    return next((step for step in pipeline if step["type"] == kind), {})


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("nuscenes/")])
def test_what_is_read_and_moved_is_what_the_config_says(file):
    case, config = FILES[file], ours(file)
    data = awml.task(replace(config, data_root=small_t4_world.root())).data
    for pipeline, reading in ((case["train_pipeline"], data.reading(0)), (case["test_pipeline"], data.eval_reading)):
        training = pipeline is case["train_pipeline"]
        swept = step_of(pipeline, "LoadPointsFromMultiSweeps")
        assert reading.points.sweeps == swept["sweeps_num"] == case["sweeps_num"] and swept["remove_close"]
        assert (reading.points.sweep_choice == "newest") == swept["test_mode"] and reading.points.sweep_pool == 2
        assert not reading.points.pad_empty_sweeps and reading.points.published_sweeps
        assert reading.points.shuffle == bool(step_of(pipeline, "PointShuffle")) == training
        assert [*reading.range] == step_of(pipeline, "PointsRangeFilter")["point_cloud_range"]
        moved, drawn = step_of(pipeline, "BEVFusionGlobalRotScaleTrans"), reading.augmentation
        assert bool(moved) == (drawn is not None) == training
        if drawn is not None:
            assert [[-drawn.rotation, drawn.rotation], [*drawn.scale], [*drawn.translation]] == [
                moved["rot_range"], moved["scale_ratio_range"], moved["translation_std"],
            ]  # fmt: skip
            assert drawn.scale_translation and (drawn.flip_x, drawn.flip_y) == (0.5, 0.5)
        seen, views = step_of(pipeline, "ImageAug3D"), reading.cameras
        assert bool(seen) == (views is not None) and not step_of(pipeline, "GridMask")
        if views is not None:
            assert [*views.channels] == case["camera_order"] and "CAM_BACK" not in views.channels
            assert [*views.image_size] == seen["final_dim"] and views.covering is None and views.frames == 1
            given = (views.resize,) * 2 if views.augmentation is None else views.augmentation.resize
            assert [*given] == seen["resize_lim"] and seen["bot_pct_lim"] == [0, 0]
            turns = (0.0, 0.0) if views.augmentation is None else views.augmentation.rotate_deg
            assert [*turns] == seen["rot_lim"]
            flips = views.augmentation is not None and views.augmentation.flip
            assert flips == seen["rand_flip"] == training == seen["is_train"]
            assert views.augmentation is None or views.augmentation.turned == "bicubic"
    assert data.database is None and len(data.items) == len(data.training)  # nothing pasted, nothing balanced


def test_the_metric_is_what_the_configs_ask_for():
    made = t4_report.config(awml.EVAL.class_names)
    for file, case in FILES.items():
        asked = case["evaluator_metric_configs"]
        if asked is None:
            continue
        bands = tuple(zip(asked["min_distance"], asked["max_distance"]))
        assert set(made.bands) == set(bands) and made.labels == tuple(asked["target_labels"]), file
        assert [*made.matching["center_distance_bev"]] == asked["center_distance_bev_thresholds"]
        assert [*made.matching["plane_distance"]] == asked["plane_distance_thresholds"]
        assert made.class_agnostic_false_positives == asked["matching_class_agnostic_fps"]
        assert set(asked["iou_3d_thresholds"] or ()) == set() == set(made.min_points)
        ranges = case["eval_class_range"]
        assert ranges is None or (set(ranges.values()) == {t4_report.NDS_RANGE} and ranges.keys() == set(made.labels))
    assert made.bands == t4_config.AWML_BANDS


def test_published_figures_are_the_goldens():
    rows = [row for *_, row in told("published")["awml"]]
    ranges = {json.dumps(row): where for _, _, where, row in told("published")["awml"]}

    def row(name: str) -> dict:
        return next(
            r for r in rows if name in r.values() and ranges[json.dumps(r)] in (None, "Eval Range: 0.0 - 121.0m")
        )

    def percent(text: str) -> float:
        return round(100 * float(text), 4) if float(text) < 1 else float(text)

    figures = {
        "awml-lidar": "BEVFusion-LiDAR base/2.7.0",
        "awml-lidar-offline": "base/0.2",
        "awml-camera-lidar": "BEVFusion-CL J6Gen2/2.0.1 (B)",
    }
    for model, name in figures.items():
        published, found = catalogue.MODELS[model].published, row(name)
        assert published.mean_ap == percent(found["mAP"]) and published.t4
        assert published.other == (percent(found["mAPH"]) if "mAPH" in found else None)
    assert catalogue.MODELS["awml-camera"].published is None
    other = row("BEVFusion-LiDAR j6gen2_base/2.7.1")
    for figure in (percent(other["mAP"]), percent(other["mAPH"])):
        assert f"{figure:g}" in awml.__doc__


# ------------------------------------------------------------------------------------------------ points, boxes, images


@pytest.mark.parametrize("case", ["awml_bevfusion_l_offline", "awml_bevfusion_cl"])
def test_points_and_boxes_are_moved_and_kept_as_upstreams(case):
    """Rotation, then translation, then scale, then mirrors; points strictly in range, centres of boxes in x and y."""
    path = SHARED / "goldens" / case / "inputs.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    found = load_file(path)
    numbers = Draws(0.35, 1.03, 0.4, -0.3, 0.1, 0.9, 0.1)  # angle, scale, shift, no mirror of x, one of y
    matrix = augment.draw_matrix(awml.TRAIN.augmentation, numbers)
    np.testing.assert_allclose(matrix, found["train_lidar_aug_matrix"], atol=1e-7)
    moved = augment.move_points(found["points"], matrix)
    kept = moved[points.in_range(moved, awml.TRAIN.range)]
    np.testing.assert_allclose(kept, found["train_points"], atol=1e-5)
    boxes, labels = (np.concatenate([found[f"gt_{of}"], found[f"synthetic_gt_{of}"]]) for of in ("boxes", "labels"))
    boxes, labels = annotations.in_range(augment.move_boxes(boxes, matrix), labels, awml.TRAIN.range)
    np.testing.assert_array_equal(labels, found["train_gt_labels"])
    np.testing.assert_allclose(np.delete(boxes, 6, 1), np.delete(found["train_gt_boxes"], 6, 1), atol=1e-5)
    turned = boxes[:, 6] - found["train_gt_boxes"][:, 6]
    np.testing.assert_allclose(np.angle(np.exp(1j * turned)), 0, atol=1e-6)


def test_shifts_have_their_own_deviation_in_each_axis():
    rng = np.random.default_rng(0)
    still = replace(awml.TRAIN.augmentation, rotation=0.0, scale=(1.0, 1.0), flip_x=0.0, flip_y=0.0)
    shifts = np.array([augment.draw_matrix(still, rng)[:3, 3] for _ in range(2000)])
    np.testing.assert_allclose(shifts.std(axis=0), (0.5, 0.5, 0.2), rtol=0.06)


def test_a_training_sample_has_one_of_the_newest_two_scans_before_it_and_a_scored_one_the_newest():
    index = small_t4_world.index("train")
    lags = [[sweep.lag for sweep in frame.sweeps] for frame in index]
    assert [len(row) for row in lags] == [0, 1, 2, 3]
    drawn, bare = set(), replace(awml.TRAIN, cameras=None, augmentation=None, range=None)
    for seed in range(12):
        sample = scene.load(index, 3, bare, np.random.default_rng(seed))
        drawn.add(tuple(np.unique(sample.points[:, 4]).tolist()))
    assert drawn == {(0.0, np.float32(lags[3][k])) for k in (0, 1)}
    newest = scene.load(index, 3, replace(awml.EVAL, cameras=None)).points[:, 4]
    assert set(np.unique(newest).tolist()) == {0.0, float(np.float32(lags[3][0]))}
    alone = scene.load(index, 0, replace(awml.EVAL, cameras=None)).points  # a scene's start: nothing is added
    assert (alone[:, 4] == 0).all()
    assert scene.files(index, 3, bare)[1:] == [sweep.path for sweep in index[3].sweeps[:2]]
    assert len(scene.files(index, 3, replace(awml.EVAL, cameras=None))) == 2


def test_objects_without_points_or_of_no_class_are_no_targets():
    """Training wants LiDAR points and a label; radar points do not count."""
    index = small_t4_world.index("train")
    for k, frame in enumerate(index):
        sample = scene.load(index, k, replace(awml.EVAL, cameras=None))
        x, y = frame.boxes[:, 0], frame.boxes[:, 1]
        inside = (np.abs(x) < 122.4) & (np.abs(y) < 122.4)
        wanted = [n for n, seen, near in zip(frame.names, frame.num_lidar_points > 0, inside) if n and seen and near]
        assert [t4_classes.CLASSES[label] for label in sample.labels] == wanted and wanted


def test_images_are_turned_bicubic_and_otherwise_made_as_the_others():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (60, 110, 3), dtype=np.uint8)).resize((440, 240))
    move = {"size": (96, 192), "resize": 0.5, "crop": (10, 24), "flip": True}
    straight = [image.transform(picture, **move, turned=how) for how in ("nearest", "bicubic")]
    np.testing.assert_array_equal(straight[0][0], straight[1][0])
    near, cubic = (image.transform(picture, **move, rotate_deg=4.0, turned=how) for how in ("nearest", "bicubic"))
    np.testing.assert_array_equal(near[1], cubic[1])  # the same map of pixels
    expected = Image.fromarray(straight[0][0]).rotate(4.0, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(cubic[0], np.array(expected))
    assert (near[0] != cubic[0]).mean() > 0.5  # of upstream's own images 69 to 75 %


def test_the_golden_images_are_those_of_the_config_s_cameras_and_crop():
    """A nuScenes frame by 0.48; its pixels stay in ../shared."""
    frame, path = SHARED / "nuscenes_frame/frame.json", SHARED / "goldens/awml_bevfusion_cl/inputs.safetensors"
    if not (frame.is_file() and path.is_file()):
        pytest.skip(f"{frame} or {path} is not here")
    found = load_file(path)
    index = infos.read(frame)
    sample = scene.load(index, 0, Reading(cameras=replace(awml.CAMERAS, resize=0.48)))
    pixels = sample.images[0].transpose(0, 3, 1, 2)
    if PIL.__version__.startswith("13."):
        np.testing.assert_array_equal(pixels, found["imgs"])
    assert np.abs(pixels.astype(int) - found["imgs"]).mean() < 0.5
    np.testing.assert_allclose(sample.image_aug[0][:, :2, :2], found["img_aug_matrix"][:, :2, :2], atol=1e-7)
    np.testing.assert_allclose(sample.image_aug[0][:, :2, 3], found["img_aug_matrix"][:, :2, 3], atol=1e-4)
    np.testing.assert_allclose(sample.intrinsics[0], found["cam2img"], rtol=1e-6)


def test_images_are_resized_by_awmls_factor_whatever_their_size_and_mixed_ones_lie_on_black():
    large, small = (1200, 2500), (1000, 2400)
    rng = np.random.default_rng(0)
    assert cameras._move(large, awml.CAMERAS, rng) == {"resize": 0.32, "crop": (16, 0)}
    sizes = cameras._as_moved([large, small], awml.CAMERAS)
    assert sizes == [large, large] and cameras._as_moved([large, small], Cameras()) == [large, small]
    picture = Image.new("RGB", small[::-1], (9, 9, 9))
    pixels, _ = image.transform(picture, size=(384, 768), **cameras._move(sizes[1], awml.CAMERAS, rng))
    row = int(small[0] * 0.32)  # where the smaller one ends: what is below is black, as it is where padding was resized
    assert (pixels[: row - 1, :750] == 9).all() and (pixels[row + 1 :] == 0).all()
    for size in (large, small, (450, 800)):
        loose = replace(awml.CAMERAS, covering=awml.COVERING)
        drawn = replace(loose, augmentation=awml.TRAIN.cameras.augmentation)
        factor = cameras._move(size, loose, rng)["resize"]
        covers = max(384 / size[0], 768 / size[1])
        assert factor == pytest.approx(covers * 0.32 / 0.29)
        assert all(
            covers <= cameras._move(size, drawn, rng)["resize"] <= covers * 0.35 / 0.29 * (1 + 1e-9) for _ in range(20)
        )


def test_crops_keep_the_bottom_and_are_anywhere_in_width():
    drawn = [
        augment.draw_image(awml.TRAIN.cameras.augmentation, (1860, 2880), (384, 768), np.random.default_rng(seed))
        for seed in range(200)
    ]
    for move in drawn:
        assert move["crop"][1] == int(1860 * move["resize"]) - 384 and 0.29 <= move["resize"] <= 0.35
        assert 0 <= move["crop"][0] <= int(2880 * move["resize"]) - 768 and abs(move["rotate_deg"]) <= 5.4
    lefts = [move["crop"][0] / (int(2880 * move["resize"]) - 768) for move in drawn]
    assert min(lefts) < 0.05 and max(lefts) > 0.95 and 0.35 < np.mean([move["flip"] for move in drawn]) < 0.65


def test_a_nuscenes_run_is_the_lidar_only_recipe_of_mmdetection3d():
    """But for the head's class name and the base batch of a scaling that is off (the golden's README)."""
    ours_, theirs = awml.VARIANTS[awml.NUSCENES], bevfusion_lidar.Config()
    own = {"model", "run_dir", "published_resize", "intensity"}
    differing = {n for n in vars(theirs) if getattr(ours_, n) != getattr(theirs, n)} - own
    assert differing == set()
    assert awml.NETWORKS[awml.NUSCENES]() == bevfusion_lidar.NETWORKS["bevfusion-lidar"]()


def test_sweeps_are_moved_by_the_published_formula_or_right():
    index = small_t4_world.index("train")
    sweep = index[3].sweeps[0]
    (turn, right), (_, off) = (sweeps.motion(sweep, published) for published in (False, True))
    np.testing.assert_allclose(off, turn.T @ right)
    assert math.dist(right, off) < 0.05  # 0.1 s of motion
    assert [config.published_sweeps for config in awml.VARIANTS.values()] == [True] * len(awml.VARIANTS)
    kinds = itertools.chain.from_iterable(of.items() for of in awml.DEFAULTS.values())
    assert {kind: c.published_sweeps for kind, c in kinds} == {
        "t4": True, "nuscenes": True, "frame": True, "synthetic": False,
    }  # fmt: skip
