"""The picture of a frame: complete or absent, and boxes drawn where the cameras and the lidar say."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import small_frames
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from bevfn import draw
from bevfn.boxes import corners
from bevfn.data.batch import Capacities, collate
from bevfn.evaluation import results
from bevfn.synth import key_frame

FRONT = draw.ORDER.index("CAM_FRONT")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return small_frames.load(key_frame.write_frame(tmp_path_factory.mktemp("frame"), seed=1, image_size=(225, 400)))


def test_picture_shows_predictions_in_their_colours(sample, tmp_path):
    path = tmp_path / "new" / "frame.png"
    draw.draw(sample, sample.boxes, np.full(len(sample.boxes), 1.0), sample.labels, path, title="step 3")
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert picture.shape[1] > picture.shape[0] > 800
    for label in set(sample.labels.tolist()):
        colour = np.array([int(draw.COLOURS[label][i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(picture - colour).max(axis=-1) < 12).sum() > 20, sample.class_names[label]


@pytest.mark.parametrize("name", ["$x", "$\\frac{$", "a$b$c", "\ud800", "a\nb\x1b[31m", "\\", "%s{}"])
def test_a_text_that_is_no_formula_is_drawn(name):
    figure = Figure()
    figure.suptitle(name)
    figure.add_subplot().plot([1], [1], label=name)
    figure.legend()
    assert draw.png(figure, dpi=50).startswith(b"\x89PNG")


def test_a_frame_whose_names_are_no_formulas_is_drawn(sample, tmp_path):
    name = "$\\frac{$"
    odd = dataclasses.replace(
        sample, token=name, class_names=(name, *sample.class_names[1:]), camera_names=(name, *sample.camera_names[1:])
    )
    draw.draw(odd, sample.boxes, np.ones(len(sample.boxes)), sample.labels, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 800


def test_nothing_predicted_and_unfinite_boxes_still_give_a_picture(sample, tmp_path):
    nothing = np.zeros((0, 9))
    draw.draw(sample, nothing, np.zeros(0), np.zeros(0, dtype=np.int64), tmp_path / "a.png")
    broken = np.full((2, 9), np.nan)
    draw.draw(sample, broken, np.ones(2), np.zeros(2, dtype=np.int64), tmp_path / "b.png")
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


def test_frame_without_cameras_boxes_or_points_is_drawn_from_above(sample, tmp_path):
    bare = dataclasses.replace(
        sample,
        image_paths=(),
        camera_names=(),
        points=sample.points[:0],
        boxes=sample.boxes[:0],
        labels=sample.labels[:0],
    )
    draw.draw(bare, sample.boxes, np.ones(len(sample.boxes)), sample.labels, tmp_path / "bare.png")
    assert Image.open(tmp_path / "bare.png").size[0] > 800


def test_projection_agrees_with_the_pinhole_and_cuts_what_is_behind():
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[100.0, 0, 50], [0, 100.0, 40], [0, 0, 1]]) @ np.array(
        [[0, -1, 0], [0, 0, -1], [1, 0, 0]]
    )
    ahead = corners(torch.tensor([10.0, 0, -1, 2, 2, 2, 0], dtype=torch.float64)).numpy()
    ends = np.concatenate(draw._project(ahead, matrix, 100, 80))
    np.testing.assert_allclose(ends.min(axis=0), [50 - 100 / 9, 40 - 100 / 9])
    np.testing.assert_allclose(ends.max(axis=0), [50 + 100 / 9, 40 + 100 / 9])
    behind = ahead - [30.0, 0, 0]
    assert draw._project(behind, matrix, 100, 80) == []
    around = corners(torch.tensor([0.0, 0, -1, 20, 2, 2, 0], dtype=torch.float64)).numpy()  # the camera is inside
    assert np.isfinite(np.concatenate(draw._project(around, matrix, 100, 80))).all()


def test_an_arrow_ends_where_a_box_is_in_a_second():
    box = np.array([2.0, 1.0, 0.0, 4.0, 2.0, 2.0, 0.3, 0.0, 5.0])
    way, *barbs = draw.arrow(box)
    np.testing.assert_allclose(way, [[2, 1], [2, 6]])
    assert all(line[0].tolist() == [2.0, 6.0] and line[1, 1] < 6 for line in barbs) and len(barbs) == 2
    for still in ([0.1, 0.0], [np.nan, np.nan]):
        assert draw.arrow(np.r_[box[:7], still]) == []
    assert draw.arrow(box[:7]) == []


def test_augmented_boxes_are_taken_back_before_projection(sample, tmp_path):
    """Turning points, boxes and base_aug together must leave the camera pictures as they are."""
    angle = 0.4
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    base_aug = np.eye(4, dtype=np.float32)
    base_aug[:2, :2] = turn
    boxes = sample.boxes.copy()
    boxes[:, :2] = boxes[:, :2] @ turn.T
    boxes[:, 6] += angle
    plain = tmp_path / "plain.png"
    turned = tmp_path / "turned.png"
    scores = np.ones(len(boxes))
    draw.draw(sample, sample.boxes, scores, sample.labels, plain)
    draw.draw(dataclasses.replace(sample, boxes=boxes, base_aug=base_aug), boxes, scores, sample.labels, turned)
    a, b = (
        np.asarray(Image.open(p).convert("RGB"))[:, : Image.open(p).size[0] // 2].astype(int) for p in (plain, turned)
    )
    assert (np.abs(a - b).max(axis=-1) > 40).mean() < 1e-3


def test_wrong_calls_name_what_is_wrong(sample, tmp_path):
    with pytest.raises(ValueError, match=r"2 scores and 24|draw got boxes .* 2 scores"):
        draw.draw(sample, sample.boxes, np.ones(2), sample.labels, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"label 10, but the frame has 10 class names"):
        draw.draw(sample, sample.boxes[:1], np.ones(1), np.array([10]), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"written as PNG"):
        draw.draw(sample, sample.boxes, np.ones(len(sample.boxes)), sample.labels, tmp_path / "a.jpg")
    assert os.listdir(tmp_path) == []


def test_missing_image_leaves_no_half_written_picture(sample, tmp_path):
    gone = dataclasses.replace(sample, image_paths=(Path("nowhere.jpg"), *sample.image_paths[1:]))
    with pytest.raises(ValueError, match=r"nowhere.jpg: the image does not exist"):
        draw.draw(gone, sample.boxes, np.ones(len(sample.boxes)), sample.labels, tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_a_failed_write_keeps_the_old_picture(sample, tmp_path, monkeypatch):
    path = tmp_path / "frame.png"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        draw.draw(sample, sample.boxes[:0], np.zeros(0), np.zeros(0, dtype=np.int64), path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["frame.png"]


def test_a_frame_that_was_read_without_points_is_refused(sample, tmp_path):
    bare = dataclasses.replace(sample, points=None)
    with pytest.raises(ValueError, match="the batch has no points, which are needed here"):
        draw.draw(bare, np.zeros((0, 9)), np.zeros(0), np.zeros(0, dtype=int), tmp_path / "a.png")


# --- in a notebook ------------------------------------------------------------------------------------------------


def test_a_figure_is_shown_by_a_notebook_without_pyplot(sample):
    shown = draw.figure(sample)
    assert shown._repr_png_().startswith(b"\x89PNG") and not plt.get_fignums()
    assert shown.get_suptitle() == f"{sample.token}   {len(sample.boxes)} annotated"
    assert [axes.get_title() for axes in shown.axes[:6]] == list(
        draw.ORDER
    )  # front left, front, front right, then the back
    rows = [round(axes.get_subplotspec().rowspan.start) for axes in shown.axes[:6]]
    assert rows == [0, 0, 0, 1, 1, 1]


def test_predictions_of_a_batch_and_of_a_key_frame_are_the_same_figure(sample):
    rows = {
        "boxes": sample.boxes[:3],
        "scores": np.ones(3),
        "labels": sample.labels[:3],
        "valid": np.array([True, True, False]),
    }
    batch = {name: torch.from_numpy(np.stack([np.zeros_like(row), row])) for name, row in rows.items()}
    found = results.Detections(rows["boxes"][:2], rows["scores"][:2], rows["labels"][:2])
    a, b = (draw.figure(sample, how, row=1) for how in (batch, found))
    assert "2 predicted with score" in a.get_suptitle() and a._repr_png_() == b._repr_png_()


def test_a_batch_is_drawn_as_a_model_sees_it(sample):
    """Boxes lie on the cropped and resized images where they lie on the original ones."""
    turned, _ = collate([sample, sample], capacities=Capacities(points=40_000, boxes=64))
    shown = draw.figure(turned, row=1)
    front = shown.axes[FRONT]
    assert front.get_title() == "CAM_FRONT" and front.get_images()[0].get_array().shape == (64, 176, 3)
    original = draw.figure(sample).axes[FRONT]
    lines, wanted = (
        np.concatenate([line for c in axes.collections for line in c.get_segments()]) for axes in (front, original)
    )
    moved = wanted @ sample.image_aug[0, 0, :2, :2].T + sample.image_aug[0, 0, :2, 3]
    near = np.abs(moved[:, None] - lines[None]).max(-1).min(1)  # lines outside of the crop are left out
    inside = ((moved >= 0) & (moved < [176, 64])).all(1)
    assert inside.sum() > 20 and near[inside].max() < 1e-2
