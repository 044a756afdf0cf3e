"""Values that cannot be: a nuScenes root and an info file with any of them are refused in a sentence that names the row."""

import io
import json
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_root
import small_world
from test_infos import new_form, old_form

from bevfn.data import faults, infos, nuscenes
from bevfn.data.index import Index, pack

VERSION = small_root.VERSION
HUGE = 10**400


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return small_root.write(tmp_path_factory.mktemp("data") / "nuscenes")


@pytest.fixture(scope="module")
def index(kept) -> Index:
    return nuscenes.index(kept, VERSION, "mini_train")


@pytest.fixture
def root(kept, tmp_path) -> Path:
    """A copy to break, without a cached index."""
    return Path(shutil.copytree(kept, tmp_path / "nuscenes", ignore=shutil.ignore_patterns(".bevfn")))


def edit(root: Path, table: str, row_token: str, /, **values) -> None:
    """Sets fields of the row with this token."""
    path = root / VERSION / f"{table}.json"
    rows = json.loads(path.read_text())
    (row,) = (row for row in rows if row["token"] == row_token)
    row |= values
    path.write_text(json.dumps(rows))


BOX, SCAN, SAMPLE, LENS = "scene-0061 object 2 1", "scene-0061 LIDAR_TOP 3", "scene-0061 1", "scene-0061 CAM_BACK"
BOX_SAYS = r"key frame scene-0061 1, box \d \(annotation scene-0061 object 2 1\), has "
LENS_SAYS = r"key frame scene-0061 0, CAM_BACK, has the intrinsics .* which must be focal lengths from 1 to"
K = [[1200.0, 0.0, 800.0], [0.0, 1200.0, 450.0], [0.0, 0.0, 1.0]]
TABLES: dict[str, tuple[str, str, dict, str]] = {
    "size zero": ("sample_annotation", BOX, {"size": [0, 4, 1]}, BOX_SAYS + r"sizes 4 0 1, which must be from 0.001 to"),
    "size negative": ("sample_annotation", BOX, {"size": [2, -4, 1]}, BOX_SAYS + "sizes -4 2 1"),
    "size NaN": ("sample_annotation", BOX, {"size": [2, 4, float("nan")]}, BOX_SAYS + "sizes 4 2 nan"),
    "size infinite": ("sample_annotation", BOX, {"size": [2, 4, float("inf")]}, BOX_SAYS + "sizes 4 2 inf"),
    "size 1e30": ("sample_annotation", BOX, {"size": [1e30, 4, 1]}, BOX_SAYS + "sizes 4 1e.30 1"),
    "size of text": ("sample_annotation", BOX, {"size": ["1", "4", "1"]}, f"sample_annotation {BOX} has no size of 3 numbers"),
    "size of true": ("sample_annotation", BOX, {"size": [True] * 3}, f"sample_annotation {BOX} has no size of 3 numbers"),
    "size of two": ("sample_annotation", BOX, {"size": [1, 4]}, f"sample_annotation {BOX} has no size of 3 numbers"),
    "size of words": ("sample_annotation", BOX, {"size": ["a", 1, 2]}, f"sample_annotation {BOX} has no size of 3"),
    "size 10^400": ("sample_annotation", BOX, {"size": [HUGE, 1, 2]}, f"sample_annotation {BOX} has no size of 3"),
    "position 1e30": ("sample_annotation", BOX, {"translation": [1e30, 0, 0]}, r"scene-0061 1, box \d .* has positions "),
    "position NaN": ("sample_annotation", BOX, {"translation": [0, float("nan"), 0]}, BOX_SAYS + "positions nan"),
    "rotation zero": ("sample_annotation", BOX, {"rotation": [0] * 4}, f"{BOX} has a rotation that is no quaternion of l"),
    "rotation NaN": ("sample_annotation", BOX, {"rotation": [float("nan")] * 4}, f"{BOX} has a rotation that is no"),
    "points below 0": ("sample_annotation", BOX, {"num_lidar_pts": -5}, f"annotation {BOX} has num_lidar_pts -5, which"),
    "no points": ("sample_annotation", BOX, {"num_radar_pts": None}, f"{BOX} has num_radar_pts nan|no num_radar_pts of"),
    "box before itself": ("sample_annotation", BOX, {"prev": BOX}, f"annotation {BOX} has a `prev` that is itself"),
    "object twice": (
        "sample_annotation", BOX, {"sample_token": "scene-0061 0", "prev": "", "next": ""},
        "annotations .* and .* are of one object in one key frame",
    ),
    "box of another": (
        "sample_annotation", BOX, {"next": "scene-0061 object 3 2"}, f"{BOX} has a `next` that is of another object",
    ),
    "focal length zero": ("calibrated_sensor", LENS, {"camera_intrinsic": (np.array(K) * [[0], [1], [1]]).tolist()}, LENS_SAYS),
    "focal length negative": ("calibrated_sensor", LENS, {"camera_intrinsic": (-np.array(K)).tolist()}, LENS_SAYS),
    "intrinsics transposed": ("calibrated_sensor", LENS, {"camera_intrinsic": np.array(K).T.tolist()}, LENS_SAYS),
    "centre far outside": ("calibrated_sensor", LENS, {"camera_intrinsic": [[12.0, 0, 8], [0, 12, -9.1], [0, 0, 1]]},
        r"CAM_BACK, has its centre of projection at 8 -9.1 in images of 16 9 pixels .* outside from 0 to 1 sides of the image"),
    "no intrinsics": ("calibrated_sensor", LENS, {"camera_intrinsic": []}, f"{LENS} has no camera_intrinsic of 3 x 3 numb"),
    "mount far away": ("calibrated_sensor", LENS, {"translation": [1e5, 0, 0]}, "CAM_BACK,: camera_from_lidar moves by"),
    "mount not turned": ("calibrated_sensor", LENS, {"rotation": [2, 0, 0, 0]}, f"{LENS} has a rotation that is no quat"),
    "pose NaN": ("ego_pose", SCAN, {"translation": [float("nan"), 0, 0]}, "0061 1: sweep_transform is no proper rotation .* or not fin"),
    "scan before itself": ("sample_data", SCAN, {"prev": SCAN}, "0061 1 has sweeps 0.1 s and then 0.1 s before it, which must be n"),
    "scan of another scene": (
        "sample_data", SCAN, {"prev": "scene-0103 LIDAR_TOP 2"}, f"row {SCAN} of sample_data.json has its `prev` in another",
    ),
    "scan of another sensor": (
        "sample_data", SCAN, {"prev": "scene-0061 CAM_BACK 0"}, f"row {SCAN} of sample_data.json has its `prev` in another",
    ),
    "sweep from the future": (
        "sample_data", SCAN, {"timestamp": 1_532_402_937_000_000}, "has a sweep -[0-9.]+ s before it, which must be from",
    ),
    "sweep at the same time": (
        "sample_data", SCAN, {"timestamp": 1_532_402_927_400_000}, "scene-0061 1 has a sweep 0 s before it, which must",
    ),
    "time negative": ("sample_data", "scene-0061 LIDAR_TOP 4", {"timestamp": -5}, f"key frame {SAMPLE} is .* s after its"),
    "key frame before itself": ("sample", SAMPLE, {"prev": SAMPLE}, f"key frame {SAMPLE} is not later than its `prev`"),
    "key frame of another scene": (
        "sample", SAMPLE, {"prev": "scene-0103 0"}, f"key frame {SAMPLE} has its `prev` in another scene",
    ),
    "key frames at the same time": (
        "sample", SAMPLE, {"timestamp": 1_532_402_927_000_000}, f"key frame {SAMPLE} is not later than its `prev`, by",
    ),
    "camera far off in time": (
        "sample_data", "scene-0061 CAM_BACK 4", {"timestamp": 0}, f"{SAMPLE}, CAM_BACK, was exposed -1.53.* s after the LiDAR",
    ),
    "image size": (
        "sample_data", "scene-0061 CAM_BACK 4", {"width": -4}, f"{SAMPLE}, CAM_BACK, has images of 9 -4 pixels, which must be",
    ),
    "token twice": ("sample_data", SCAN, {"token": "scene-0061 LIDAR_TOP 2"}, "several rows .* the (same )?token"),
    "token a list": ("sample_data", SCAN, {"token": ["a"]}, "sample_data.json: a token is a list: .'a'., no text"),
    "link a dict": ("sample_data", SCAN, {"prev": {"a": 1}}, "sample_data.json: prev of 1 of 88 rows names no row of sample"),
    "name a list": ("scene", "token scene-0061", {"name": ["scene-0061"]}, "name of 1 of 2 rows is no text|no scene of the"),
    "time 10^400": ("sample_data", SCAN, {"timestamp": HUGE}, "sample_data.json: timestamp of 1 of 88 rows is no number"),
    "file absolute": ("sample_data", SCAN, {"filename": "/etc/passwd"}, "has the file /etc/passwd, which is not below the"),
    "token surrogate": ("sample_annotation", BOX, {"token": "a\ud800"},
        r"sample_annotation.json: token of 1 of 28 rows is no text \(the first is 'a\\ud800', which has half of a letter"),
    "file NUL": ("sample_data", SCAN, {"filename": "a\0b"}, r"sample_data.json: filename of 1 .* 'a\\x00b', which has a NUL"),
    "map NUL": ("map", "map", {"filename": "a\0b"}, r"map.json: filename of 1 of 1 rows is no text .* has a NUL"),
    "channel long": ("sensor", "RADAR_FRONT", {"channel": "x" * 5000}, r"sensor.json: channel of .* has more than 4,096 bytes"),
    "attribute surrogate": ("attribute", "a1", {"name": "\udc80"}, r"attribute.json: name of 1 of 1 rows is no text"),
    "attribute none": ("attribute", "a1", {"name": None}, r"attribute.json: name of 1 of 1 rows is no text .* a NoneType"),
    "level surrogate": ("visibility", "1", {"level": "\udc80"}, r"visibility.json: level of 1 of 3 rows is no text"),
    "file outside": ("sample_data", SCAN, {"filename": "../../x.bin"}, r"has the file ../../x.bin, which is not below the"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_tables_with_impossible_values_are_refused(root, case):
    table, token, values, says = TABLES[case]
    edit(root, table, token, **values)
    with pytest.raises(ValueError, match=says) as caught:
        nuscenes.index(root, VERSION, "mini_train")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700
    if (root / ".bevfn").is_dir():  # what was read is kept, and refused as long as the tables are so
        with pytest.raises(ValueError, match=says):
            nuscenes.index(root, VERSION, "mini_train")


def test_deep_nesting_and_control_characters_are_one_printable_sentence(root):
    path = root / VERSION / "ego_pose.json"
    whole = path.read_text()
    path.write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(ValueError, match=r"ego_pose.json is truncated or damaged \(it is nested too deeply\)"):
        nuscenes.index(root, VERSION, "mini_train")
    path.write_text(whole)
    edit(root, "sample_annotation", BOX, token="a\nb\x1b[31m", size=[0, 1, 1], prev="", next="")
    for name in ("scene-0061 object 2 0", "scene-0061 object 2 2"):
        edit(root, "sample_annotation", name, prev="", next="")
    with pytest.raises(ValueError, match=r"annotation a\\nb\\x1b\[31m\), has sizes 1 0 1"):
        nuscenes.index(root, VERSION, "mini_train")


def test_annotations_of_unknown_categories_are_told(root):
    edit(root, "category", "animal", name="dragon")
    with pytest.warns(
        UserWarning, match=r"4 of 28 annotations are left out, since their categories .* \(dragon\)|dragon"
    ):
        assert len(nuscenes.index(root, VERSION, "mini_train")) == 4


@pytest.mark.parametrize("height", [1e30, 2**32 + 225])
def test_a_size_that_no_integer_holds_is_refused_as_no_image_size(root, height):
    edit(root, "sample_data", "scene-0061 CAM_BACK 4", height=height)
    with pytest.raises(ValueError, match=r"has images of 2\.14748e\+09 16 pixels, which must be from 1 to 20000 px"):
        nuscenes.index(root, VERSION, "mini_train")


def test_what_is_odd_but_possible_is_accepted(root):
    edit(root, "sample_annotation", BOX, size=[0.01, 80.0, 3.0], num_lidar_pts=0, num_radar_pts=0)
    edit(root, "sample_data", "scene-0061 CAM_BACK 4", height=0, width=0)  # of unknown size
    edit(root, "calibrated_sensor", LENS, translation=[-12.0, 0.0, 3.0])
    assert len(nuscenes.index(root, VERSION, "mini_train")) == 4


def test_worlds_without_faults_have_none(index):
    for frames in (index.frames, small_world.index().frames, small_world.training().frames, pack([])):
        assert list(faults.find(frames)) == []


# --- info files ---


def put(value, *keys) -> Callable[[dict], None]:
    def change(document: dict) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


FRAME = ("data_list", 1)
MIRROR = np.diag([1.0, -1.0, 1.0, 1.0]).tolist()
INFOS: dict[str, tuple[Callable[[dict], None], str]] = {
    "size": (put([1, 2, 3, 4, 0, 1, 0.5], *FRAME, "instances", 2, "bbox_3d"), "key frame scene-0061 1, box 2, has sizes 4 0 1"),
    "size 1e30": (put([1, 2, 3, 4, 1e30, 1, 0.5], *FRAME, "instances", 2, "bbox_3d"), "0061 1, box 2, has sizes 4 1e.30 1, wh"),
    "position": (put([1e30, 2, 3, 4, 2, 1, 0.5], *FRAME, "instances", 2, "bbox_3d"), "0061 1, box 2, has positions 1e.30 2 3"),
    "number": (put([HUGE, 2, 3, 4, 2, 1, 0.5], *FRAME, "instances", 2, "bbox_3d"), r"instances\[2\]: bbox_3d must hold numbers"),
    "velocity": (put([np.inf, 0], *FRAME, "instances", 2, "velocity"), "0061 1, box 2, has velocities inf 0"),
    "label below": (put(-5, *FRAME, "instances", 2, "bbox_label_3d"), r"bbox_label_3d -5 is neither a number of metainfo.cat"),
    "label above": (put(10**9, *FRAME, "instances", 2, "bbox_label_3d"), r"bbox_label_3d 1e.09 is neither"),
    "label infinite": (put(np.inf, *FRAME, "instances", 2, "bbox_label_3d"), "bbox_label_3d is NaN, infinite or"),
    "points": (put(1e30, *FRAME, "instances", 2, "num_lidar_pts"), r"\[1\]: box 2 has num_lidar_pts 1e.30, which must be"),
    "flag": (put([1, 2], *FRAME, "instances", 2, "bbox_3d_isvalid"), "bbox_3d_isvalid must be true or false, not a list"),
    "category twice": (put(3, "metainfo", "categories", "animal"), "animal and bus have the same number 3"),
    "category number": (put("x", "metainfo", "categories", "car"), "metainfo.categories: car has the number x; give 0, 1"),
    "mirror": (put(MIRROR, *FRAME, "images", "CAM_BACK", "lidar2cam"), r"CAM_BACK: lidar2cam is no rotation"),
    "pose": (put((np.eye(4) + 1e9 * np.eye(4, k=3)).tolist(), *FRAME, "ego2global"), "ego moves by 1e.09 0 0 m, which must be"),
    "lens": (put([[0, 0, 8], [0, 9, 4], [0, 0, 1]], *FRAME, "images", "CAM_BACK", "cam2img"), "CAM_BACK, has the intrinsics 0"),
    "future": (put(2e9, *FRAME, "lidar_sweeps", 0, "timestamp"), "scene-0061 1 has a sweep -4.67.* s before it, which must be"),
    "time": (put(HUGE, *FRAME, "timestamp"), "timestamp is NaN, infinite or beyond any number"),
    "time negative": (put(-1.0, *FRAME, "timestamp"), "key frame scene-0061 1 is of the time -1 s, not from 0"),
    "time true": (put(True, *FRAME, "timestamp"), "timestamp must be a int or float .*, not bool"),
    "token twice": (put("scene-0061 0", *FRAME, "token"), "key frame scene-0061 0 is there more than once"),
    "token a list": (put(["a"], *FRAME, "token"), r"data_list\[1\]: token must be a str or int or integer, not list"),
    "path absolute": (put("/etc/passwd", *FRAME, "lidar_points", "lidar_path"), "1 has the file /etc/passwd, which is not below"),
    "path outside": (put("samples/../../x", *FRAME, "images", "CAM_BACK", "img_path"), "the file samples/../../x, which is not"),
    "path NUL": (put("a\0b", *FRAME, "images", "CAM_BACK", "img_path"), r"CAM_BACK: img_path 'a\\x00b' has a NUL"),
    "path surrogate": (put("a\ud800", *FRAME, "lidar_points", "lidar_path"), r"lidar_points.lidar_path 'a\\ud800' has half of a le"),
    "token long": (put("x" * 5000, *FRAME, "token"), r"data_list\[1\]: token 'x{60}…x{40}' has more than 4,096 bytes"),
    "category surrogate": (put(77, "metainfo", "categories", "\udc80"), r"metainfo.categories: the name '\\udc80' has half of"),
    "channel NUL": (put({}, *FRAME, "images", "a\0"), r"images has the channel 'a\\x00', which is no text"),
}  # fmt: skip


@pytest.mark.parametrize("case", INFOS)
def test_info_files_with_impossible_values_are_refused(index, tmp_path, case):
    change, says = INFOS[case]
    document = new_form(index)
    change(document)
    path = tmp_path / "nuscenes_infos_train.pkl"
    path.write_bytes(pickle.dumps(document))
    with pytest.raises(ValueError, match=says) as caught:
        infos.read(path)
    assert str(caught.value).isprintable() and str(path) in str(caught.value)


OLD: dict[str, tuple[Callable[[dict], None], str]] = {
    "names": (put(5, "infos", 1, "gt_names"), r"infos\[1\]: gt_names must be a list or tuple or ndarray, not int"),
    "sweep": (put(10**17, "infos", 1, "sweeps", 0, "timestamp"), "has a sweep -9.8.* s before it"),
    "names of no letters": (
        put(np.array([2**32 - 1] * 4, "<u4").view("<U1"), "infos", 1, "gt_names"),
        r"infos\[1\]: gt_names must be a list of",
    ),
    "names of one": (put(np.array("x"), "infos", 1, "gt_names"), r"infos\[1\]: gt_names must be a list of names"),
    "turn": (put([2, 0, 0, 0], "infos", 1, "lidar2ego_rotation"), "lidar2ego_rotation is no quaternion of length 1"),
    "version": (put("../x", "metadata", "version"), "the version '../x' is no name of a folder below the root"),
    "previous": (put([1], "infos", 1, "prev"), r"infos\[1\]: prev must be a str"),
    "points": (put([1, 2], "infos", 1, "num_lidar_pts"), r"num_lidar_pts must hold numbers in the shape \[4\]"),
}


@pytest.mark.parametrize("case", OLD)
def test_info_files_of_the_old_form_with_impossible_values_are_refused(index, tmp_path, case):
    change, says = OLD[case]
    document = old_form(index)
    change(document)
    path = tmp_path / "infos.pkl"
    path.write_bytes(pickle.dumps(document))
    with pytest.raises(ValueError, match=says):
        infos.read(path)


def test_info_json_that_is_nested_deeply_is_one_sentence(tmp_path):
    (tmp_path / "infos.json").write_text('{"data_list": ' + "[" * 200_000)
    with pytest.raises(ValueError, match=r"infos.json is not valid JSON \(it is nested too deeply\)"):
        infos.read(tmp_path / "infos.json")


def test_names_that_nuscenes_has_not_are_told(index, tmp_path):
    document = old_form(index)
    document["infos"][2]["gt_names"][:] = "dragon"
    path = tmp_path / "infos.pkl"
    path.write_bytes(pickle.dumps(document))
    with pytest.warns(
        UserWarning, match=r"annotations are left out, since their names are none of nuScenes' \(dragon\)"
    ):
        infos.read(path)


# --- pickles that ask for memory ---

GREEDY = {
    "bytearray of 3 GB": pickle.dumps(bytearray).replace(b"builtins", b"builtins")[:-1] + b"J" + struct.pack("<i", 2**31 - 1)
    + b"\x85R.",
    "bytearray8 of 2^40": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "bytes8 of 2^40": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "unicode8 of 2^40": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "frame of 2^40": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
    "memo of 2^30": b"\x80\x02}r" + struct.pack("<I", 2**30) + b".",
    "array of 2^33": b"\x80\x02cnumpy\nndarray\n\x8a\x05\x00\x00\x00\x00\x02\x85\x85R.",
}  # fmt: skip


@pytest.mark.parametrize("name", GREEDY)
def test_a_short_pickle_gets_no_memory(tmp_path, name):
    path = tmp_path / "infos.pkl"
    path.write_bytes(GREEDY[name])
    assert len(GREEDY[name]) < 60
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ValueError, match=r"infos.pkl (is no complete pickle|asks for|: )"):
        infos.read(path)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_cached_index_that_declares_2_to_the_40_is_built_again(root, index):
    nuscenes.index(root, VERSION, "mini_train")
    (path,) = (root / ".bevfn").glob("*.npz")
    with np.load(path) as file:
        header = file["header"]
    head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (%d,), }" % 2**40
    head = head.ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        stream = io.BytesIO()
        np.save(stream, header)
        archive.writestr("header.npy", stream.getvalue())
        archive.writestr("boxes.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(80))
    with pytest.warns(UserWarning, match=r"mini_train.npz is damaged \(.*built again"):
        assert len(nuscenes.index(root, VERSION, "mini_train")) == len(index)


def test_peak_memory_of_a_greedy_pickle_is_small(tmp_path):
    path = tmp_path / "infos.pkl"
    path.write_bytes(GREEDY["bytearray of 3 GB"])
    code = (
        "import resource, sys; from pathlib import Path; from bevfn.data import infos\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try: infos.read(Path({str(path)!r}))\n"
        "except ValueError as error: print(error)\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, 'kB'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "is no complete pickle (MemoryError" in done.stdout, done.stderr
