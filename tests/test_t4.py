"""T4 data sets: the reader's own sample, and sets of another's writer, come out as they were put in; what is wrong is named."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bevfn.data import batch, cameras, depth, points, scene, source, sweeps, t4, t4_check, t4_folders
from bevfn.data.index import Index, join, pack
from bevfn.data.reading import Cameras, Points, Reading
from bevfn.data.t4_classes import CLASSES, Rules

SHARED = Path(__file__).parents[1].parent / "shared/t4dataset"
SAMPLE = SHARED / "sample"
sample = pytest.mark.skipif(not SAMPLE.is_dir(), reason="../shared (t4-devkit's sample) is not here")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(root of two scenes, what the first was made of); nobody changes it."""
    pytest.importorskip("autoware_carla_scenario_t4", reason="the test extra's T4 writer is not installed")
    import small_t4

    root = tmp_path_factory.mktemp("t4") / "data"
    truth = small_t4.write(root / "db_a_v1" / "id-one" / "0", seed=1, unseen=(("CAM_FRONT", 2),))
    small_t4.write(root / "db_a_v1" / "id-two" / "0", seed=2, lidar="LIDAR_TOP", cameras={})
    return root, truth


@pytest.fixture
def world(made, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(made[0], tmp_path / "data", ignore=shutil.ignore_patterns(".bevfn")))


def change(root: Path, table: str, edit: Callable[[list[dict]], object], name: str = "id-one") -> None:
    """Edits a table of a scene in place."""
    (path,) = root.glob(f"**/{name}/0/annotation/{table}.json")
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def of(root: Path, scene_name: str = "id-one", **options) -> Index:
    """The index of one scene."""
    return t4.index(next(root.glob(f"**/{scene_name}")), **options)


def test_it_is_read_without_nuscenes_devkit(world, monkeypatch):
    """Which nuScenes roots and scores alone are in need of."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "nuscenes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nuscenes", None)  # importing it fails
    assert of(world)[0].boxes.shape[1] == 9


# --- the sample of t4-devkit ---


@sample
def test_the_sample_is_what_t4_devkit_reads(tmp_path):
    told = json.loads((SHARED / "sample_expected.json").read_text())
    found, problems = t4.read_tables(SAMPLE)
    assert not problems and {name: told["tables"][name] for name in found} == {n: len(r) for n, r in found.items()}
    opened = t4.index(SAMPLE, cache=tmp_path)
    assert len(opened) == len(told["samples"])
    for frame, want in zip(opened, told["samples"]):
        assert frame.token == want["token"] and frame.timestamp == pytest.approx(1e-6 * want["timestamp"])
        assert (
            list(frame.annotations) == want["ann_3ds"]
            and [s.lag for s in frame.sweeps] == [1.0, 2.0][: len(frame.sweeps)]
        )
        boxes = want["sensor_data"]["LIDAR_TOP"]["boxes_in_sensor"]
        assert frame.categories == tuple(b["label"] for b in boxes)
        assert frame.visibility == tuple(b["visibility"] for b in boxes)
        assert frame.attributes == tuple(", ".join(b["attributes"]) for b in boxes)
        np.testing.assert_array_equal(frame.num_lidar_points, [b["num_points"] for b in boxes])
        for box, b in zip(frame.boxes, boxes):
            yaw = Rotation.from_quat(np.roll(b["rotation_wxyz"], -1)).as_euler("ZYX")[0]
            size = np.array(b["size_wlh"])[[1, 0, 2]]
            np.testing.assert_allclose(box[:7], [*b["position"], *size, yaw], atol=1e-9)
            np.testing.assert_allclose(box[7:], np.array(b["velocity"][:2], dtype=float), atol=1e-9)
        for channel in ("CAM_FRONT", "CAM_BACK"):
            camera, seen = frame.cameras[channel], want["sensor_data"][channel]
            np.testing.assert_array_equal(camera.intrinsics, seen["camera_intrinsic"])
            assert camera.size == (600, 800)
            there = frame.boxes[:, :3] @ camera.camera_from_lidar[:3, :3].T + camera.camera_from_lidar[:3, 3]
            np.testing.assert_allclose(
                there, np.reshape([b["position"] for b in seen["boxes_in_sensor"]], (-1, 3)), atol=1e-9
            )


@sample
def test_the_sample_opens_as_it_is_and_is_both_splits(tmp_path):
    root = Path(shutil.copytree(SAMPLE, tmp_path / "sample"))
    assert source.kind(root) == "t4"
    opened = source.open(root)
    assert opened.training is opened.evaluation and opened.training.split == "all" and len(opened.training) == 3
    assert opened.training.class_names == CLASSES and opened.training.judge == "t4"
    cloud, bad = points.read(root / opened.training[0].lidar_path)
    assert cloud.shape[1] == 5 and len(cloud) == 8 - bad and bad > 0  # rows of 5, as 10 rows of 4 were written


# --- data sets of another's writer ---


@pytest.mark.parametrize("seed, lidar", [(3, "LIDAR_CONCAT"), (4, "LIDAR_TOP")])
def test_what_was_put_in_comes_out(made, tmp_path, seed, lidar):
    import small_t4

    truth = small_t4.write(tmp_path / "d", seed=seed, lidar=lidar, categories=("car", "pedestrian", "vehicle.fire"))
    index = t4.index(tmp_path / "d")
    assert len(index) == 3 and index.has("lidar") and index.has("ego poses") and index.has("velocity")
    mount = truth.mounts[lidar]
    for k, frame in enumerate(index):
        assert frame.timestamp == pytest.approx(1e-6 * (small_t4.START + k * small_t4.STEP))
        np.testing.assert_allclose(frame.global_from_ego, truth.poses[k], atol=1e-9)
        np.testing.assert_allclose(frame.ego_from_lidar, mount, atol=1e-9)
        cloud, bad = points.read(index.root / frame.lidar_path)
        np.testing.assert_array_equal(cloud[:, :4], truth.clouds[k])
        assert bad == 0 and (cloud[:, 4] == -1).all()
        for box, name, b in zip(frame.boxes, frame.names, truth.boxes[k], strict=True):
            global_from_lidar = truth.poses[k] @ mount
            lidar_from_global = np.linalg.inv(global_from_lidar)
            centre = lidar_from_global @ np.append(b["translation"], 1)
            np.testing.assert_allclose(box[:3], centre[:3], atol=1e-6)
            np.testing.assert_allclose(box[3:6], np.array(b["size"])[[1, 0, 2]], rtol=1e-6)
            velocity = lidar_from_global[:3, :3] @ b["velocity"]
            np.testing.assert_allclose(box[7:], velocity[:2], atol=1e-6)
            turn = lidar_from_global[:3, :3] @ Rotation.from_quat(np.roll(b["rotation"], -1)).as_matrix()
            ahead = Rotation.from_euler("Z", box[6]).as_matrix()[:, 0]
            assert ahead[:2] @ turn[:2, 0] > 0.97  # but for the tilt
            assert name == {"vehicle.fire": "truck"}.get(b["category"], b["category"])
        assert frame.num_lidar_points.min() >= 9 and frame.valid.all()
        for channel, ((height, width), _) in small_t4.CAMERAS.items():
            camera = frame.cameras[channel]
            assert camera.size == (height, width) and camera.timestamp == frame.timestamp
            np.testing.assert_allclose(camera.intrinsics, truth.intrinsics[channel])
            np.testing.assert_allclose(camera.ego_from_camera, truth.mounts[channel], atol=1e-9)
            there = np.linalg.inv(truth.mounts[channel]) @ mount
            np.testing.assert_allclose(camera.camera_from_lidar, there, atol=1e-8)


def test_sweeps_lie_where_they_were_seen(made):
    root, truth = made
    index = of(root)
    frame = index[2]
    np.testing.assert_allclose([sweep.lag for sweep in frame.sweeps], [0.1, 0.2])
    for sweep, k in zip(frame.sweeps, (1, 0)):
        np.testing.assert_allclose(truth.poses[2] @ sweep.lidar_from_sweep, truth.poses[k], atol=1e-7)
    clouds, bad = sweeps.scans(frame, index.root, count=1)
    assert bad == 0 and [set(np.unique(cloud[:, 4].round(6))) for cloud in clouds] == [{0.0}, {np.float32(0.1)}]


def test_a_batch_of_any_cameras_is_read_and_depth_is_prepared_by_path(made, tmp_path):
    import small_t4

    root = tmp_path / "data"
    small_t4.write(root / "a" / "0", seed=5)
    small_t4.write(root / "b" / "0", seed=6)
    index = t4.index(root)
    assert index.channels == tuple(small_t4.CAMERAS) and len(index) == 6
    reading = Reading(
        points=Points(sweeps=1),
        cameras=Cameras(channels=tuple(small_t4.CAMERAS), image_size=(32, 48)),
        depth=True,
        class_names=CLASSES,
    )
    source.check(index, reading, train=True)
    samples = [scene.load(index, place, reading) for place in range(6)]
    made_batch, _ = batch.collate(samples, capacities=batch.Capacities(points=600, boxes=8))
    made_batch.validate()
    assert made_batch.images.shape == (6, 1, 3, 32, 48, 3) and bool(made_batch.boxes_valid.any())
    files = depth.build(index, depth.folder(index), progress=False)
    assert len(list(files.rglob("00000.jpg.bin"))) == 6  # two scenes, three cameras
    for place, read in enumerate(samples):
        np.testing.assert_array_equal(scene.load(index, place, reading).depth, read.depth)


def test_scenes_of_one_name_stay_apart_in_time(made, tmp_path):
    """Two cars that drive at the same time: history is of the car's own scene."""
    import small_t4

    root = tmp_path / "data"
    for name in ("a", "b"):
        small_t4.write(root / "db" / name / "0", seed=9, name=name, frames=2)
        change(root, "scene", lambda rows: rows[0].update(name="tour"), name)
    index = t4.index(root)
    assert [frame.scene for frame in index] == ["db/a", "db/a", "db/b", "db/b"]
    for place, frame in enumerate(index):
        seen = cameras.key_frames(index, place, 3, "time")
        assert {one.scene for one in seen} == {frame.scene}
    (note,) = [one for one in t4_check.check(root).findings if "scene.json" in one.what]
    assert (
        note.what == "2 scenes have names of others in scene.json, such as 'tour' of db/a, db/b" and note.kind == "note"
    )


def test_scenes_that_share_tokens_stay_apart(made, tmp_path):
    """Writers make tokens of the scene's name: of one name, they are the same ones."""
    import small_t4

    root = tmp_path / "data"
    small_t4.write(root / "db_a" / "a" / "0", seed=9, name="tour", frames=2)
    alone = t4.index(root)
    shutil.copytree(root / "db_a" / "a", root / "db_b" / "b")
    index = t4.index(root)
    assert [frame.token for frame in index] == [f"db_{s}/{s}/{frame.token}" for s in "ab" for frame in alone]
    assert [frame.previous for frame in index] == ["", index[0].token, "", index[2].token]
    assert [one.token for one in cameras.key_frames(index, 3, 2)] == [index[3].token, index[2].token]
    assert t4_check.check(root).good


# --- velocities ---


def test_velocities_that_are_not_told_are_measured(made, tmp_path):
    import small_t4

    def index(name: str, step: int, frames: int = 3) -> Index:
        small_t4.write(tmp_path / name, seed=7, velocities=False, step=step, frames=frames, categories=("car",))
        return t4.index(tmp_path / name)

    near = index("near", 100_000)
    assert near.has("velocity")
    moved = [frame.global_from_lidar @ np.append(frame.boxes[0, :3], 1) for frame in near]
    for k, (first, last) in enumerate(((0, 1), (0, 2), (1, 2))):
        want = (moved[last] - moved[first])[:3] / (0.1 * (last - first))
        turned = near[k].global_from_lidar[:3, :3].T @ want
        np.testing.assert_allclose(near[k].boxes[0, 7:], turned[:2], atol=1e-5)
    apart = index("apart", 1_500_000)  # within 1.5 s, and 3 s over both
    assert [bool(np.isfinite(f.boxes[0, 7])) for f in apart] == [True, True, True]
    far = index("far", 1_500_001)
    assert not any(np.isfinite(f.boxes[0, 7]) for f in far) and not far.has("velocity")
    once = index("once", 100_000, frames=1)
    with pytest.raises(ValueError, match=r"has no velocities of objects, but the model learns them"):
        source.check(once, Reading(points=Points(), class_names=CLASSES), train=True)


def test_fast_velocities_are_shortened(world):
    change(world, "sample_annotation", lambda content: content[0].update(velocity=[300.0, 400.0, 0.0]))
    index = of(world)
    speed = max(float(np.hypot(*box[7:])) for frame in index for box in frame.boxes)
    assert speed == pytest.approx(50.0)


# --- rules ---


def test_trailers_join_trucks_and_bicycles_without_riders_are_no_objects(made, tmp_path):
    from autoware_carla_scenario_t4 import T4Writer

    writer = T4Writer(tmp_path / "d", scene_name="x")
    writer.add_sensor("LIDAR_CONCAT", "lidar", (0, 0, 0), (1, 0, 0, 0))
    writer.begin_frame(1_700_000_000_000_000, (0, 0, 0), (1, 0, 0, 0))
    objects = [
        ("semi_trailer", (11.5, 0, 2), (2.5, 11, 4), ("vehicle_state.moving",)),
        ("bicycle", (0, 10, 1), (0.6, 1.8, 1.2), ("cycle_state.without_rider", "occlusion_state.none")),
        ("vehicle.truck", (20, 0, 1.5), (2.5, 6, 3), ()),
        ("trailer", (-30, 0, 2), (2.5, 11, 4), ()),
        ("bicycle", (0, -10, 1), (0.6, 1.8, 1.2), ("cycle_state.with_rider",)),
    ]
    for i, (category, centre, size, attributes) in enumerate(objects):
        velocity = (5.0, float(i), 0.0)
        writer.add_annotation(i, category, centre, size, (1, 0, 0, 0), velocity=velocity, attributes=attributes)
    at = np.array([centre for _, centre, _, _ in objects if centre[0] > -30], dtype=np.float32)
    writer.add_lidar("LIDAR_CONCAT", np.column_stack([at, np.full(len(at), 50)]).astype(np.float32))
    writer.end_frame()
    writer.finish()
    (frame,) = t4.index(tmp_path / "d")
    assert frame.names == ("truck", "", "", "bicycle")
    assert frame.categories == ("truck", "bicycle", "trailer", "bicycle")
    np.testing.assert_allclose(frame.boxes[0], [14.5, 0, 1.5, 17, 2.5, 4.5, 0, 5, 1], atol=1e-6)
    np.testing.assert_array_equal(frame.num_lidar_points, [2, 1, 0, 1])
    np.testing.assert_array_equal(frame.valid, [True, True, False, True])
    assert frame.attributes[0] == "vehicle_state.moving"
    own = t4.index(tmp_path / "d", rules=Rules(classes=("bicycle", "trailer"), merged=()))  # another index
    assert own[0].names == ("trailer", "", "", "trailer", "bicycle") and own.class_names == ("bicycle", "trailer")


def test_radar_points_do_not_make_a_box_valid(world):
    change(world, "sample_annotation", lambda content: content[0].update(num_lidar_pts=0, num_radar_pts=9))
    assert [frame.valid.sum() for frame in of(world)] == [3, 4, 4]


# --- folders, revisions, splits ---


def test_scenes_are_found_at_any_depth_and_the_highest_revision_counts(world):
    one = world / "db_a_v1" / "id-one"
    shutil.copytree(one / "0", one / "10")
    shutil.copytree(one / "0", one / "9")
    folders = {scene.name: scene.folder for scene in t4_folders.scenes(world)}
    assert folders == {"db_a_v1/id-one": "db_a_v1/id-one/10", "db_a_v1/id-two": "db_a_v1/id-two/0"}
    assert t4_folders.scenes(one, "9")[0].folder == "9" and t4_folders.scenes(one / "0")[0].folder == ""
    assert t4.index(one, revision="0")[0].lidar_path.startswith("0/data/LIDAR_CONCAT/")
    with pytest.raises(ValueError, match=r"id-two has no revision 9; it has 0: choose one of these as version\."):
        source.open(world, "9", "all", "all")
    (one / "²" / "annotation").mkdir(parents=True)  # a digit to Python, no number
    assert t4_folders.scenes(one)[0].folder == "10"
    old = world / "old"
    shutil.copytree(one / "0", old)  # without revisions
    assert t4_folders.scenes(old) == [t4_folders.Scene("old", "")] and source.kind(old) == "t4"
    assert len(source.open(world / "db_a_v1" / "id-one", "v1.0-trainval").training) == 3


@pytest.mark.parametrize("version", ["1.0", "-1", "²", "٣", "latest", "v2", "T4"])
def test_versions_that_are_no_revisions_are_refused(made, version):
    root = made[0]
    for look in (
        lambda: source.open(root, version, "all", "all"),
        lambda: source.training(root, version, "all"),
        lambda: source.trained_on(root, version, "all", "all"),
        lambda: t4_check.check(root, version),
    ):
        with pytest.raises(
            ValueError, match=f"--version {version} is no revision of a T4 scene, a number such as 2; leave it"
        ):
            look()
    assert t4_folders.revision_of("v1.0-mini") is None and t4_folders.revision_of("01") == "01"


def test_splits_are_awmls_lists_or_splits_json_or_all(world):
    with pytest.raises(
        ValueError, match=r"--train-split and --eval-split what to take of all \(all: every scene, also for"
    ):
        source.open(world, "v1.0-trainval")
    both = source.open(world, "v1.0-trainval", "all", "all")
    assert both.training is both.evaluation and len(both.training) == 6
    text = "version: 1\ndocs: |\n  Amount: 2\n  train: none\ntrain:\n  - id-one/0 # a comment\n\nval:\n  # - gone/0\n- id-two\ntest: []\n"
    (world / "db_a_v1.yaml").write_text(text)
    opened = source.open(world, "v1.0-trainval")
    assert [(i.split, len(i), len(i.channels)) for i in (opened.training, opened.evaluation)] == [
        ("train", 3, 3),
        ("val", 3, 0),
    ]
    assert source.open(world / "db_a_v1.yaml", "").training.root == world  # the list itself
    (world / "splits.json").write_text(
        json.dumps({"mine": ["db_a_v1/id-two/0", "id-one/0/tokyo/taxi"], "val": ["id-one"]})
    )
    assert len(t4.index(world, "mine")) == 6 and len(t4.index(world, "val")) == 6  # lists add up
    assert source.training(world, None, None).split == "train"
    with pytest.raises(ValueError, match=r"no scene of the split 'tets'; .* are all, mine, val, train\."):
        source.open(world, "", "tets", "val")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.yaml", "train:\n  - id-three/0\n", r"a.yaml: train names the scene 'id-three/0', which is not below it"),
        (
            "a.yaml",
            "train:\n  - id-one/4\n",
            r"train names revision 4 of the scene 'id-one', which .*id-one has not; fetch",
        ),
        (
            "a.yaml",
            "train:\n  - id-one/latest\n",
            r"names revision latest of the scene 'id-one', which .*id-one has not",
        ),
        ("a.yaml", "train:\n  - id-one/0x/tokyo/taxi\n", r"names revision 0x of the scene"),
        ("a.yaml", "train:\n  - id-one/../../x\n", r"names the scene 'id-one/../../x', which is not below it"),
        ("a.yaml", "train:\n  - db_a_v1/id-one/3\n", r"names revision 3 of the scene 'db_a_v1/id-one'"),
        ("a.yaml", "docs: none\n", r"a.yaml has no lists of scenes, such as `train:` with a line"),
        ("a.yml", "a b:\n  - id-one/0\n", r"'a b' cannot name a split"),
        ("splits.json", '{"train": "id-one"}', r"splits.json: train must be a list of scenes"),
        ("splits.json", '["id-one"]', r"splits.json holds a list, not a dict; write it again"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(world, name, content, says):
    (world / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        t4.index(world, "train")


def test_two_revisions_of_a_scene_are_not_trained_on_and_scored(world):
    """Converted again, the same drive has other tokens."""
    one = world / "db_a_v1" / "id-one"
    shutil.copytree(one / "0", one / "1")
    tokens = [row["token"] for row in json.loads((one / "1/annotation/sample.json").read_text())]
    for path in (one / "1/annotation").glob("*.json"):
        path.write_text(re.sub("|".join(tokens), lambda token: token[0][::-1], path.read_text()))
    (world / "db_a_v1.yaml").write_text("train:\n  - id-one/0\nval:\n  - id-one/1\n  - id-two/0\n")
    with pytest.raises(
        ValueError, match=r"1 of the 2 scenes of the evaluation split 'val', such as db_a_v1/id-one, are in th"
    ):
        source.open(world)
    (refused,) = [one for one in t4_check.check(world).findings if one.kind == "refused"]
    assert "the splits train and val share 1 scenes, such as db_a_v1/id-one" in refused.what


def test_scenes_that_were_trained_on_are_told(world):
    lists = world / "db_a_v1.yaml"
    lists.write_text("train:\n  - id-one/0\nval:\n  - id-two/0\nmine:\n  - id-one/0\n  - id-two/0\n")
    for root in (world, lists):
        told = [source.trained_on(root, source.VERSION, None, split) for split in ("train", "val", "mine", "all")]
        assert [" ".join(sentence.split()[:4]) for sentence in told] == ["1 of the 1", "", "1 of the 2", "1 of the 2"]
    assert source.trained_on(world, source.VERSION, "val", "mine").startswith(
        "1 of the 2 scenes of split 'mine' were trained"
    )
    assert source.trained_on(world / "db_a_v1/id-one", source.VERSION, None, "all").startswith("1 of the 1 scenes")


def test_lists_name_any_revision_by_folder_but_none_where_there_are_none(world):
    one = world / "db_a_v1" / "id-one"
    shutil.copytree(one / "0", one / "3")
    shutil.copytree(one / "0", world / "old")
    lists = world / "splits.json"
    for entry, folder in (("db_a_v1/id-one/0", "db_a_v1/id-one/0"), ("id-one/3", "db_a_v1/id-one/3"), ("old", "old")):
        lists.write_text(json.dumps({"mine": [entry]}))
        assert [scene.folder for scene in t4_folders.chosen(world, "mine")] == [folder]
    lists.write_text(json.dumps({"mine": ["old/7"]}))
    with pytest.raises(
        ValueError, match=r"mine names revision 7 of the scene 'old', which .*/old has not; fetch it, or"
    ):
        t4_folders.chosen(world, "mine")


def test_other_roots_are_no_t4(root, tmp_path):
    assert source.kind(root) == "nuscenes" and source.kind(tmp_path) == "nuscenes" and source.kind(None) == "synthetic"
    with pytest.raises(ValueError, match=r"has no T4 scene: no folder annotation/ in it, or in folders below it"):
        t4.index(tmp_path / "nowhere")
    (tmp_path / "old" / "data" / "LIDAR_CONCAT").mkdir(parents=True)  # tables of another version's name
    with pytest.raises(ValueError, match=r"old has no T4 scene: no folder annotation/ in it"):
        source.open(tmp_path / "old", "v1.0-trainval")
    with pytest.raises(
        ValueError, match=r"is a T4 data set, but this recipe is trained on nuScenes roots and single key frames; T4"
    ):
        source.of_kind({"nuscenes": 1, "frame": 2}, tmp_path)
    with pytest.raises(
        ValueError, match=r"is no T4 data set: neither it nor .* but this recipe is trained on T4 data sets"
    ):
        source.of_kind({"t4": 1}, root)


# --- the stored index ---


def test_an_index_is_built_once_and_again_when_a_table_or_a_rule_changes(world, monkeypatch):
    first = t4.index(world, "all")
    real, built = t4._build, []
    monkeypatch.setattr(t4, "_build", lambda *given: built.append(given) or real(*given))
    again = t4.index(world, "all")
    assert not built and t4.has_index(world, "all")
    for a, b in zip(first, again, strict=True):
        assert (a.token, a.names, list(a.cameras)) == (b.token, b.names, list(b.cameras))
        np.testing.assert_array_equal(a.boxes, b.boxes)
    change(world, "instance", lambda content: content[0].update(instance_name="renamed"))
    assert not t4.has_index(world, "all")
    t4.index(world, "all")
    t4.index(world, "all", rules=Rules(merged=()))
    assert len(built) == 2


def test_several_processes_build_the_same(world):
    one, two = (t4.frames(world, keep=False, workers=workers) for workers in (1, 2))
    assert one.columns.keys() == two.columns.keys()
    for name, column in one.columns.items():
        np.testing.assert_array_equal(two.columns[name], column)
    parts = [pack([frame]) for frame in one]
    for name, column in join(parts).columns.items():
        np.testing.assert_array_equal(column, one.columns[name], name)
        assert column.dtype == one.columns[name].dtype


# --- bad input ---


def test_a_map_that_is_not_there_is_told_and_not_needed(world):
    change(world, "map", lambda content: content[0].update(filename="map/lanelet2_map.osm"))
    shutil.rmtree(world / "db_a_v1/id-one/0/map")
    with pytest.warns(
        UserWarning, match=r"0/map/lanelet2_map.osm does not exist, which map.json names \(1 such\); detection"
    ):
        assert len(of(world)) == 3


@pytest.mark.parametrize("table", t4.SCHEMA.tables)
def test_a_missing_table_is_named(world, table):
    (world / f"db_a_v1/id-one/0/annotation/{table}.json").unlink()
    with pytest.raises(
        ValueError, match=rf"/annotation/{table}.json does not exist; the tables are incomplete or of another v"
    ):
        t4.index(world, "all")


def test_a_camera_that_some_frames_lack_is_named_and_can_be_left_out(made):
    index = of(made[0])
    assert "CAM_FRONT" not in index[2].cameras and index.lacking("CAM_FRONT") == 1
    reading = Reading(cameras=Cameras(channels=("CAM_FRONT",), image_size=(16, 24)), class_names=CLASSES)
    with pytest.raises(ValueError, match=r"has no image of CAM_FRONT at 1 of its 3 key frames; .* --on-damaged skip"):
        source.check(index, reading, train=True)
    kept, sentences = scene.whole(index, np.arange(3), reading)
    assert kept.tolist() == [0, 1] and "has no CAM_FRONT" in sentences[0]


def test_recordings_that_are_not_valid_are_missing(world):
    def spoil(content: list[dict]) -> None:
        for row in content:
            row["is_valid"] = row["filename"] not in ("data/CAM_BACK_WIDE/00001.jpg", "data/LIDAR_CONCAT/00000.pcd.bin")

    change(world, "sample_data", spoil)
    with pytest.warns(UserWarning, match=r"1 key frames are left out, which have no scan of LIDAR_TOP or LIDAR_CONCAT"):
        first, second = of(world)
    assert "CAM_BACK_WIDE" not in first.cameras and first.sweeps == () and len(second.sweeps) == 1


def test_rows_that_are_not_valid_in_a_circle_are_one_sentence(world):
    def circle(content: list[dict]) -> None:
        first, second = (
            row for row in content if "LIDAR" in row["filename"] and not row["filename"].endswith("2.pcd.bin")
        )
        for row, other in ((first, second), (second, first)):
            row.update(is_valid=False, prev=other["token"])

    change(world, "sample_data", circle)
    with pytest.raises(
        ValueError, match=r"id-one/0: row .* of sample_data.json has its `prev` in another sensor or time\."
    ):
        of(world)


def test_unknown_categories_are_left_out_and_refused_where_there_is_no_other(world):
    change(world, "category", lambda content: content[0].update(name="hover.board"))
    with pytest.warns(
        UserWarning, match=r"3 of 12 annotations are left out, since their categories are none of AWML's \(hover.b"
    ):
        index = of(world)
    assert index[0].names[0] == "" and index[0].categories[0] == "hover.board" and len(index[0].boxes) == 4
    change(world, "category", lambda content: [row.update(name=row["name"].upper()) for row in content])
    with pytest.raises(
        ValueError, match=r"its categories \(HOVER.BOARD, .*\) are none of AWML's, so no object could be learned"
    ):
        of(world)


def forget(field: str) -> Callable[[list[dict]], object]:
    return lambda content: [row.pop(field) for row in content]


@pytest.mark.parametrize(
    ("table", "edit", "says"),
    [
        ("sample", forget("timestamp"), r"sample.json: timestamp of 3 of 3 rows is no number .* of another version of the T4"),
        ("sample_data", forget("is_key_frame"), r"sample_data.json: is_key_frame of 11 of 11 rows is no true or false"),
        ("instance", forget("category_token"), r"instance.json: category_token of 4 of 4 rows names no row of category.json"),
        ("sample_annotation", forget("rotation"), r"id-one/0: sample_annotation .* has no rotation of 4 numbers\."),
        ("sample_annotation", forget("num_lidar_pts"), r"has no num_lidar_pts of number"),
        ("sample_annotation", lambda c: c[3].update(velocity=[1.0, 2.0]), r"has no velocity of 3 numbers"),
        ("sample_annotation", lambda c: c[3].update(velocity=["1", "2", "3"]), r"sample_annotation .* has no velocity of 3 numbers"),
        ("sample_annotation", lambda c: c[3].update(velocity=[None] * 3), r"sample_annotation .* has no velocity of 3 numbers"),
        ("sample_annotation", lambda c: c[3].update(velocity=[1e30, 0, 0]), r"annotation .* has the velocity 1e\+30 0 0, which must"),
        ("sample_data", lambda c: c[3].update(is_valid="false"), r"is_valid of a row is no true or false \(the first is of .*, false"),
        ("sample_data", lambda c: c[3].update(is_valid=0), r"is_valid of a row is no true or false \(the first is of .*, 0\); the"),
        ("ego_pose", lambda c: c[1].update(translation=["1", "2", "3"]), r"has no translation of 3 numbers"),
        ("sample_annotation", lambda c: c[3].update(prev=c[3]["token"]), r"has a `prev` that is itself"),
        ("sample_annotation", lambda c: c[3].update(size=[0.0, 4.0, 1.5]), r"box 3 \(annotation .*\), has sizes 4 0 1.5, which"),
        ("scene", lambda c: c.append(c[0] | {"token": "two"}), r"scene.json has 2 rows, where T4 has one scene a folder"),
        ("calibrated_sensor", lambda c: c[1].update(camera_intrinsic=[]), r"has no camera_intrinsic of 3 x 3 numbers"),
        ("ego_pose", lambda c: c[1].update(rotation=[1, 1, 0, 0]), r"has a rotation that is no quaternion of length 1"),
        ("sensor", lambda c: c[0].update(channel="LIDAR_FRONT"), r"has no key frame with a scan of LIDAR_TOP or LIDAR_CONCAT"),
        ("sample_data", lambda c: c[-1].update(filename="../../x.bin"), r"which is not below the data set's root"),
        ("sample_data", lambda c: c[3].update(prev=c[1]["token"]), r"of sample_data.json has its `prev` in another sensor or ti"),
    ],
)  # fmt: skip
def test_broken_tables_are_one_sentence(world, table, edit, says):
    change(world, table, edit)
    with pytest.raises(ValueError, match=says) as error, pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        of(world)
    assert "\n" not in str(error.value)


def test_clouds_of_other_fields_are_refused(world):
    def describe(columns: int) -> None:
        folder = world / "db_a_v1/id-one/0"
        (folder / "data/LIDAR_CONCAT_INFO").mkdir(exist_ok=True)
        (folder / "data/LIDAR_CONCAT_INFO/00000.json").write_text(json.dumps({"num_pts_feats": columns, "sources": []}))

    def point(content: list[dict]) -> None:
        for row in content:
            row["info_filename"] = "data/LIDAR_CONCAT_INFO/00000.json" if "LIDAR" in row["filename"] else None

    change(world, "sample_data", point)
    with pytest.raises(ValueError, match=r"LIDAR_CONCAT_INFO/00000.json, which describes a point file, cannot be read"):
        of(world)
    describe(4)
    with pytest.raises(ValueError, match=r"says that points have 4 numbers; write 5 \(x, y, z, intensity, ring\)\."):
        of(world)
    describe(5)
    index = of(world)
    path = index.root / index[0].lidar_path
    cloud = np.random.default_rng(0).normal([0, 0, 0, 100], 20, (1000, 4))
    path.write_bytes(cloud.astype("<f4").tobytes())
    with pytest.raises(ValueError, match=r"00000.pcd.bin: .* which fits four float32 a point; write"):
        scene.load(index, 0, Reading(points=Points(sweeps=0), class_names=CLASSES))


@pytest.mark.parametrize(
    "name, says",
    [
        ("/dev/zero", r"/dev/zero, an info_filename of sample_data.json, is not below the scene's folder\."),
        ("../../../../etc/passwd", r"passwd, an info_filename of sample_data.json, is not below the scene's folder\."),
        (7, r"7, an info_filename of sample_data.json, is not below"),
        ("data/pipe", r"data/pipe, which describes a point file, cannot be read \(there is no such file\)\."),
        ("data", r"data, which describes a point file, cannot be read \(there is no such file\)\."),
        ("data/list.json", r"cannot be read \(it holds a list, not a dict\)\."),
        ("data/large.json", r"cannot be read \(1,048,577 bytes, more than 1,048,576\)\."),
    ],
)
def test_descriptions_of_clouds_are_files_of_the_scene(world, name, says):
    folder = world / "db_a_v1/id-one/0/data"
    os.mkfifo(folder / "pipe")
    (folder / "list.json").write_text("[]")
    (folder / "large.json").write_text(" " * (2**20 + 1))
    change(world, "sample_data", lambda rows: [row.update(info_filename=name) for row in rows])
    with pytest.raises(ValueError, match=says) as error:
        of(world)
    assert "\n" not in str(error.value)
    refused = [finding for finding in t4_check.check(world, deep=True).findings if finding.kind == "refused"]
    assert len(refused) == 1 and re.search(says.removesuffix("\\."), refused[0].what)


def test_intensities_of_simulators_pass(made, tmp_path):
    import small_t4

    small_t4.write(tmp_path / "d", seed=8, intensity=1.0)
    index = t4.index(tmp_path / "d")
    cloud, bad = points.read(index.root / index[0].lidar_path)
    assert bad == 0 and 0 < cloud[:, 3].max() <= 1
