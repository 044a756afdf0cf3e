"""Reading frames and making batches: golden inputs, the generated frame's geometry, and each way a file is wrong."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_frames
import torch
from PIL import Image
from safetensors.numpy import load_file
from small_frames import SMALL
from torch.utils import _pytree as pytree

from bevfn import geometry
from bevfn.data import image, points
from bevfn.data.batch import Batch, Capacities, collate
from bevfn.data.reading import CLASS_NAMES
from bevfn.experiments import bevfusion
from bevfn.synth import key_frame

SHARED = Path(__file__).parents[1].parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared (real frame and goldens) is not here")
BLIND = dataclasses.replace(SMALL, cameras=None)
PUBLISHED = dataclasses.replace(SMALL, cameras=bevfusion.CAMERAS)


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    return key_frame.write_frame(tmp_path_factory.mktemp("frame"), seed=1, image_size=(225, 400))


@pytest.fixture
def folder(generated, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(generated, tmp_path / "frame"))


def edit(folder: Path, change) -> None:
    document = json.loads((folder / "frame.json").read_text())
    change(document["data_list"][0])
    (folder / "frame.json").write_text(json.dumps(document))


# --- golden inputs ---


@needs_shared
@pytest.mark.parametrize("case", ["bevfusion_lidar", "bevfusion_lidar_cam"])
def test_real_frame_reproduces_the_golden_inputs(case):
    golden = load_file(SHARED / "goldens" / case / "inputs.safetensors")
    sample = small_frames.load(SHARED / "nuscenes_frame", PUBLISHED if case.endswith("cam") else BLIND)
    np.testing.assert_array_equal(sample.points, golden["points"])
    np.testing.assert_allclose(sample.boxes, golden["gt_boxes"], atol=1e-6)
    np.testing.assert_array_equal(sample.labels, golden["gt_labels"])
    if case.endswith("cam"):
        np.testing.assert_array_equal(sample.images, golden["imgs"][None])
        names = {
            "image_from_base": "lidar2img",
            "intrinsics": "cam2img",
            "base_from_camera": "cam2lidar",
            "image_aug": "img_aug_matrix",
            "base_aug": "lidar_aug_matrix",
        }
        for ours, theirs in names.items():
            found = getattr(sample, ours).reshape(golden[theirs].shape)  # without T
            np.testing.assert_allclose(found, golden[theirs], rtol=1e-6, atol=1e-6, err_msg=ours)
    else:
        assert sample.images is None


@needs_shared
def test_image_matrix_reproduces_the_golden_training_augmentation():
    """The golden stores matrices, not parameters; these follow from a matrix, the crop being whole pixels."""
    size = (256, 704)
    for golden in load_file(SHARED / "goldens/bevfusion_lidar_cam/inputs.safetensors")["aug/img_aug_matrix"]:
        linear, shift = golden[:2, :2].astype(np.float64), golden[:2, 3].astype(np.float64)
        flip = np.linalg.det(linear) < 0
        resize = np.sqrt(abs(np.linalg.det(linear)))
        angle = np.degrees(np.arctan2(linear[0, 1], linear[1, 1]))
        # bottom-aligned up to a pixel: the float32 matrix does not give int(900 * resize) reliably
        base = image.matrix(size=size, resize=resize, crop=(0, 0), flip=flip, rotate_deg=angle)
        crop = -np.linalg.solve(linear / resize, shift - base[:2, 3])
        np.testing.assert_allclose(crop, np.round(crop), atol=2e-3)
        assert abs(int(900 * resize) - size[0] - round(crop[1])) <= 1
        whole = (round(crop[0]), round(crop[1]))
        ours = image.matrix(size=size, resize=resize, crop=whole, flip=flip, rotate_deg=angle)
        np.testing.assert_allclose(ours, golden, atol=1e-3)


# --- images ---


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("rotate_deg", [0.0, 5.0, -5.0])
def test_image_content_moves_as_its_matrix_says(flip, rotate_deg):
    picture = np.zeros((90, 160, 3), dtype=np.uint8)
    picture[40:44, 100:104] = 255  # centre of mass at pixel edges (102, 42)
    moved, matrix = image.transform(
        picture, size=(40, 120), resize=0.9, crop=(10, 20), flip=flip, rotate_deg=rotate_deg
    )
    weight = moved[..., 0].astype(np.float64)
    rows, columns = np.mgrid[:40, :120] + 0.5
    centre = np.array([(columns * weight).sum(), (rows * weight).sum()]) / weight.sum()
    expected = matrix @ np.array([102, 42, 0, 1])
    np.testing.assert_allclose(centre, expected[:2], atol=0.7)  # nearest-neighbour rotation moves by up to half a pixel


def test_crop_beyond_a_small_image_is_black():
    white = np.full((90, 160, 3), 255, dtype=np.uint8)
    moved, _ = image.transform(white, size=(40, 120), resize=0.5, crop=(0, 5))
    assert moved[:, :79].min() == 255 and moved[:, 80:].max() == 0


def test_resize_that_does_not_cover_the_crop_is_rejected():
    with pytest.raises(ValueError, match=r"resize 0.2 turns 1600x900 into 320x180 .* smaller than image_size 704x256"):
        image.centre_crop((900, 1600), (256, 704), 0.2)


def test_image_of_another_size_names_both_sizes(folder):
    Image.new("RGB", (320, 240)).save(folder / "CAM_BACK.jpg")
    with pytest.raises(ValueError, match=r"CAM_BACK.jpg: the image is 320x240 but the calibration is for 400x225"):
        small_frames.load(folder)


def test_truncated_image_is_named(folder):
    path = folder / "CAM_FRONT.jpg"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"CAM_FRONT.jpg: the image cannot be decoded .* copy it again"):
        small_frames.load(folder)


def test_missing_image_is_named(folder):
    (folder / "CAM_FRONT.jpg").unlink()
    with pytest.raises(ValueError, match=r"CAM_FRONT.jpg: the image does not exist"):
        small_frames.load(folder)
    assert small_frames.load(folder, BLIND).images is None


# --- points ---


def test_point_file_that_is_no_whole_number_of_points_is_rejected(folder):
    path = folder / key_frame.LIDAR_FILE
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"LIDAR_TOP.pcd.bin: \d+ bytes are not a whole number of points .*20 bytes"):
        small_frames.load(folder)


@pytest.mark.parametrize("content, message", [(None, "does not exist"), (b"", "is empty")])
def test_missing_or_empty_point_file_is_named(folder, content, message):
    (folder / key_frame.LIDAR_FILE).unlink()
    if content is not None:
        (folder / key_frame.LIDAR_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"LIDAR_TOP.pcd.bin: the point file {message}"):
        small_frames.load(folder)


def test_nan_points_are_dropped_and_counted(folder):
    clean = small_frames.load(folder)
    raw = np.fromfile(folder / key_frame.LIDAR_FILE, dtype="<f4").reshape(-1, 5)
    broken = np.insert(raw, [0, 7, 7], np.nan, axis=0)
    broken[0, :2] = 1.0  # one NaN column is enough
    broken.tofile(folder / key_frame.LIDAR_FILE)
    kept, bad = points.read(folder / key_frame.LIDAR_FILE)
    assert bad == 3 and len(kept) == len(raw)
    sample = small_frames.load(folder)
    np.testing.assert_array_equal(sample.points, clean.points)
    assert collate([sample, sample], capacities=Capacities())[1]["bad/points"] == 6


def test_no_point_in_range_is_a_valid_counted_sample(folder):
    sample = small_frames.load(folder, dataclasses.replace(SMALL, range=(200, 200, -5, 300, 300, 3)))
    assert len(sample.points) == 0 and len(sample.boxes) == 0
    made, counts = collate([sample], capacities=Capacities(points=100, boxes=4))
    made.validate()
    assert counts["empty/points"] == 1 and counts["empty/boxes"] == 1
    assert not made.points_valid.any() and not made.boxes_valid.any()


# --- frame.json ---


def test_truncated_json_is_named(folder):
    path = folder / "frame.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(ValueError, match=r"frame.json is not valid JSON"):
        small_frames.load(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda info: info.pop("lidar_points"), r"lidar_points is missing"),
        (lambda info: info["images"]["CAM_BACK"].pop("lidar2cam"), r"images.CAM_BACK: lidar2cam is missing"),
        (lambda info: info["images"]["CAM_BACK"].update(cam2img=[[1, 2], [3, 4]]), r"shape \[3, 3\], not \[2, 2\]"),
        (lambda info: info["images"]["CAM_BACK"].update(cam2img=[[1, 2], [3]]), r"must hold numbers in the shape"),
        (lambda info: info["instances"][2].update(bbox_3d=[1, 2, 3]), r"instances\[2\]: bbox_3d must hold numbers"),
        (
            lambda info: info.update(images={}),
            r"has no CAM_FRONT, .* which the reading's Cameras.channels name; it has no",
        ),
    ],
)
def test_wrong_field_is_named(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        small_frames.load(folder)


def test_training_filters_keep_valid_boxes_of_known_classes_strictly_in_range(folder):
    def box(x, label, *, valid=True, yaw=0.0, velocity=(1.0, 2.0)):
        size = [4.0, 2.0, 1.6]
        fields = {"bbox_3d": [x, 0.0, 0.8, *size, yaw], "bbox_label_3d": label, "velocity": list(velocity)}
        return {**fields, "bbox_3d_isvalid": valid}

    car, cone = key_frame.NAMES.index("car"), key_frame.NAMES.index("traffic_cone")
    boxes = [
        box(1.0, cone, yaw=np.pi), box(54.0, car), box(2.0, car, valid=False), box(3.0, -1),
        box(4.0, car, yaw=7.0, velocity=(float("nan"), 3.0)),
    ]  # fmt: skip
    edit(folder, lambda info: info.update(instances=boxes))
    sample = small_frames.load(folder)
    assert [CLASS_NAMES[label] for label in sample.labels] == ["traffic_cone", "car"]
    np.testing.assert_allclose(sample.boxes[:, 0], [1.0, 4.0])
    np.testing.assert_allclose(sample.boxes[:, 2], 0.0, atol=1e-7)  # bottom of a box of 1.6 m around 0.8 m
    np.testing.assert_allclose(sample.boxes[:, 6], [-np.pi, 7.0 - 2 * np.pi], atol=1e-6)
    np.testing.assert_array_equal(sample.boxes[1, 7:], [0.0, 3.0])


def test_frame_without_boxes_is_valid_and_counted(folder):
    edit(folder, lambda info: info.pop("instances"))
    made, counts = collate([small_frames.load(folder)], capacities=Capacities())
    made.validate()
    assert counts["empty/boxes"] == 1 and counts["empty/points"] == 0


# --- batch ---


def test_collate_pads_counts_overflow_and_keeps_the_first(generated):
    sample = small_frames.load(generated)
    room = Capacities(points=1000, boxes=3)
    made, counts = collate([sample, sample], capacities=room)
    made.validate()
    assert counts["overflow/points"] == 2 * (len(sample.points) - 1000)
    assert counts["overflow/boxes"] == 2 * (len(sample.boxes) - 3)
    np.testing.assert_array_equal(made.points[1], sample.points[:1000])
    np.testing.assert_array_equal(made.labels[1], sample.labels[:3])

    made, counts = collate([sample], capacities=Capacities())
    assert counts["overflow/points"] == counts["overflow/boxes"] == 0
    assert made.points_valid.sum() == len(sample.points) and made.boxes_valid.sum() == len(sample.boxes)
    assert made.images.shape == (1, 1, 6, 64, 176, 3) and made.images.dtype == torch.uint8


def frustum(b: Batch) -> np.ndarray:
    """The golden's frustum points in the augmented lidar frame, [B,N,D,H,W,3]."""
    return torch.stack(
        torch.broadcast_tensors(
            *geometry.frustum_in_base(
                geometry.frustum((256, 704), (32, 88), (1.0, 60.0, 0.5), torch.device("cpu")),
                image_aug=b.image_aug[:, 0], undo_image_aug=b.undo_image_aug[:, 0],
                base_from_pixel=b.base_from_pixel[:, 0], base_from_camera=b.base_from_camera[:, 0], base_aug=b.base_aug,
            )
        ), dim=-1,
    ).numpy()  # fmt: skip


@needs_shared
def test_host_inverses_reproduce_the_golden_frustum_bit_for_bit():
    case = SHARED / "goldens/bevfusion_lidar_cam"
    inputs, outputs = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    sample = small_frames.load(SHARED / "nuscenes_frame", PUBLISHED)
    made, _ = collate([sample], capacities=Capacities())
    stored = np.s_[:, :, ::8, ::4, ::8]
    np.testing.assert_array_equal(frustum(made)[stored], outputs["eval/vt/geometry"])
    augmented = {"image_aug": inputs["aug/img_aug_matrix"][None], "base_aug": inputs["aug/lidar_aug_matrix"]}
    made, _ = collate([dataclasses.replace(sample, **augmented)], capacities=Capacities())
    np.testing.assert_array_equal(frustum(made)[stored], outputs["aug/vt/geometry"])


def test_lidar_only_batch_has_no_camera_fields(generated):
    made, _ = collate([small_frames.load(generated, BLIND)], capacities=Capacities())
    made.validate()
    assert made.images is None and made.image_from_base is None and made.base_from_pixel is None


def test_collate_rejects_samples_that_do_not_fit_together(generated):
    with_cameras = small_frames.load(generated)
    without = small_frames.load(generated, BLIND)
    smaller = small_frames.load(
        generated, dataclasses.replace(SMALL, cameras=dataclasses.replace(SMALL.cameras, image_size=(32, 88)))
    )
    with pytest.raises(ValueError, match="no samples"):
        collate([], capacities=Capacities())
    with pytest.raises(ValueError, match="with and without images"):
        collate([with_cameras, without], capacities=Capacities())
    with pytest.raises(ValueError, match=r"images differ in shape, .*32, 88"):
        collate([with_cameras, smaller], capacities=Capacities())


@pytest.mark.parametrize(
    "field, change, message",
    [
        ("points", lambda x: x[..., :4], r"Batch.points has shape .* must be \[B P 5\]"),
        ("labels", lambda x: x.int(), r"Batch.labels is torch.int32 but must be torch.int64"),
        ("points_valid", lambda x: x[:, 1:], r"Batch.points_valid has shape .* \(here B 1, P 40000\)"),
        ("points", lambda x: x * float("nan"), r"Batch.points has NaN"),
        ("points", lambda x: x + 1.0, r"Batch.points is not zero where it is not valid"),
        ("labels", lambda x: -x, r"Batch.labels has -\d"),
        ("boxes", lambda x: -x, r"length, width or height that must be from 0\.001 to 1000 m"),
        ("points", lambda x: x * 1e6, r"Batch.points has positions that must be from -10000 to 10000 m"),
        ("intrinsics", lambda x: x.transpose(-1, -2), r"Batch.intrinsics has a matrix that must be focal lengths"),
        (
            "base_from_camera",
            lambda x: -x,
            r"Batch.base_from_camera has a matrix that must be a rotation, not mirrored",
        ),
        ("undo_image_aug", lambda x: x * 1.01, r"undo_image_aug is not the inverse of image_aug"),
        ("intrinsics", lambda x: None, r"camera fields but intrinsics is None"),
    ],
)
def test_validate_names_the_field(generated, field, change, message):
    made, _ = collate([small_frames.load(generated)], capacities=Capacities())
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(made, **{field: change(getattr(made, field))}).validate()


def test_batch_is_a_pytree_that_compiles_as_one_graph(generated):
    made, _ = collate([small_frames.load(generated)], capacities=Capacities())
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(made)[0]]
    assert (
        ".points" in paths and len(paths) == len(dataclasses.fields(Batch)) - 3
    )  # no depth, no tables, and the base is structure

    def count(b: Batch) -> torch.Tensor:
        return b.points_valid.sum() + b.boxes_valid.sum()

    compiled = torch.compile(count, backend="eager", fullgraph=True)
    assert compiled(made) == count(made)
    moved = made.to("meta")
    assert moved.images.device.type == "meta" and made.images.device.type == "cpu"


# --- the generated frame ---


def test_generated_frame_is_deterministic_and_has_every_class(generated, tmp_path):
    again = key_frame.write_frame(tmp_path / "again", seed=1, image_size=(225, 400))
    other = key_frame.write_frame(tmp_path / "other", seed=2, image_size=(225, 400))
    for name in sorted(os.listdir(generated)):
        assert (again / name).read_bytes() == (generated / name).read_bytes(), name
    assert (other / key_frame.LIDAR_FILE).read_bytes() != (generated / key_frame.LIDAR_FILE).read_bytes()
    world = key_frame.place(np.random.default_rng(1))
    assert {key_frame.NAMES[label] for label in world.labels} == set(CLASS_NAMES)


def test_generated_points_lie_on_surfaces_and_never_behind_one():
    rng = np.random.default_rng(3)
    world = key_frame.place(rng)
    cloud, hit = key_frame.scan(world, rng)
    cos, sin = np.cos(world.boxes[:, 6]), np.sin(world.boxes[:, 6])
    offset = cloud[:, None, :3] - world.boxes[:, :3] - world.boxes[:, 3:6] * [0, 0, 0.5]  # P G 3
    local = np.stack(
        [cos * offset[..., 0] + sin * offset[..., 1], cos * offset[..., 1] - sin * offset[..., 0], offset[..., 2]],
        axis=-1,
    )
    outside = (np.abs(local) - world.boxes[:, 3:6] / 2).max(axis=-1)  # P G, m; 0 on the surface
    tolerance = 6 * key_frame.RANGE_NOISE
    assert np.abs(outside[np.arange(len(hit)), hit][hit >= 0]).max() < tolerance
    assert outside.min() > -tolerance  # no ray enters a box
    assert np.abs(cloud[hit < 0, 2] + key_frame.LIDAR_HEIGHT).max() < tolerance
    assert (hit >= 0).sum() > 1000


def test_generated_lidar_points_project_onto_the_painted_boxes(generated):
    """Lidar and cameras stand apart, so a few points that the lidar sees are hidden from the camera."""
    info = json.loads((generated / "frame.json").read_text())["data_list"][0]
    world = key_frame.place(np.random.default_rng(1))
    raw, _ = points.read(generated / key_frame.LIDAR_FILE)
    rng = np.random.default_rng(1)
    cloud, hit = key_frame.scan(key_frame.place(rng), rng)
    np.testing.assert_array_equal(raw, cloud)
    assert [i["num_lidar_pts"] for i in info["instances"]] == np.bincount(
        hit[hit >= 0], minlength=len(world.boxes)
    ).tolist()
    wanted = np.array([key_frame.CLASSES[name][3] for name in key_frame.NAMES], dtype=np.float64)[world.labels]  # G 3
    agree = []
    for name, camera in info["images"].items():
        picture = np.asarray(Image.open(generated / f"{name}.jpg"), dtype=np.float64)
        seen = (
            cloud[:, :3] @ np.array(camera["lidar2cam"])[:3, :3].T + np.array(camera["lidar2cam"])[:3, 3]
        ) @ np.array(camera["cam2img"]).T
        pixel = np.floor(seen[:, :2] / seen[:, 2:])
        inside = (seen[:, 2] > 1) & (pixel >= 1).all(axis=1) & (pixel < [399, 224]).all(axis=1) & (hit >= 0)
        u, v = pixel[inside].astype(int).T
        found, expected = picture[v, u] + 1.0, wanted[hit[inside]]
        cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        agree.append(cosine > 0.95)  # shading scales a colour, so its direction stays; grey ground is below 0.9
    agree = np.concatenate(agree)
    assert len(agree) > 1000 and agree.mean() > 0.93


def test_failed_write_leaves_no_frame_and_no_half_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        key_frame.write_frame(tmp_path, image_size=(90, 160))
    assert os.listdir(tmp_path) == []
