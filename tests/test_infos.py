"""mmdetection3d's info files: the same frames as from the data set itself, and nothing but plain data from a pickle."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import small_root
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from bevfn.data import infos, nuscenes
from bevfn.data.index import CLASSES, Frame, Index, inverse

SHARED = Path(__file__).parents[1].parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared (real frame and goldens) is not here")


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    root = small_root.write(tmp_path_factory.mktemp("data") / "nuscenes")
    return nuscenes.index(root, small_root.VERSION, "mini_train")


# --- files as create_data.py writes them ---


def new_form(index: Index) -> dict:
    """v1.1; numbers of annotations are numpy scalars there, transforms float32."""

    def single(matrix) -> list:
        return matrix.astype(np.float32).tolist()

    entries = []
    for i, frame in enumerate(index):
        labels = [CLASSES.index(name) if name else -1 for name in frame.names]
        entries.append(
            {
                "sample_idx": i, "token": frame.token, "timestamp": frame.timestamp,
                "ego2global": single(frame.global_from_ego),
                "lidar_points": {
                    "num_pts_feats": 5, "lidar_path": Path(frame.lidar_path).name,
                    "lidar2ego": single(frame.ego_from_lidar),
                },
                "lidar_sweeps": [
                    {"timestamp": frame.timestamp - sweep.lag, "sample_data_token": "",
                     "lidar_points": {"lidar_path": f"./data/nuscenes/{sweep.path}",
                                      "lidar2sensor": single(inverse(sweep.lidar_from_sweep))}}
                    for sweep in frame.sweeps
                ],
                "images": {
                    name: {"img_path": Path(camera.path).name, "cam2img": camera.intrinsics.tolist(),
                           "cam2ego": single(camera.ego_from_camera), "lidar2cam": single(camera.camera_from_lidar),
                           "timestamp": camera.timestamp}
                    for name, camera in frame.cameras.items()
                },
                "instances": [
                    {"bbox_3d": box[:7].tolist(), "velocity": box[7:].tolist(), "bbox_label": label,
                     "bbox_label_3d": label, "num_lidar_pts": points, "num_radar_pts": np.int64(0),
                     "bbox_3d_isvalid": valid}
                    for box, label, points, valid in zip(frame.boxes, labels, frame.num_lidar_points, frame.valid)
                ],
            }
        )  # fmt: skip
    categories = {name: i for i, name in enumerate(CLASSES)} | {"animal": -1, "ignore": -1}
    metainfo = {"categories": categories, "dataset": "nuscenes", "version": index.version, "info_version": "1.1"}
    return {"metainfo": metainfo, "data_list": entries}


def old_form(index: Index) -> dict:
    """v1.0, of the devkit's rows."""
    from nuscenes import NuScenes

    tables = NuScenes(index.version, str(index.root), verbose=False)

    def sensor(token: str, prefix: str = "sensor2ego") -> dict:
        data = tables.get("sample_data", token)
        calibration = tables.get("calibrated_sensor", data["calibrated_sensor_token"])
        pose = tables.get("ego_pose", data["ego_pose_token"])
        rows = {prefix: calibration, "ego2global": pose}
        parts = ("rotation", "translation")
        return {f"{name}_{part}": row[part] for name, row in rows.items() for part in parts} | {
            "timestamp": data["timestamp"],
            "data_path": f"./data/nuscenes/{data['filename']}",
        }

    def towards(lidar_from_sensor: np.ndarray) -> dict:
        return {
            "sensor2lidar_rotation": lidar_from_sensor[:3, :3],
            "sensor2lidar_translation": lidar_from_sensor[:3, 3],
        }

    entries = []
    for frame in index:
        data = tables.get("sample", frame.token)["data"]
        sweeps, token = [], data["LIDAR_TOP"]
        for sweep in frame.sweeps:
            token = tables.get("sample_data", token)["prev"]
            sweeps.append(sensor(token) | towards(sweep.lidar_from_sweep))
        cameras = {
            name: sensor(data[name]) | towards(inverse(camera.camera_from_lidar)) | {"cam_intrinsic": camera.intrinsics}
            for name, camera in frame.cameras.items()
        }
        entries.append(
            sensor(data["LIDAR_TOP"], "lidar2ego") | {
                "token": frame.token, "lidar_path": f"/home/me/data/{frame.lidar_path}", "sweeps": sweeps,
                "cams": cameras, "gt_boxes": frame.boxes[:, :7], "gt_velocity": frame.boxes[:, 7:],
                "gt_names": np.array([name or "animal" for name in frame.names]), "valid_flag": frame.valid,
                "num_lidar_pts": frame.num_lidar_points,
            }
        )  # fmt: skip
    return {"infos": entries, "metadata": {"version": index.version}}


def write(folder: Path, document: object, protocol: int = 2) -> Path:
    path = folder / "nuscenes_infos_train.pkl"
    path.write_bytes(pickle.dumps(document, protocol=protocol))
    return path


def assert_close(ours: Frame, wanted: Frame, atol: float) -> None:
    assert (ours.token, ours.lidar_path, ours.names) == (wanted.token, wanted.lidar_path, wanted.names)
    assert ours.timestamp == pytest.approx(wanted.timestamp, abs=1e-6)
    np.testing.assert_allclose(ours.boxes, wanted.boxes, atol=1e-12)
    np.testing.assert_array_equal(ours.valid, wanted.valid)
    np.testing.assert_array_equal(ours.num_lidar_points, wanted.num_lidar_points)
    np.testing.assert_allclose(ours.global_from_lidar, wanted.global_from_lidar, atol=atol, rtol=1e-6)
    assert [s.path for s in ours.sweeps] == [s.path for s in wanted.sweeps]
    assert list(ours.cameras) == list(wanted.cameras)
    for a, b in zip(ours.sweeps, wanted.sweeps):
        np.testing.assert_allclose(a.lidar_from_sweep, b.lidar_from_sweep, atol=atol)
        assert a.lag == pytest.approx(b.lag, abs=1e-6)
    for name, a in ours.cameras.items():
        b = wanted.cameras[name]
        assert a.path == b.path and a.timestamp == pytest.approx(b.timestamp, abs=1e-6)
        np.testing.assert_array_equal(a.intrinsics, b.intrinsics)
        for field in ("camera_from_lidar", "ego_from_camera", "global_from_ego"):
            np.testing.assert_allclose(getattr(a, field), getattr(b, field), atol=atol, rtol=1e-6, err_msg=field)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("form", ["new", "old"])
def test_info_files_give_the_frames_of_the_data_set(index, tmp_path, form, protocol):
    document = new_form(index) if form == "new" else old_form(index)
    read = infos.read(write(tmp_path, document, protocol), root=index.root)
    assert (read.version, read.split, read.root, len(read)) == ("v1.0-mini", "train", index.root, 4)
    for ours, wanted in zip(read, index):
        assert_close(ours, wanted, atol=1e-3 if form == "new" else 1e-9)  # float32 at 1000 m


def test_json_has_the_same_frames_with_the_values_as_they_are(index, tmp_path):
    document = new_form(index)
    by_pickle = infos.read(write(tmp_path, document), root=index.root)
    path = tmp_path / "infos.json"
    path.write_text(json.dumps(document, default=lambda value: value.item()))
    by_json = infos.read(path, root=index.root)
    assert by_json.split == ""
    for ours, wanted, entry in zip(by_json, by_pickle, document["data_list"]):
        assert_close(ours, wanted, atol=0)
        assert ours.cameras["CAM_BACK"].camera_from_lidar.tolist() == entry["images"]["CAM_BACK"]["lidar2cam"]


def test_bare_names_lie_beside_a_file_without_folders(index, tmp_path):
    frame = infos.read(write(tmp_path, new_form(index)))[0]
    assert "/" not in frame.lidar_path and "/" not in frame.cameras["CAM_FRONT"].path


@needs_shared
def test_the_real_frame_has_the_golden_matrices_and_boxes():
    frame = infos.read(SHARED / "nuscenes_frame" / "frame.json")[0]
    golden = load_file(SHARED / "goldens" / "bevfusion_lidar_cam" / "inputs.safetensors")
    for i, camera in enumerate(frame.cameras.values()):
        camera_from_lidar = camera.camera_from_lidar.astype(np.float32)
        image_from_camera = np.eye(4, dtype=np.float32)
        image_from_camera[:3, :3] = camera.intrinsics
        np.testing.assert_allclose(image_from_camera @ camera_from_lidar, golden["lidar2img"][i], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(image_from_camera, golden["cam2img"][i], rtol=1e-6)
        np.testing.assert_allclose(inverse(camera_from_lidar), golden["cam2lidar"][i], atol=1e-6)
        assert 0 <= frame.timestamp - camera.timestamp < 0.05
        moved = camera.global_from_ego[:3, 3] - frame.global_from_ego[:3, 3]  # the car drives straight on
        assert np.linalg.norm(moved) == pytest.approx(9.25 * (frame.timestamp - camera.timestamp), abs=2e-3)
    kept = [
        i
        for i in range(len(frame.boxes))
        if frame.valid[i] and frame.names[i] and (np.abs(frame.boxes[i, :2]) < 54).all()
    ]
    boxes = np.nan_to_num(frame.boxes[kept])
    boxes[:, 2] -= boxes[:, 5] / 2
    np.testing.assert_allclose(boxes, golden["gt_boxes"], atol=1e-5)


def test_what_a_file_does_not_say_is_unknown(index, tmp_path):
    document = new_form(index)
    entry = document["data_list"][0]
    for place in (entry, entry["lidar_points"], entry["images"]["CAM_FRONT"], entry["instances"][1]):
        for key in ("ego2global", "lidar2ego", "cam2ego", "velocity", "num_lidar_pts", "lidar_sweeps"):
            place.pop(key, None)
    frame = infos.read(write(tmp_path, document))[0]
    for transform in (frame.ego_from_lidar, frame.global_from_ego, frame.cameras["CAM_FRONT"].ego_from_camera):
        assert np.isnan(transform[:3]).all() and transform[3].tolist() == [0, 0, 0, 1]
    assert np.isnan(frame.boxes[1, 7:]).all() and frame.num_lidar_points[1] == -1 and frame.sweeps == ()
    assert np.isfinite(frame.cameras["CAM_FRONT"].camera_from_lidar).all()


# --- what a pickle may not hold ---


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (Call(eval, "open('was-here', 'w')"), r"builtins.eval"),
        (Call(__import__("os").system, "touch was-here"), r"(posix|nt).system"),
        (Call(getattr, [], "append"), r"builtins.getattr"),
        (Call(np.load, "/etc/passwd"), r"numpy.load"),
        (Path("/tmp"), r"pathlib"),
        (Call(__import__("_codecs").encode, "x", "rot13"), r"_codecs.encode with 'rot13'"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_runs_something_is_refused_by_name(tmp_path, monkeypatch, payload, name, protocol):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, {"metainfo": {}, "data_list": [payload]}, protocol)
    with pytest.raises(
        ValueError, match=rf"train.pkl asks for .*{name}|train.pkl asks for __builtin__.*; an info file"
    ):
        infos.read(path)
    assert not (tmp_path / "was-here").exists()


def test_arrays_of_objects_hold_plain_data_only(index, tmp_path):
    plain = new_form(index) | {"more": np.array([{"a": 1}, "b"], dtype=object)}
    assert len(infos.read(write(tmp_path, plain))) == len(index)
    with pytest.raises(ValueError, match=r"asks for builtins.eval|asks for __builtin__.eval"):
        infos.read(write(tmp_path, plain | {"more": np.array([Call(eval, "1")], dtype=object)}))


@settings(max_examples=40)
@given(data=st.data())
def test_a_cut_pickle_is_one_sentence(data, whole_pickle):
    folder, raw = whole_pickle
    path = folder / "cut.pkl"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(ValueError, match=r"cut.pkl is no complete pickle \(.*copy it again"):
        infos.read(path)


@pytest.fixture(scope="module")
def whole_pickle(index, tmp_path_factory):
    return tmp_path_factory.mktemp("cut"), pickle.dumps(new_form(index), protocol=2)


# --- wrong content ---


def remove(*keys):
    def change(document):
        for key in keys[:-1]:
            document = document[key]
        del document[keys[-1]]

    return change


def put(value, *keys):
    def change(document):
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (remove("data_list"), r"train.pkl: data_list is missing; the file is not in mmdetection3d's v1.1"),
        (remove("metainfo", "categories"), r"train.pkl: metainfo.categories is missing"),
        (put("x", "data_list", 2), r"data_list\[2\]: lidar_points is missing"),
        (remove("data_list", 1, "lidar_points", "lidar_path"), r"data_list\[1\]: lidar_points.lidar_path is missing"),
        (put([1], "data_list", 0, "images"), r"data_list\[0\]: images must be a dict, not list\."),
        (put("soon", "data_list", 0, "timestamp"), r"data_list\[0\]: timestamp must be a int or float .*, not str\."),
        (put([[1, 2]], "data_list", 0, "images", "CAM_BACK", "cam2img"), r"images.CAM_BACK: cam2img .* \[3, 3\], not"),
        (put([[1], [1, 2]], "data_list", 0, "ego2global"), r"ego2global must hold numbers in the shape \[4, 4\] \("),
        (put(np.eye(4) * 2, "data_list", 0, "images", "CAM_BACK", "lidar2cam"), r"lidar2cam is no rotation"),
        (put([np.nan] * 7, "data_list", 1, "instances", 0, "bbox_3d"), r"instances\[0\]: bbox_3d has NaN"),
        (remove("data_list", 1, "instances", 0, "bbox_label_3d"), r"instances\[0\]: bbox_label_3d is missing"),
    ],
)
def test_wrong_entries_are_named(index, tmp_path, change, match):
    document = new_form(index)
    change(document)
    with pytest.raises(ValueError, match=match):
        infos.read(write(tmp_path, document))


def test_files_of_before_1_0_are_refused(index, tmp_path):
    document = old_form(index)
    for info in document["infos"]:
        info["gt_boxes"] = np.concatenate([info["gt_boxes"][:, :3], [[1.9, 4.6, 1.7, 0.0]] * len(info["gt_boxes"])], 1)
    with pytest.raises(ValueError, match=r"cars are wider than long, so it is of mmdetection3d before 1.0"):
        infos.read(write(tmp_path, document))


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", b"{"), ("a.json", b"\xff\xfe"), ("a.pkl", b""), ("a.pkl", b"x")]
)
def test_files_that_are_something_else(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"a.(json is not valid JSON|pkl is no complete pickle)"):
        infos.read(tmp_path / name)
    with pytest.raises(ValueError, match=r"nothing.pkl does not exist"):
        infos.read(tmp_path / "nothing.pkl")


def test_a_file_without_key_frames_says_so(index, tmp_path):
    for document in (new_form(index) | {"data_list": []}, old_form(index) | {"infos": []}):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(document))
        with pytest.raises(ValueError, match=r"a.pkl lists no key frames; make it again"):
            infos.read(tmp_path / "a.pkl")
