"""The recipes against what upstream computes for them (shared/goldens/recipe), whatever cases its files hold."""

import dataclasses
import hashlib
import itertools
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import pytest
import small_world
import torch
from nuscenes_counts import BALANCED, KEY_FRAMES, STEPS
from safetensors.numpy import load_file
from small_frames import indexed, labelled

from bevfn import boxes as shapes
from bevfn import precision
from bevfn.data import annotations, augment, image, paste, sampling
from bevfn.data.index import Camera
from bevfn.data.reading import CLASS_NAMES
from bevfn.distributed import Replicas
from bevfn.evaluation import results
from bevfn.evaluation.results import Detections
from bevfn.experiments import bevdepth, bevfusion, bevfusion_lidar, matrixvt
from bevfn.models import bevdepth as network
from bevfn.precision import Policy
from bevfn.training import optim, tasks, train

SHARED = Path(__file__).parents[1].parent / "shared"
GOLDENS = SHARED / "goldens/recipe"
BEVFUSION = {"bevfusion_lidar": bevfusion_lidar, "bevfusion_lidar_cam": bevfusion, "bevfusion": bevfusion}
BEVDEPTH = {  # the golden's names
    "two-key": "bevdepth-2key", "two-key-ema": "bevdepth-2key-ema", "two-key-cbgs-da": "bevdepth-2key-da",
    "two-key-cbgs-da-ema": "bevdepth-2key-da-ema", "one-key-ema": "bevdepth-1key-ema", "four-key": "bevdepth-4key",
}  # fmt: skip


def golden(name: str) -> Path:
    if not (GOLDENS / name).is_file():
        pytest.skip(f"{GOLDENS / name} is not here")
    return GOLDENS / name


def goldens(pattern: str) -> list[Path]:
    found = sorted(GOLDENS.glob(pattern))
    if not found:
        pytest.skip(f"{GOLDENS} with its {pattern} is not here")
    return found


def grouped(path: Path, depth: int = 1) -> dict[str, dict[str, np.ndarray]]:
    """The file's tensors by the first parts of their names."""
    cases: dict[str, dict[str, np.ndarray]] = {}
    for name, value in load_file(path).items():
        parts = name.split("/")
        cases.setdefault("/".join(parts[:depth]), {})["/".join(parts[depth:])] = value
    return cases


class Draws:
    """A generator whose numbers are given."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = iter(numbers)

    def _next(self, *_: float, size: int | None = None) -> float | np.ndarray:
        return next(self.numbers) if size is None else np.array(list(itertools.islice(self.numbers, size)))

    def uniform(self, low: float, high: float) -> float | np.ndarray:
        return self._next()

    def normal(self, mean: float, deviation: float, size: int) -> float | np.ndarray:
        return self._next(size=size)

    def random(self, size: int | None = None) -> float | np.ndarray:
        return self._next(size=size)


# ------------------------------------------------------------------------------------------- schedules and optimizers


def recipe_optimizer(experiment, steps_per_epoch: int) -> optim.Config:
    config = next(iter(experiment.DEFAULTS.values()))["nuscenes"]
    plan = tasks.Plan(steps_per_epoch, config.epochs * steps_per_epoch, config.recipe_batch)
    return bevfusion.optimizer(config, plan)


def assert_schedules(made: optim.Config, steps, lr, beta1, fresh) -> None:
    """Every value within 1e-6 of upstream's; of 1 - beta1 as far as upstream's float64 knows it near 1."""
    at = torch.as_tensor(np.asarray(steps))
    np.testing.assert_allclose(made.lr.at(at), lr, rtol=1e-6)
    np.testing.assert_allclose(made.beta1.at(at), beta1, rtol=1e-6)
    np.testing.assert_allclose(made.beta1.complement().at(at).double(), fresh, rtol=1e-6, atol=2e-14)


def test_schedules_are_upstreams_at_every_step_of_the_golden():
    for path in goldens("schedule_*.json"):
        case = json.loads(path.read_text())
        made = recipe_optimizer(BEVFUSION[path.stem.removeprefix("schedule_")], case["steps_per_epoch"])
        assert_schedules(made, case["steps"], case["lr"], case["beta1"], case["one_minus_beta1"])
        assert (made.weight_decay, made.beta2, made.eps) == (case["weight_decay"], case["beta2"], case["eps"])
        assert made.clip_norm == case["clip_norm"] and len(made.groups) + 1 == case["parameter_groups"]


def chained(base: float, total: int, *schedulers: tuple) -> np.ndarray:
    """mmengine's schedulers (kind, begin, end, number) one after the other on the value that the last one left.

    Source: mmengine param_scheduler.py, behaviour."""
    value, out = base, []
    for step in range(total):
        for kind, begin, end, number in schedulers:
            k = step - begin
            if not 0 <= k < end - begin:
                continue
            if kind == "linear":
                ahead = (end - begin - 1) * number + (k - 1) * (1 - number)
                value *= number if k == 0 else 1 + (1 - number) / ahead
            elif k:
                ratio = (1 + math.cos(math.pi * k / (end - begin))) / (1 + math.cos(math.pi * (k - 1) / (end - begin)))
                value = ratio * (value - number) + number
        out.append(value)
    return np.array(out)


@pytest.mark.parametrize("steps_per_epoch", [STEPS, 1001])
def test_both_schedules_are_mmengines_at_every_iteration(steps_per_epoch):
    """Ends of phases are cut off to whole steps: 2.4 epochs of 3862 steps are 9268."""
    warm, turn, end = ("linear", 0, 500, 0.33333333), int(2.4 * steps_per_epoch), 6 * steps_per_epoch
    low, up = ("cosine", 0, turn, 0.85 / 0.95), ("cosine", turn, end, 1.0)
    beta1 = chained(0.9, end, low, up)
    lr = chained(2e-4, end, warm, ("cosine", 0, end, 2e-8))
    assert_schedules(recipe_optimizer(bevfusion, steps_per_epoch), np.arange(end), lr, beta1, 1 - beta1)
    turn, end = 8 * steps_per_epoch, 20 * steps_per_epoch
    lr = chained(1e-4, end, ("cosine", 0, turn, 1e-3), ("cosine", turn, end, 1e-8))
    beta1 = chained(0.9, end, ("cosine", 0, turn, 0.85 / 0.95), ("cosine", turn, end, 1.0))
    assert_schedules(recipe_optimizer(bevfusion_lidar, steps_per_epoch), np.arange(end), lr, beta1, 1 - beta1)


def test_beta1_turns_where_mmengine_cuts_off():
    made = recipe_optimizer(bevfusion, STEPS)
    assert made.beta1.phases[0].end == 9268  # 2.4 * 3862 = 9268.8


def test_bevdepths_rates_and_averages_are_upstreams_at_every_step():
    cases = json.loads(golden("bevdepth_optimizer.json").read_text())
    for name, case in cases.items():
        if name.startswith("ema_first_"):
            ema = optim.Ema(0.999, bevdepth.Config().ema_ramp, int(name.removeprefix("ema_first_")))
            steps = torch.tensor(case["updates"]) - 1
            np.testing.assert_allclose(ema.keep(steps), case["decays"], rtol=1e-6)
            continue
        config = matrixvt.DEFAULTS["matrixvt"]["nuscenes"] if name == "matrixvt" else bevdepth.VARIANTS[BEVDEPTH[name]]
        rates, per_epoch = np.array(case["lr_per_epoch"]), case["upstream_steps_per_epoch"]
        plan = tasks.Plan(per_epoch, config.epochs * per_epoch, config.recipe_batch)
        made = bevdepth.optimizer(config, network.two_key(), plan)
        assert len(rates) == config.epochs
        np.testing.assert_allclose(made.lr.at(torch.arange(plan.total_steps)), rates.repeat(per_epoch), rtol=1e-6)
        assert (made.weight_decay, made.clip_norm) == (case["weight_decay"], case["clip"])
        items = np.zeros(BALANCED if config.class_balanced else KEY_FRAMES)  # which the golden takes
        devices = config.recipe_batch // config.batch_size
        assert tasks.plan(config, items, Replicas("", 0, devices)).steps_per_epoch == per_epoch


class PerStep(optim.Schedule):
    """first + slope * step"""

    def __init__(self, first: float, slope: float) -> None:
        super().__init__(first)
        object.__setattr__(self, "slope", slope)

    def at(self, step):
        return (self.start + self.slope * step.double()).float()

    def complement(self):
        return PerStep(1 - self.start, -self.slope)


def gradient(number: int, like: dict, infinite: bool) -> dict[str, torch.Tensor]:
    generator, size = torch.Generator().manual_seed(number), [0.01, 1, 30, 0.3][number % 4]
    made = {name: torch.randn(leaf.shape, generator=generator) * size for name, leaf in like.items()}
    if infinite and number in (3, 4, 11):
        made["b"][3] = math.inf
    return made


def test_twenty_steps_of_adamw_are_upstreams_with_infinite_gradients_and_microbatches(monkeypatch):
    """Through the train step itself: its loss is sum(params * batch), so that the gradient is the batch."""
    monkeypatch.setattr(precision, "update_loss_scale", partial(precision.update_loss_scale, interval=5))
    scales = json.loads(golden("adamw.json").read_text())["results"]
    for path in goldens("adamw_*.safetensors"):
        states = {k: {n: torch.from_numpy(v) for n, v in leaves.items()} for k, leaves in grouped(path).items()}
        name = path.stem.removeprefix("adamw_")
        kind, *options = name.split("_")
        parts = next((int(o.removeprefix("acc")) for o in options if o.startswith("acc")), 1)
        clip = next((float(o.removeprefix("clip")) for o in options if o.startswith("clip")), 35.0)
        config = optim.Config(
            PerStep(2e-4, 5e-5), PerStep(0.9, -1e-3), weight_decay=0.01 if clip == 35 else 1e-7, clip_norm=clip
        )

        def loss(params, state, batch, key):
            total = sum((params[name] * batch[name]).sum() for name in params)
            return total, ({}, {})

        policy = Policy.of("fp16" if kind == "amp" else "fp32")
        now = train.init(states["initial"], {}, config, precision=policy)
        step = train.make_accumulated(loss, config, accumulate=parts)
        for k in range(20):
            batches = [gradient(k * parts + a, states["initial"], kind == "amp") for a in range(parts)]
            now, metrics = step(now, batches)
            if kind == "amp":
                assert train.read([metrics])[0]["loss_scale"] == scales[name]["scales"][k]
            for leaf, expected in states.get(f"step{k:02d}", {}).items():
                error = (now.params[leaf] - expected).norm() / expected.norm()
                assert error < 1e-6, (name, k, leaf, float(error))


# -------------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize(("order", "scales"), [("RTS", True), ("RST", False)])
def test_points_and_boxes_move_as_upstreams_global_augmentation(order, scales):
    cases = grouped(golden("global_aug.safetensors"), 2)
    experiment = bevfusion if scales else bevfusion_lidar
    assert experiment.TRAIN.augmentation.scale_translation == scales
    for name, case in cases.items():
        if not name.startswith(order):
            continue
        angle, scale, x, y, z, flip_y, flip_x = case["draws"]
        draws = Draws(angle, scale, x, y, z, 0.0 if flip_x else 1.0, 0.0 if flip_y else 1.0)
        matrix = augment.draw_matrix(experiment.TRAIN.augmentation, draws)
        if order == "RTS":  # the other does not record its matrix
            np.testing.assert_allclose(matrix, case["lidar_aug"], atol=1e-6)
        np.testing.assert_allclose(augment.move_points(case["points"], matrix), case["points_out"], atol=1e-4)
        found, _ = annotations.in_range(
            augment.move_boxes(case["boxes"], matrix), np.zeros(len(case["boxes"]), int), (-999, -999, -9, 999, 999, 9)
        )
        np.testing.assert_allclose(found, case["boxes_out"], atol=1e-4)


def test_boxes_move_as_bevdepths_bev_transform():
    for case in grouped(golden("bevdepth_bev_transform.safetensors")).values():
        degrees, scale, flip_x, flip_y = case["rotate_deg_scale_flipx_flipy"]
        draws = Draws(math.radians(degrees), scale, 0, 0, 0, 0.0 if flip_x else 1.0, 0.0 if flip_y else 1.0)
        matrix = augment.draw_matrix(bevdepth.TRAIN.augmentation, draws)
        np.testing.assert_allclose(matrix[:3, :3], case["matrix"], atol=1e-6)
        lift = [0, 0, 0.5, 0, 0, 0, 0, 0, 0] * case["boxes"][:, 5:6]  # gravity to bottom centre
        found = augment.move_boxes((case["boxes"] - lift).astype(np.float32), matrix)
        expected = case["boxes_out"].copy()
        expected[:, 2] -= 0.5 * expected[:, 5]
        turns = (found[:, 6] - expected[:, 6]) / (2 * np.pi)  # upstream's yaw is not limited
        np.testing.assert_allclose(turns, turns.round(), atol=1e-5)
        np.testing.assert_allclose(np.delete(found, 6, 1), np.delete(expected, 6, 1), atol=1e-4)


def test_images_move_as_upstreams_image_augmentation_pixel_for_pixel():
    cases = json.loads(golden("image_aug.json").read_text())
    stored = grouped(golden("image_aug.safetensors"))
    size = bevfusion.CAMERAS.image_size
    for i, case in enumerate(cases):
        left, top, right, bottom = case["crop"]
        assert (bottom - top, right - left) == size
        picture = image.read(SHARED / "nuscenes_frame" / case["file"])
        numbers = Draws(case["resize"], left, 0.0 if case["flip"] else 1.0, case["rotate_deg"])
        move = augment.draw_image(augment.Images(), (picture.height, picture.width), size, numbers)
        assert (move["crop"], move["flip"]) == ((left, top), case["flip"])
        pixels, matrix = image.transform(picture, size=size, **move)
        np.testing.assert_allclose(matrix, stored[f"{i:02d}"]["matrix"], atol=1e-4)
        if PIL.__version__.startswith("13."):
            assert hashlib.sha256(pixels.tobytes()).hexdigest() == case["sha256"]
        difference = pixels[::4, ::4].astype(int) - stored[f"{i:02d}"]["pixels_every_4th"]
        assert np.abs(difference).mean() < 0.5  # another Pillow rounds otherwise


# ---------------------------------------------------------------------------------------- sampling, pasting, results


def test_an_epoch_of_class_balanced_samples_is_as_long_as_upstreams():
    for path in goldens("cbgs_mmdet3d*.json"):
        case = json.loads(path.read_text())
        names = case["class_names"]
        held = case["categories_per_frame"]
        frames = indexed([labelled(tuple(names[k] if k >= 0 else "" for k in frame)) for frame in held])
        drawn = sampling.cbgs(frames, tuple(names), seed=0)
        assert len(drawn) == case["length"]
        ends = np.cumsum([sum(k in frame for frame in held) > 0 for k in range(len(names))])
        for k, part in enumerate(np.split(drawn, ends[-1])):
            assert all(k in held[i] for i in part)


def test_two_boxes_collide_where_they_do_upstream_but_for_a_box_on_itself():
    """Upstream looks for edges that cross and corners inside: of a box and its copy it finds neither."""
    case = load_file(golden("collision.safetensors"))
    boxes = torch.from_numpy(case["boxes"].astype(np.float64))
    ours = (shapes.rotated_overlap_bev(boxes, boxes) > 0).numpy()
    np.fill_diagonal(ours, False)
    same = (boxes[:, None] == boxes[None]).all(dim=2).numpy()
    np.testing.assert_array_equal(ours & ~same, case["collides"].astype(bool))


def test_epochs_paste_as_upstream_does():
    expected = json.loads(golden("paste_epochs.json").read_text())
    index = small_world.training()
    paste.build(index, paste.folder(index), class_names=CLASS_NAMES, progress=False)
    config = dataclasses.replace(bevfusion_lidar.DEFAULTS["bevfusion-lidar"]["nuscenes"], data_root=index.root)
    reading = bevfusion_lidar.task(config).data.reading
    assert [reading(epoch).paste is not None for epoch in range(len(expected))] == expected


@pytest.mark.parametrize("upstream", ["mmdet3d", "bevdepth"])
def test_entries_of_a_results_file_are_upstreams(upstream):
    expected = json.loads(golden("formatting_upstream.json").read_text())[upstream]
    for token, case in grouped(golden("formatting_predictions.safetensors")).items():
        cameras = {
            name.rpartition("/")[2]: Camera("", np.eye(3), np.eye(4), np.eye(4), pose, 0.0)
            for name, pose in case.items()
            if name.startswith("camera_global_from_ego/")
        }
        poses = {name: case[name] for name in ("ego_from_lidar", "global_from_ego")}
        frame = dataclasses.replace(labelled(()), token=token, cameras=cameras, **poses)
        if upstream == "mmdet3d":
            how = {"ego_from_boxes": frame.ego_from_lidar, "global_from_ego": frame.global_from_ego}
        else:  # no filter by range: the devkit does it
            how = {"ego_from_boxes": np.eye(4), "global_from_ego": annotations.ego_pose(frame, bevdepth.CHANNELS)}
            how["ranges"] = None
        found = Detections(case["boxes_bottom"], case["scores"], case["labels"])
        ours = results.entries(token, found, class_names=CLASS_NAMES, **how)
        theirs = sorted(expected[token], key=lambda entry: -entry["detection_score"])
        assert len(ours) == len(theirs) > 0
        for mine, other in zip(ours, theirs):
            for name in ("sample_token", "detection_name", "attribute_name"):
                assert mine[name] == other[name]
            for name in ("translation", "size", "velocity", "detection_score"):
                np.testing.assert_allclose(mine[name], other[name], atol=1e-4)
            alike = abs(np.dot(mine["rotation"], other["rotation"])) / np.linalg.norm(other["rotation"])
            assert alike == pytest.approx(1.0, abs=1e-8)
