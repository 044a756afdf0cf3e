"""The image branch alone: rectangles are the projected boxes, depth is LiDAR's, scores are what they say, and it learns."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import small_frames
import small_steps
import test_bevfusion
import torch
from graph_counts import graph_counts

from bevfn import rng, tree
from bevfn.data import batch as batches
from bevfn.data import infos
from bevfn.data.reading import CLASS_NAMES
from bevfn.models import bevfusion, image_branch
from bevfn.synth import key_frame
from bevfn.training import optim

CONFIGS = {
    "lidar-camera": image_branch.Config(test_bevfusion.tiny("lidar-camera"), channels=8),
    "camera": image_branch.Config(test_bevfusion.tiny("camera"), channels=8),
}
CONFIG = CONFIGS["lidar-camera"]
H, W = CONFIG.grid.image_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return key_frame.write_frame(tmp_path_factory.mktemp("frame"), image_size=(225, 400))


@pytest.fixture(scope="module")
def batch(folder):
    cameras = replace(small_frames.SMALL.cameras, image_size=(H, W))
    reading = replace(
        small_frames.SMALL, points=None, cameras=cameras, depth=True, capacities=batches.Capacities(0, 64)
    )
    return batches.collate([small_frames.load(folder, reading)], capacities=reading.capacities)[0]


@functools.cache
def weights(name="lidar-camera"):
    return image_branch.init(CONFIGS[name], seed=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_its_parameters_are_the_detectors(name):
    """Of camera-only also the depth net; of LiDAR-camera not, as it is given the LiDAR's depth."""
    theirs, their_state = bevfusion.init(CONFIGS[name].detector, seed=0)
    for ours, full in zip(weights(name), (theirs, their_state)):
        own = {n: x.shape for n, x in tree.flatten({"camera": ours["camera"]}).items()}
        detector = {n: x.shape for n, x in tree.flatten({"camera": full["camera"]}).items()}
        assert own.items() <= detector.items()
        left = {".".join(n.split(".")[:3]) for n in detector.keys() - own.keys()}
        of_view = {"camera.view.depth_net", "camera.view.depth_transform", "camera.view.downsample"}
        assert left <= (of_view if name == "lidar-camera" else {"camera.view.downsample"})
    assert ("depth" in weights(name)[0]["pretext"]) == (name == "lidar-camera")


def test_rectangles_enclose_the_projected_corners(folder, batch):
    """Against float64 through the file's own matrices, without this package's projection."""
    frame = infos.read(folder / "frame.json")[0]
    found, labels, counted = image_branch.rectangles(batch, CONFIG)
    boxes, valid = batch.boxes[0].double().numpy(), batch.boxes_valid[0].numpy()
    seen = 0
    for n, channel in enumerate(small_frames.SMALL.cameras.channels):
        camera, aug = frame.cameras[channel], batch.image_aug[0, 0, n].double().numpy()
        for g in np.flatnonzero(valid):
            x, y, z, dx, dy, dz, yaw = boxes[g, :7]
            signs = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (0, 1)])
            turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
            corners = (signs * [dx / 2, dy / 2, dz]) @ turn.T + [x, y, z]
            points = corners @ camera.camera_from_lidar[:3, :3].T + camera.camera_from_lidar[:3, 3]
            if (points[:, 2] < image_branch.MIN_DEPTH).any():
                assert not counted[n, g]
                continue
            pixels = points @ camera.intrinsics.T
            pixels = pixels[:, :2] / pixels[:, 2:] @ aug[:2, :2].T + aug[:2, 3]
            low, high = (np.clip(end(pixels, axis=0), 0, (W, H)) for end in (np.min, np.max))
            np.testing.assert_allclose(found[n, g].numpy(), [*low, *high], atol=2e-2)
            if (np.abs(high - low - image_branch.MIN_SIDE) > 0.1).all():
                assert bool(counted[n, g]) == bool((high - low > image_branch.MIN_SIDE).all())
            seen += int(counted[n, g])
    assert seen > 5 and not counted[:, ~batch.boxes_valid[0]].any() and torch.equal(labels[0], batch.labels[0])


def test_the_rectangle_of_a_turned_scene_is_the_same(batch):
    """The base frame's augmentation moves boxes and is undone by the projection."""
    turn = torch.eye(4)
    turn[:2, :2] = 1.05 * torch.tensor([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]], dtype=torch.float32)
    turn[2, 2], turn[:3, 3] = 1.05, torch.tensor([0.5, -1.0, 0.2])
    boxes = batch.boxes.clone()
    boxes[0, :, :3] = boxes[0, :, :3] @ turn[:3, :3].T + turn[:3, 3]
    boxes[0, :, 3:6] *= 1.05
    boxes[0, :, 6] += 0.7
    given = {n: getattr(batch, n) for n in ("images", "intrinsics", "image_aug", "base_from_camera", "image_from_base",
             "depth", "labels", "boxes_valid")}  # fmt: skip
    moved = batches.make(base=batch.base, base_aug=turn[None], boxes=boxes, **given)
    ours, _, counted = image_branch.rectangles(batch, CONFIG)
    theirs, _, theirs_counted = image_branch.rectangles(moved, CONFIG)
    sure = counted & theirs_counted
    assert (counted != theirs_counted).sum() <= 1 and sure.any()
    torch.testing.assert_close(theirs[sure], ours[sure], atol=0.05, rtol=0)


def test_targets_lie_at_the_rectangles_centres(batch):
    found, (rectangle, labels, counted) = image_branch.targets(batch, CONFIG), image_branch.rectangles(batch, CONFIG)
    h, w = CONFIG.grid.feature_size
    assert found["heatmap"].shape == (6, 10, h, w)
    m, g = counted.nonzero()[0].tolist()
    left, top, right, bottom = rectangle[m, g].tolist()
    row, column = int((top + bottom) / 16), int((left + right) / 16)
    assert int(found["cell"][m, g]) == row * w + column
    assert float(found["heatmap"][m, labels[m, g], row, column]) == 1.0
    expected = [np.log((right - left) / 8), np.log((bottom - top) / 8)]
    np.testing.assert_allclose(found["size"][m, g], expected, atol=1e-4)
    centres = {(i, int(k), int(c)) for i in range(6) for k, c, ok in zip(labels[i], found["cell"][i], counted[i]) if ok}
    assert int((found["heatmap"] == 1).sum()) == len(centres)


def test_a_perfect_prediction_scores_perfectly_and_another_does_not(batch):
    found = image_branch.targets(batch, CONFIG)
    w = CONFIG.grid.feature_size[1]
    cell = found["cell"]
    centres = torch.stack([x.float() for x in (found["counted"], found["labels"], cell // w, cell % w)], -1)[None]
    labels = torch.from_numpy(np.array([0.0, 0.0]))
    depth = torch.stack([labels[:1], labels[:1] + 5], -1)

    def scored(heatmap):
        peaks = image_branch.peaks(torch.logit(heatmap.clamp(1e-4, 1 - 1e-4)))[None]
        return image_branch.score({"peaks": peaks.numpy(), "centres": centres.numpy(), "depth": depth.numpy()})

    exact = torch.zeros_like(found["heatmap"])
    exact[found["heatmap"] == 1] = 0.9
    made = scored(exact)
    assert list(made) == ["2D mAP", "depth error"] and made["depth error"] == 0.0
    assert made["2D mAP"] > 0.95  # two objects of a class whose centres share a cell are one peak
    assert scored(exact.roll(1, dims=1))["2D mAP"] < 0.2 and scored(exact.roll(4, dims=3))["2D mAP"] < 0.5
    assert np.isnan(image_branch.score({"peaks": np.zeros((1, 6, 2, 4)), "centres": np.zeros((1, 6, 2, 4)),
                                        "depth": np.zeros((1, 2))})["2D mAP"])  # fmt: skip


def test_the_depth_error_of_the_truth_is_half_a_step_at_most(batch):
    grid = CONFIG.grid
    labels = image_branch.depth_net.depth_labels(batch.depth.flatten(0, 1), grid.depth_m, grid.stride)
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), grid.depth_bins).permute(0, 3, 1, 2).float()
    ((error, count),) = image_branch.depth_error(one_hot, batch.depth, grid).tolist()
    assert count == int((labels >= 0).sum()) > 20 and error == 0.0
    ((error, _),) = image_branch.depth_error(one_hot.roll(1, dims=1), batch.depth, grid).tolist()
    assert error > 0


@pytest.mark.parametrize(
    ("name", "precision"), [("lidar-camera", "fp32"), ("lidar-camera", "fp16"), ("camera", "fp32")]
)
def test_compiled_step_equals_eager_in_one_graph(batch, name, precision):
    optimizer = optim.Config(lr=optim.Schedule(1e-4), eps=1.0)
    made = []
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        made.append(small_steps.run(image_branch, CONFIGS[name], batch, optimizer, precision, backend, 3))
    assert graph_counts() == {"graphs": 1, "breaks": 0}
    (ours, ours_state), (theirs, their_state) = made
    assert all(m["skipped"] == 0 and m["num_pos"] > 0 for m in ours)
    assert theirs == [pytest.approx(m, rel=1e-6, abs=1e-6) for m in ours]
    small_steps.compare_leaves(weights(name)[0], ours_state, their_state, 1e-6, 1e-7)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_loss_falls_and_every_parameter_learns(batch, name):
    optimizer = optim.Config(lr=optim.Schedule(3e-3))
    history, after = small_steps.run(image_branch, CONFIGS[name], batch, optimizer, "fp32", "eager", 20)
    for term in ("loss/depth", "loss/heatmap", "loss/size", "loss/total"):
        assert history[-1][term] < 0.8 * history[0][term], term
    before = tree.flatten(weights(name)[0])
    still = [k for k, leaf in tree.flatten(after.params).items() if torch.equal(leaf, before[k])]
    assert [k for k in still if before[k].any()] == []


def test_predictions_are_of_key_frames(batch):
    params, state = weights()
    made = image_branch.predict(params, state, batch, config=CONFIG)
    assert made["peaks"].shape == (1, 6, image_branch.PEAKS, 4) and made["centres"].shape == (1, 6, 64, 4)
    scores = image_branch.score({name: value.numpy() for name, value in made.items()})
    assert 0 <= scores["2D mAP"] <= 1 and scores["depth error"] > 0


def test_what_cannot_be_is_refused(batch):
    with pytest.raises(ValueError, match="no cameras"):
        image_branch.Config(bevfusion.lidar_only())
    params, state = weights()
    with pytest.raises(ValueError, match="depth maps"):
        image_branch.loss(params, state, replace(batch, depth=None), rng.key(0), config=CONFIG)
    with pytest.raises(ValueError, match="images are"):
        other = image_branch.Config(bevfusion.mini(bevfusion.lidar_camera()))
        image_branch.apply(params, state, batch, config=other, train=True)


def test_boxes_without_size_or_of_nan_teach_nothing(batch):
    boxes = batch.boxes.clone()
    boxes[0, 0, 3], boxes[0, 1, 6] = 0.0, float("nan")
    params, state = weights()
    total, (_, metrics) = image_branch.loss(params, state, replace(batch, boxes=boxes), config=CONFIG)
    assert torch.isfinite(total)
    _, _, counted = image_branch.rectangles(replace(batch, boxes=boxes), CONFIG)
    assert not counted[:, :2].any() and int(metrics["num_pos"]) == int(counted.sum())
    assert len(CLASS_NAMES) == CONFIG.detector.head.classes
