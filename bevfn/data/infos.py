"""mmdetection3d's info files to an Index, without running what a pickle may hold.

Three forms: v1.1 (`metainfo`, `data_list`) as .pkl or as .json, and v1.0 (`metadata`, `infos`) as .pkl (see `plain_pickle`).

Source: mmdetection3d tools/dataset_converters (nuscenes_converter.py, update_infos_to_v2.py), datasets/nuscenes_dataset.py.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy  # whose rooms are imported when they are entered

from bevfn.data import columns, faults, plain_pickle, possible
from bevfn.data.index import CLASSES, Camera, Frame, Index, Sweep, inverse, pack
from bevfn.files import read_json
from bevfn.names import leaves, printable, unusable
from bevfn.synth.tables import CATEGORIES  # nuScenes' 23

MOST_CLASSES = 10_000


def read(path: Path, root: Path | None = None) -> Index:
    """The frames of an info file in file order; root (default: the file's folder) is what their paths are relative to.

    Files are named as mmdetection3d finds them: from `samples/` or `sweeps/` on where a path has that, and bare names
    in samples/<channel> if the root has such a folder, else in the root itself. What a file does not say: scene,
    previous, attributes, visibility and annotation tokens are "", a velocity or transform is NaN, a number of points
    -1. v1.1 has no ego pose of the cameras; it follows from their other transforms, as exactly as float32 has them.

    Raises ValueError, one sentence with file and field, for a file that is missing, truncated, of another form, that holds
    anything but plain data, or values that are not possible, which names the key frame's token and the box's number.
    """
    path = Path(path)
    root = path.parent if root is None else Path(root)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give an info file, .pkl of mmdetection3d or .json.")
    document = _read_json(path) if path.suffix == ".json" else plain_pickle.read(path)
    folders = (root / "samples").is_dir()
    if isinstance(document, dict) and "infos" in document:
        infos, metadata = get(document, str(path), "infos", list), optional(document, str(path), "metadata", dict)
        class_names: tuple[str, ...] = CLASSES
        _tell_of_names(path, infos)
        frames = [_old_frame(info, f"{path}: infos[{i}]", folders) for i, info in enumerate(infos)]
        _check_length_first(path, frames)
    else:
        infos, metadata = get(document, str(path), "data_list", list), get(document, str(path), "metainfo", dict)
        # several categories that are no detection class share the number -1
        categories = get(document, str(path), "metainfo.categories", dict)
        names = numbered(categories, f"{path}: metainfo.categories")
        class_names = tuple(names.values())
        placed = partial(_path, folders=folders)
        told = point_columns(metadata, f"{path}: metainfo")
        places = (f"{path}: data_list[{i}]" for i in range(len(infos)))
        frames = [replace(frame(info, where, names, placed), columns=told) for info, where in zip(infos, places)]
    if not frames:
        raise ValueError(f"{path} lists no key frames; make it again with create_data.py, or give another one.")
    split = re.search(r"_infos_(?:\w+_)?(train|val|test)\b", path.stem)
    return Index(
        root=root,
        version=_version(metadata, str(path)),
        split=split.group(1) if split else "",
        frames=faults.refuse(pack(frames), str(path)),
        class_names=class_names,
    )


def _version(metadata: dict, where: str) -> str:
    """Of the data set; its tables may lie in a folder of that name."""
    version = text(metadata, where, "version")
    if leaves(version) or "\0" in version:
        raise ValueError(f"{where}: the version '{printable(version)}' is no name of a folder below the root.")
    return version


# --- v1.1 ---


def numbered(categories: dict, where: str) -> dict[int, str]:
    """Number to class; -1 is what is none of them."""
    names: dict[int, str] = {}
    for name, number in categories.items():
        if what := unusable(str(name)) or ("" if name else "is empty"):
            raise ValueError(f"{where}: the name '{printable(name)}' {what}; repair or remove it.")
        if not isinstance(number, int) or isinstance(number, bool) or not -1 <= number < MOST_CLASSES:
            raise ValueError(
                f"{where}: {printable(name)} has the number {printable(number)}; give 0, 1, ... or -1 for none."
            )
        if number in names:
            raise ValueError(
                f"{where}: {printable(name)} and {printable(names[number])} have the same number {number}."
            )
        if number >= 0:
            names[number] = str(name)
    return names


def point_columns(metainfo: dict, where: str) -> str:
    """What the numbers of a point are (`columns.parse`), "" where it does not say: nuScenes'. Raises ValueError."""
    told = optional(metainfo, where, "points", str)
    try:
        columns.parse(told)
    except ValueError as error:
        raise ValueError(f"{where}.points: {error}.") from None
    return told


def frame(info: dict, where: str, names: dict[int, str], placed: Callable[[str, str], str]) -> Frame:
    """One entry of data_list. placed: (a file as the entry names it, the folder of such files in nuScenes' layout) to its path
    relative to the root."""
    ego_from_lidar = _transform(info, where, "lidar_points.lidar2ego", unknown=True)
    global_from_ego = _transform(info, where, "ego2global", unknown=True)
    time = _number(info, where, "timestamp") if "timestamp" in info else 0.0
    cameras = {}
    for channel, camera in _channels(info, where, "images"):
        place = f"{where}.images.{printable(channel)}"
        camera_from_lidar = _transform(camera, place, "lidar2cam")
        ego_from_camera = _transform(camera, place, "cam2ego", unknown=True)
        cameras[channel] = Camera(
            path=placed(get(camera, place, "img_path", str), f"samples/{channel}"),
            intrinsics=_numbers(camera, place, "cam2img", (3, 3)),
            camera_from_lidar=camera_from_lidar,
            ego_from_camera=ego_from_camera,
            global_from_ego=global_from_ego @ ego_from_lidar @ inverse(camera_from_lidar) @ inverse(ego_from_camera),
            timestamp=_number(camera, place, "timestamp") if {"timestamp"} <= camera.keys() & info.keys() else time,
            size=_size(camera, place),
        )
    sweeps = []
    for i, sweep in enumerate(optional(info, where, "lidar_sweeps", list)):
        place = f"{where}.lidar_sweeps[{i}]"
        file = placed(get(sweep, place, "lidar_points.lidar_path", str), "sweeps/LIDAR_TOP")
        lidar_from_sweep = inverse(_transform(sweep, place, "lidar_points.lidar2sensor"))
        sweeps.append(Sweep(file, lidar_from_sweep, time - _number(sweep, place, "timestamp")))
    return Frame(
        token=text(info, where, "token"),
        scene="",
        previous="",
        timestamp=time,
        lidar_path=placed(get(info, where, "lidar_points.lidar_path", str), "samples/LIDAR_TOP"),
        ego_from_lidar=ego_from_lidar,
        global_from_ego=global_from_ego,
        sweeps=tuple(sweeps),
        cameras=cameras,
        **_instances(info, where, names),
    )


def _instances(info: dict, where: str, names: dict[int, str]) -> dict[str, Any]:
    """The Frame's fields of boxes; `bbox_3d` has the gravity centre already."""
    rows, found, valid, seen = [], [], [], []
    for i, instance in enumerate(optional(info, where, "instances", list)):
        place = f"{where}.instances[{i}]"
        box = _numbers(instance, place, "bbox_3d", (7,))
        known = optional(instance, place, "velocity", list)
        velocity = _numbers(instance, place, "velocity", (2,), finite=False) if known else np.full(2, np.nan)
        rows.append(np.concatenate([box, velocity]))
        found.append(_class_of(instance, place, names))
        flag = instance.get("bbox_3d_isvalid", True)
        if not isinstance(flag, bool | int | np.bool_):
            raise ValueError(f"{place}: bbox_3d_isvalid must be true or false, not a {type(flag).__name__}.")
        valid.append(bool(flag))
        seen.append(_number(instance, place, "num_lidar_pts") if "num_lidar_pts" in instance else -1)
    return _boxes(np.array(rows).reshape(-1, 9), found, np.array(valid, dtype=bool), _counts(np.array(seen), where))


def _counts(seen: np.ndarray, where: str) -> np.ndarray:
    """[G] int64 of points in boxes, -1 where it is unknown."""
    if (bad := possible.POINTS.impossible(seen) & (seen != -1) | (seen % 1 != 0)).any():
        i = int(np.argmax(bad))
        raise ValueError(f"{where}: box {i} has num_lidar_pts {seen[i]:g}, which must be {possible.POINTS}, or -1.")
    return seen.astype(np.int64)


def _class_of(instance: dict, where: str, names: dict[int, str]) -> str:
    label = _number(instance, where, "bbox_label_3d")
    if label != -1 and label not in names:
        raise ValueError(
            f"{where}: bbox_label_3d {label:g} is neither a number of metainfo.categories nor -1 for none of them."
        )
    return names.get(int(label), "")


def _boxes(boxes: np.ndarray, names: list[str], valid: np.ndarray, seen: np.ndarray) -> dict[str, Any]:
    unknown = ("",) * len(names)
    return {
        "boxes": boxes,
        "names": tuple(names),
        "valid": valid,
        "num_lidar_points": seen,
        "attributes": unknown,
        "visibility": unknown,
        "annotations": unknown,
    }


# --- v1.0 ---


def _tell_of_names(path: Path, infos: list) -> None:
    """Warns of annotations whose name is no class and no category of nuScenes', since they are left out."""
    counts = Counter(name for i, info in enumerate(infos) for name in _names(info, f"{path}: infos[{i}]"))
    if foreign := [name for name in counts if name not in (*CLASSES, *CATEGORIES, "animal", "ignore")]:
        names = ", ".join(printable(name) for name in foreign[:5])
        warnings.warn(
            f"{path}: {sum(counts[name] for name in foreign):,} of {sum(counts.values()):,} annotations are left out, since "
            f"their names are none of nuScenes' ({names}).",
            stacklevel=3,
        )


def _old_frame(info: dict, where: str, folders: bool) -> Frame:
    """One entry of infos: quaternions w x y z with translations, times in microseconds."""
    time = _number(info, where, "timestamp")
    cameras = {}
    for channel, camera in _channels(info, where, "cams"):
        place = f"{where}.cams.{printable(channel)}"
        cameras[channel] = Camera(
            path=_path(get(camera, place, "data_path", str), f"samples/{channel}", folders),
            intrinsics=_numbers(camera, place, "cam_intrinsic", (3, 3)),
            camera_from_lidar=inverse(_sensor2lidar(camera, place)),
            ego_from_camera=_pose(camera, place, "sensor2ego"),
            global_from_ego=_pose(camera, place, "ego2global"),
            timestamp=1e-6 * _number(camera, place, "timestamp"),
            size=_size(camera, place),
        )
    sweeps = []
    for i, sweep in enumerate(optional(info, where, "sweeps", list)):
        place = f"{where}.sweeps[{i}]"
        lag = 1e-6 * (time - _number(sweep, place, "timestamp"))
        file = _path(get(sweep, place, "data_path", str), "sweeps/LIDAR_TOP", folders)
        sweeps.append(Sweep(file, _sensor2lidar(sweep, place), lag))
    boxes = _names(info, where)
    count = len(boxes)
    seen = _numbers(info, where, "num_lidar_pts", (count,)) if count and "num_lidar_pts" in info else np.full(count, -1)
    valid = _numbers(info, where, "valid_flag", (count,)) > 0 if count and "valid_flag" in info else seen != 0
    geometry = np.zeros((0, 9))
    if count:
        velocity = _numbers(info, where, "gt_velocity", (count, 2), finite=False)
        geometry = np.concatenate([_numbers(info, where, "gt_boxes", (count, 7)), velocity], axis=1)
    return Frame(
        token=text(info, where, "token"),
        scene="",
        previous=text(info, where, "prev"),
        timestamp=1e-6 * time,
        lidar_path=_path(get(info, where, "lidar_path", str), "samples/LIDAR_TOP", folders),
        ego_from_lidar=_pose(info, where, "lidar2ego"),
        global_from_ego=_pose(info, where, "ego2global"),
        sweeps=tuple(sweeps),
        cameras=cameras,
        **_boxes(geometry, [n if n in CLASSES else "" for n in boxes], valid, _counts(seen, where)),
    )


def _names(info: Any, where: str) -> list[str]:
    """The names of an entry's annotations."""
    if isinstance(info, dict) and "gt_names" not in info:
        return []
    names = get(info, where, "gt_names", (list, tuple, np.ndarray))
    try:
        if np.ndim(names) == 0:
            raise TypeError
        return [str(name).encode().decode() for name in names]
    except (TypeError, UnicodeError, SystemError):  # an array of text may hold codes that are no letters
        raise ValueError(f"{where}: gt_names must be a list of names.") from None


def _check_length_first(path: Path, frames: list[Frame]) -> None:
    """mmdetection3d before 1.0 wrote the same keys with width before length and another yaw; cars tell them apart."""
    cars = [box for frame in frames for box, name in zip(frame.boxes, frame.names) if name == "car"]
    if cars and np.median([box[3] for box in cars]) < np.median([box[4] for box in cars]):
        raise ValueError(
            f"{path}: its cars are wider than long, so it is of mmdetection3d before 1.0, which counts yaw differently; "
            "make it again with a newer create_data.py, or give the data set root instead."
        )


def _sensor2lidar(tree: dict, where: str) -> np.ndarray:
    result = np.eye(4)
    result[:3, :3] = _numbers(tree, where, "sensor2lidar_rotation", (3, 3))
    result[:3, 3] = _numbers(tree, where, "sensor2lidar_translation", (3,))
    return _rigid(result, where, "sensor2lidar_rotation")


def _pose(tree: dict, where: str, name: str) -> np.ndarray:
    """4 4 from `<name>_rotation` and `<name>_translation`."""
    w, x, y, z = turn = _numbers(tree, where, f"{name}_rotation", (4,))
    if not abs(np.linalg.norm(turn) - 1) <= possible.QUATERNION:
        raise ValueError(f"{where}: {name}_rotation is no quaternion of length 1; the file is damaged, make it again.")
    result = np.eye(4)
    result[:3, :3] = scipy.spatial.transform.Rotation.from_quat([x, y, z, w]).as_matrix()
    result[:3, 3] = _numbers(tree, where, f"{name}_translation", (3,))
    return result


# --- checked access ---


def _size(camera: dict, where: str) -> tuple[int, int] | None:
    """(H, W) of the image file, which mmdetection3d's files of nuScenes leave out."""
    if "height" not in camera or "width" not in camera:
        return None
    return int(_number(camera, where, "height")), int(_number(camera, where, "width"))


def _path(name: str, folder: str, folders: bool) -> str:
    """Relative to the root; `folder` is where a bare name lies if the root has such folders."""
    parts = Path(name).parts
    top = [i for i, part in enumerate(parts) if part in ("samples", "sweeps")]
    if top:
        return "/".join(parts[top[-1] :])
    return f"{folder}/{name}" if folders and len(parts) == 1 else name


def get(tree: Any, where: str, key: str, kind: type | tuple[type, ...]) -> Any:
    """tree[key] for a dotted key, checked to be of type `kind`."""
    value = tree
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"{where}: {key} is missing; the file is not in mmdetection3d's v1.1 or v1.0 info form.")
        value = value[part]
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{where}: {key} must be a {wanted}, not {type(value).__name__}.")
    if isinstance(value, str) and (what := unusable(value)):
        raise ValueError(f"{where}: {key} '{printable(value)}' {what}; repair or remove it.")
    return value


def optional(tree: dict, where: str, key: str, kind: type) -> Any:
    """tree[key], or an empty one of that type if it is missing or null."""
    return kind() if tree.get(key) is None else get(tree, where, key, kind)


def _channels(info: dict, where: str, key: str) -> Iterator[tuple[str, Any]]:
    """(channel, what is said of it) of the cameras."""
    for channel, camera in optional(info, where, key, dict).items():
        if not isinstance(channel, str) or unusable(channel):
            raise ValueError(
                f"{where}: {key} has the channel '{printable(channel)}', which is no text; repair or remove it."
            )
        yield channel, camera


def text(tree: dict, where: str, key: str) -> str:
    """tree[key], also where it is a number; "" if it is missing."""
    return str(get(tree, where, key, (str, int, np.integer))) if key in tree else ""


def _number(tree: Any, where: str, key: str) -> float:
    value = get(tree, where, key, (int, float, np.integer, np.floating))
    try:
        number = float(value)
    except OverflowError:
        number = np.inf
    if not np.isfinite(number):
        raise ValueError(f"{where}: {key} is NaN, infinite or beyond any number; repair or remove the entry.")
    return number


def _numbers(tree: Any, where: str, key: str, shape: tuple[int, ...], *, finite: bool = True) -> np.ndarray:
    """tree[key] as float64 of that shape, its values as they are in the file; null becomes NaN."""
    entries = get(tree, where, key, (list, tuple, np.ndarray))
    try:
        value = np.array(entries, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:  # ragged rows, words, or digits without end
        raise ValueError(f"{where}: {key} must hold numbers in the shape {list(shape)} ({error}).") from error
    if value.shape != shape:
        raise ValueError(f"{where}: {key} must hold numbers in the shape {list(shape)}, not {list(value.shape)}.")
    if finite and not np.isfinite(value).all():
        raise ValueError(f"{where}: {key} has NaN or infinite numbers; repair or remove the entry.")
    return value


def _transform(tree: Any, where: str, key: str, *, unknown: bool = False) -> np.ndarray:
    """tree[key] as a rigid 4 4; NaN (but for the last row) if it is missing and may be `unknown`."""
    *parents, last = key.split(".")
    holder = get(tree, where, ".".join(parents), dict) if parents else tree
    if unknown and isinstance(holder, dict) and holder.get(last) is None:
        return np.concatenate([np.full((3, 4), np.nan), [[0.0, 0.0, 0.0, 1.0]]])
    return _rigid(_numbers(tree, where, key, (4, 4)), where, key)


def _rigid(transform: np.ndarray, where: str, key: str) -> np.ndarray:
    turn = transform[:3, :3]
    if possible.no_rotation(turn) or not np.allclose(transform[3], [0, 0, 0, 1]):
        raise ValueError(f"{where}: {key} is no rotation with a translation; the file is damaged, make it again.")
    return transform


# --- reading ---


def _read_json(path: Path) -> Any:
    try:
        return read_json(path.read_bytes(), finite=False)
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"{path} is not valid JSON ({error}); copy it again.") from error
