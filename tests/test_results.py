"""Results files: boxes in the global frame as upstream writes them, every key frame once, and refusals in one sentence."""

import dataclasses
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import small_world
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy.spatial.transform import Rotation

from bevfn.data.index import Frame, Index
from bevfn.data.reading import CLASS_NAMES
from bevfn.evaluation import results
from bevfn.evaluation.results import Detections

GOLDENS = Path(__file__).parents[2] / "shared" / "goldens"


def tilted(rng: np.random.Generator, place: list[float]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("ZYX", [rng.uniform(-3, 3), *rng.uniform(-0.05, 0.05, 2)]).as_matrix()
    matrix[:3, 3] = place
    return matrix


def frame(token: str = "a", seed: int = 0) -> Frame:
    rng = np.random.default_rng(seed)
    return Frame(
        token=token, scene="", previous="", timestamp=0.0, lidar_path="", sweeps=(), cameras={}, names=(),
        ego_from_lidar=tilted(rng, [0.9, 0.0, 1.8]), global_from_ego=tilted(rng, [600.0, 1500.0, 0.4]),
        boxes=np.zeros((0, 9)), valid=np.zeros(0, bool), num_lidar_points=np.zeros(0, int), attributes=(),
        visibility=(), annotations=(),
    )  # fmt: skip


def index(*tokens: str) -> Index:
    return Index(Path("nowhere"), "v1.0-test", "test", tuple(frame(token) for token in tokens))


def detections(n: int, seed: int = 0) -> Detections:
    rng = np.random.default_rng(seed)
    boxes = np.c_[
        rng.uniform(-20, 20, (n, 2)), rng.uniform(-2, 0, n), rng.uniform(0.3, 8, (n, 3)), rng.uniform(-3.1, 3.1, n),
        rng.normal(0, 3, (n, 2)),
    ]  # fmt: skip
    return Detections(boxes, rng.permutation(n) / max(1, n), rng.integers(0, 10, n))


def entries(found: Detections, at: Frame, **options) -> list[dict]:
    poses = {"ego_from_boxes": at.ego_from_lidar, "global_from_ego": at.global_from_ego}
    return results.entries(at.token, found, class_names=CLASS_NAMES, **poses, **options)


def one(name: str, vx: float, vy: float = 0.0) -> dict:
    box = np.array([[5.0, 0, -1, 4, 2, 1.5, 0.3, vx, vy]])
    level = dataclasses.replace(frame(), ego_from_lidar=np.eye(4), global_from_ego=np.eye(4))
    return entries(Detections(box, np.array([0.5]), np.array([CLASS_NAMES.index(name)])), level)[0]


@given(st.integers(0, 2**32 - 1), st.integers(0, 20))
def test_there_and_back_is_the_same_box(seed, n):
    found, at = detections(n, seed), frame(seed=seed)
    back = results.to_lidar(entries(found, at, ranges=None), at, CLASS_NAMES)
    order = np.argsort(-found.scores)
    np.testing.assert_allclose(back.boxes, found.boxes[order], atol=1e-9)
    np.testing.assert_array_equal(back.labels, found.labels[order])
    np.testing.assert_array_equal(back.scores, found.scores[order])


def test_an_entry_has_the_middle_width_before_length_and_the_global_velocity():
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("z", 90, degrees=True).as_matrix()
    at = dataclasses.replace(frame(), ego_from_lidar=np.eye(4), global_from_ego=turn)
    found = Detections(np.array([[10.0, 0, -1, 4, 2, 1.5, 0.0, 3, 0]]), np.array([0.5]), np.array([0]))
    (entry,) = entries(found, at)
    np.testing.assert_allclose(entry["translation"], [0, 10, -0.25], atol=1e-12)
    assert entry["size"] == [2, 4, 1.5]
    np.testing.assert_allclose(np.abs(entry["rotation"]), [np.sqrt(0.5), 0, 0, np.sqrt(0.5)], atol=1e-12)
    np.testing.assert_allclose(entry["velocity"], [0, 3], atol=1e-12)


@pytest.mark.parametrize(
    ("name", "stands", "moves"),
    [
        ("car", "vehicle.parked", "vehicle.moving"),
        ("truck", "vehicle.parked", "vehicle.moving"),
        ("trailer", "vehicle.parked", "vehicle.moving"),
        ("construction_vehicle", "vehicle.parked", "vehicle.moving"),
        ("bus", "vehicle.stopped", "vehicle.moving"),
        ("pedestrian", "pedestrian.standing", "pedestrian.moving"),
        ("bicycle", "cycle.without_rider", "cycle.with_rider"),
        ("motorcycle", "cycle.without_rider", "cycle.with_rider"),
        ("barrier", "", ""),
        ("traffic_cone", "", ""),
    ],
)
def test_attributes_follow_from_class_and_speed(name, stands, moves):
    assert one(name, 0.14, 0.14)["attribute_name"] == stands  # 0.198 m/s
    assert one(name, 0.15, 0.15)["attribute_name"] == moves  # 0.212 m/s


@pytest.mark.parametrize("case", ["bevdepth_r50_2key", "matrixvt_r50"])
def test_entries_are_those_of_upstream(case):
    """BEVDepth's formatter: boxes in the ego frame, no range filter, order as decoded."""
    folder = GOLDENS / case
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    ((token, expected),) = json.loads((folder / "results_nusc_every4th.json").read_text())["results"].items()
    boxes = outputs["eval/boxes"][::4].astype(np.float64)
    boxes[:, 2] -= 0.5 * boxes[:, 5]
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_quat(np.roll(inputs["ego2global_rotation"], -1)).as_matrix()
    pose[:3, 3] = inputs["ego2global_translation"]
    found = Detections(boxes, outputs["eval/scores"][::4], outputs["eval/labels"][::4])
    got = results.entries(
        token, found, class_names=CLASS_NAMES, ego_from_boxes=np.eye(4), global_from_ego=pose, ranges=None
    )
    expected = sorted(expected, key=lambda entry: -entry["detection_score"])
    assert len(got) == len(expected) > 100
    for mine, theirs in zip(got, expected):
        for name in ("sample_token", "detection_name", "attribute_name", "size"):
            assert mine[name] == theirs[name]
        for name in ("translation", "velocity", "detection_score"):
            np.testing.assert_allclose(mine[name], theirs[name], atol=1e-9)
        np.testing.assert_allclose(abs(np.dot(mine["rotation"], theirs["rotation"])), 1, atol=1e-12)


def test_boxes_beyond_the_range_of_their_class_are_left_out():
    boxes = np.tile([0.0, 0, -1, 4, 2, 1.5, 0, 0, 0], (4, 1))
    boxes[:, 0] = [49.9, 50.1, 29.9, 30.1]
    cone = CLASS_NAMES.index("traffic_cone")
    at = dataclasses.replace(frame(), ego_from_lidar=np.eye(4))
    found = Detections(boxes, np.array([0.4, 0.3, 0.2, 0.1]), np.array([0, 0, cone, cone]))
    assert [entry["detection_score"] for entry in entries(found, at)] == [0.4, 0.2]
    assert len(entries(found, at, ranges=None)) == 4


def test_of_more_than_500_boxes_the_surest_stay():
    found = detections(700)
    kept = [entry["detection_score"] for entry in entries(found, frame(), ranges=None)]
    assert kept == sorted(found.scores.tolist(), reverse=True)[:500]


def test_every_key_frame_is_there_once():
    first, again = detections(3, seed=1), detections(2, seed=2)
    found = results.collect([("a", first), ("b", detections(0)), ("a", again)])
    assert found["a"] is first
    made = results.format(found, index("a", "b"), class_names=CLASS_NAMES, meta=results.Meta(use_camera=True))
    assert list(made["results"]) == ["a", "b"] and made["results"]["b"] == []
    assert made["meta"]["use_camera"] and not made["meta"]["use_lidar"]
    with pytest.raises(ValueError, match=r"no detections for key frame b and 1 others of 3 in split 'test'"):
        results.format({"a": first}, index("a", "b", "c"), class_names=CLASS_NAMES, meta=results.Meta())
    with pytest.raises(ValueError, match="no key frame z"):
        results.format({"a": first, "z": first}, index("a"), class_names=CLASS_NAMES, meta=results.Meta())


def test_broken_detections_name_the_key_frame():
    good = detections(2)
    nan = good.boxes.copy()
    nan[1, 7] = np.nan
    flat = good.boxes.copy()
    flat[0, 4] = 0.0
    for broken, message in (
        (Detections(nan, good.scores, good.labels), r"key frame a: detection 1 has box .* not finite"),
        (Detections(flat, good.scores, good.labels), r"key frame a: detection 0 has box .* has no size"),
        (Detections(good.boxes[:, :7], good.scores, good.labels), r"boxes \[2, 7\].*give boxes \[n,9\]"),
        (Detections(good.boxes, good.scores, good.labels + 10), r"key frame a: a label is not in 0\.\.9"),
    ):
        with pytest.raises(ValueError, match=message):
            entries(broken, frame())
    with pytest.raises(ValueError, match="class 'tram' is no nuScenes detection class"):
        results.entries("a", good, class_names=("tram",), ego_from_boxes=np.eye(4), global_from_ego=np.eye(4))


def test_written_and_read_is_the_same_and_a_zip_holds_it(tmp_path):
    made = results.format(
        {"a": detections(9), "b": detections(0)}, index("a", "b"), class_names=CLASS_NAMES, meta=results.Meta()
    )
    results.write(tmp_path / "new" / "results.json", made)
    assert results.read(tmp_path / "new" / "results.json") == made
    results.write(tmp_path / "submission.zip", made)
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert json.loads(archive.read("results_nusc.json")) == made


def broken(**change) -> dict:
    made = results.format({"a": detections(2)}, index("a"), class_names=CLASS_NAMES, meta=results.Meta())
    made["results"]["a"][1] |= change
    return made


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "no nuScenes results file"),
        ({"results": {}}, "no nuScenes results file"),
        ({"meta": {}, "results": {}}, "meta.use_camera is None; it must be true or false"),
        (broken(rotation=[1, 0, 0]), r"results\.a\[1\]\.rotation is \[1, 0, 0\]; it must be 4 finite numbers"),
        (broken(velocity=[0.0, float("nan")]), r"velocity is \[0.0, nan\]|NaN is not JSON"),
        (broken(size=[1.0, 0.0, 1.0]), "width, length and height must be above 0 m"),
        (broken(detection_name="tram"), "detection_name is 'tram'; it must be one of car"),
        (broken(attribute_name="vehicle.flying"), "attribute_name is 'vehicle.flying'"),
        (broken(detection_score=1.5), "detection_score is 1.5; it must be from 0 to 1"),
        (broken(sample_token="b"), "sample_token is 'b'; it must be the token it is listed under"),
        ({**broken(), "results": {"a": broken()["results"]["a"] * 251}}, r"results\.a has 502 boxes"),
        ({**broken(), "results": {"a": 5}}, r"results\.a has int; it must be a list of at most 500 boxes"),
    ],
)
def test_what_the_rules_forbid_is_neither_read_nor_written(tmp_path, document, message):
    (tmp_path / "foreign.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        results.read(tmp_path / "foreign.json")
    with pytest.raises(ValueError, match=message):
        results.write(tmp_path / "mine.json", document)
    assert os.listdir(tmp_path) == ["foreign.json"]


def test_missing_and_truncated_files_say_so(tmp_path):
    with pytest.raises(ValueError, match=r"gone.json does not exist; give a nuScenes results file"):
        results.read(tmp_path / "gone.json")
    results.write(tmp_path / "half.json", broken())
    whole = (tmp_path / "half.json").read_bytes()
    (tmp_path / "half.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half.json is not valid JSON .*truncated"):
        results.read(tmp_path / "half.json")
    (tmp_path / "half.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not valid JSON"):
        results.read(tmp_path / "half.json")


def test_annotations_of_the_synthetic_world_come_back_where_the_devkit_has_them():
    made, tables = small_world.document(), small_world.tables()
    for at in small_world.index():
        placed = [tables.get("sample_annotation", token) for token in tables.get("sample", at.token)["anns"]]
        centres = np.array([row["translation"] for row in placed])
        assert made["results"][at.token]
        for entry in made["results"][at.token]:
            distance = np.linalg.norm(centres - entry["translation"], axis=1)
            assert distance.min() < 1e-6
            annotation = placed[int(np.argmin(distance))]
            np.testing.assert_allclose(entry["size"], annotation["size"], atol=1e-6)
            # a yaw in a lidar frame that tilts against the road cannot be level: a few mrad
            np.testing.assert_allclose(abs(np.dot(entry["rotation"], annotation["rotation"])), 1, atol=1e-4)
