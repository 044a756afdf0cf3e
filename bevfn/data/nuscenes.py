"""A nuScenes root to an Index, through nuscenes-devkit: built once per split, cached, rebuilt when a table changes.

Numbers come out as mmdetection3d's info files have them (up to 10 sweeps, boxes and velocities in the LiDAR frame,
`valid` by LiDAR and radar points), so recipes written for those files find the same samples.

Source: nuscenes-devkit 1.2; mmdetection3d tools/dataset_converters/nuscenes_converter.py (max_sweeps=10).
"""

import contextlib
import io
import json
import math
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.spatial.transform import Rotation

from bevfn.data import building, faults, possible, tables
from bevfn.data.index import CAMERAS, Camera, Frame, Index, Packed, Sweep, inverse, pack
from bevfn.files import write_atomically
from bevfn.names import printable, sentence
from bevfn.synth.tables import CATEGORIES  # nuScenes' 23

MAX_SWEEPS = 10
ANNOTATIONS = "sample_annotation"
FORMAT = 4  # of the cache file; another number makes every older file be rebuilt


def index(root: Path, version: str, split: str, cache: Path | None = None) -> Index:
    """The key frames of a split, in the order of the sample table; split `test` of v1.0-test has no boxes.

    root: the folder that holds samples/, sweeps/, maps/ and the version's folder of tables; split: one of the devkit's
    (train, val, test, mini_train, mini_val, ...) or a name in the version's splits.json; cache: folder of the cache
    file, else root/.bevfn, else a folder of `$BEVFN_CACHE` (~/.cache/bevfn) if the root cannot be written.
    The first call reads every table, which takes nuScenes' trainval minutes and gigabytes; later ones read one file.
    Processes that call at once wait for the one that builds.

    Raises ValueError, one sentence, for a wrong root, version or split, a split without scenes, broken tables, and values
    that are not possible, which names the annotation or key frame.
    """
    packed = faults.refuse(frames(root, version, split, cache), f"{Path(root) / version}")
    return Index(root=Path(root), version=version, split=split, frames=packed)


def frames(root: Path, version: str, split: str, cache: Path | None = None, *, keep: bool = True) -> Packed:
    """What `index` has, whatever its values are: for `bevfn data check`, which writes nothing (`keep` False)."""
    root = Path(root)
    tables.check_root(root, version)
    header, name = _header(root, version, split), _name(version, split)
    places = [Path(cache)] if cache is not None else [root / ".bevfn", building.home(root)]
    packed = _cached(places, name, header)
    if packed is None and not keep:
        return _build(root, version, split, set(tables.scenes_of(root, version, split)))
    if packed is None:
        scenes = tables.scenes_of(root, version, split)
        with _only_one(places, f"{name}.lock"):
            packed = _cached(places, name, header)  # another process may have been faster
            if packed is None:
                packed = _build(root, version, split, set(scenes))
                _store(places, name, header, packed)
    return packed


def has_index(root: Path, version: str, split: str) -> bool:
    """Whether `index` would read a cached file."""
    header = _header(root, version, split)
    return _cached([root / ".bevfn", building.home(root)], _name(version, split), header) is not None


# --- building ---


class _Impossible(ValueError):
    """What a row says that cannot be; the sentence names it."""


def _build(root: Path, version: str, split: str, scenes: set[str]) -> Packed:
    """Reads the tables; a failure of the devkit is looked into, because it only says which token it missed."""
    from nuscenes import NuScenes  # imports for seconds

    try:
        devkit = NuScenes(version=version, dataroot=str(root), verbose=False)
        _check_rows(devkit)
        samples = [s for s in devkit.sample if devkit.get("scene", s["scene_token"])["name"] in scenes]
        console = Console(stderr=True)
        steps = track(samples, f"index of {version} {split}", console=console, disable=not console.is_terminal)
        packed = pack(_frame(devkit, sample) for sample in steps)
        _tell_of_categories(devkit, root / version)
    except _Impossible as error:
        raise ValueError(f"{root / version}: {error}.") from None
    except Exception as error:  # of the devkit: nearly any
        _, problems = tables.read_tables(root, version)
        missing = [] if problems else tables.missing_maps(root, version)
        what = next(iter(problems.values()), "") or (
            f"{printable(missing[0])} does not exist but {version}/map.json names it; extract nuScenes' maps archive."
            if missing
            else f"{root / version}: nuscenes-devkit cannot read the tables ({type(error).__name__}: {sentence(error)})."
        )
        raise ValueError(what) from error
    if not len(packed):
        raise ValueError(f"{root / version}: sample.json has no key frame of the split {split!r}; extract it again.")
    return packed


def _check_rows(devkit: Any) -> None:
    """Raises _Impossible for what the devkit takes as it comes: seconds of the minutes that nuScenes' trainval takes."""
    rows = {name: getattr(devkit, name) for name in tables.TABLES}
    for name in tables.TABLES:
        if len(devkit._token2ind[name]) < len(rows[name]):  # it has the last one
            raise _Impossible(f"several rows of {name}.json have the same token; extract the metadata archive again")
    for name, what in tables.wrong(rows).items():
        raise _Impossible(f"{name}.json: {what}; extract the metadata archive again")


def _tell_of_categories(devkit: Any, where: Path) -> None:
    """Warns of annotations whose category is none of nuScenes', since they are left out; raises _Impossible if all are."""
    counts = Counter(row["category_name"] for row in devkit.sample_annotation)
    foreign = {name: count for name, count in counts.items() if name not in CATEGORIES}
    if not foreign:
        return
    names = ", ".join(printable(name) for name in list(foreign)[:5])
    if len(foreign) == len(counts):
        raise _Impossible(f"its categories ({names}) are none of nuScenes', so no object could be learned")
    warnings.warn(
        f"{where}: {sum(foreign.values()):,} of {sum(counts.values()):,} annotations are left out, since their categories are "
        f"none of nuScenes' ({names}).",
        stacklevel=4,
    )


def _frame(devkit: Any, sample: dict) -> Frame:
    """One row of the sample table; `devkit` is a devkit NuScenes."""
    if "LIDAR_TOP" not in sample["data"]:
        raise _Impossible(f"key frame {printable(sample['token'])} has no LIDAR_TOP in sample_data.json")
    lidar = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
    _check_times(devkit, sample, lidar)
    ego_from_lidar, global_from_ego = _poses(devkit, lidar)
    lidar_from_global = inverse(global_from_ego @ ego_from_lidar)
    time = 1e-6 * lidar["timestamp"]

    sweeps: list[Sweep] = []
    scan = lidar
    while scan["prev"] and len(sweeps) < MAX_SWEEPS:
        scan = _previous(devkit, scan)
        ego_from_scan, global_from_then = _poses(devkit, scan)
        lag = 1e-6 * (lidar["timestamp"] - scan["timestamp"])
        sweeps.append(Sweep(scan["filename"], lidar_from_global @ global_from_then @ ego_from_scan, lag))

    cameras = {}
    for channel in CAMERAS:
        if channel in sample["data"]:
            image = devkit.get("sample_data", sample["data"][channel])
            ego_from_camera, global_from_then = _poses(devkit, image)
            calibration = devkit.get("calibrated_sensor", image["calibrated_sensor_token"])
            cameras[channel] = Camera(
                path=image["filename"],
                intrinsics=_numbers("calibrated_sensor", [calibration], "camera_intrinsic", (3, 3))[0],
                camera_from_lidar=inverse(lidar_from_global @ global_from_then @ ego_from_camera),
                ego_from_camera=ego_from_camera,
                global_from_ego=global_from_then,
                timestamp=1e-6 * image["timestamp"],
                size=(image["height"], image["width"]),
            )
    return Frame(
        token=sample["token"],
        scene=devkit.get("scene", sample["scene_token"])["name"],
        previous=sample["prev"],
        timestamp=time,
        lidar_path=lidar["filename"],
        ego_from_lidar=ego_from_lidar,
        global_from_ego=global_from_ego,
        sweeps=tuple(sweeps),
        cameras=cameras,
        **_annotations(devkit, sample["anns"], lidar_from_global),
    )


def _check_times(devkit: Any, sample: dict, lidar: dict) -> None:
    """A key frame's own time, by which velocities are divided: about that of its scan, and after the one before it."""
    offset, token = 1e-6 * (sample["timestamp"] - lidar["timestamp"]), printable(sample["token"])
    if possible.OFFSET.impossible(np.array(offset)):
        raise _Impossible(f"key frame {token} is {offset:g} s after its LiDAR scan, which must be {possible.OFFSET}")
    if not sample["prev"]:
        return
    before = devkit.get("sample", sample["prev"])
    if before["scene_token"] != sample["scene_token"]:
        raise _Impossible(f"key frame {token} has its `prev` in another scene")
    if before["timestamp"] >= sample["timestamp"]:
        raise _Impossible(f"key frame {token} is not later than its `prev`, by timestamp of sample.json")


def _previous(devkit: Any, scan: dict) -> dict:
    """The scan before, of the same sensor in the same scene."""
    before = devkit.get("sample_data", scan["prev"])
    scenes = [devkit.get("sample", row["sample_token"])["scene_token"] for row in (before, scan)]
    if before["channel"] != scan["channel"] or scenes[0] != scenes[1]:
        raise _Impossible(
            f"row {printable(scan['token'])} of sample_data.json has its `prev` in another scene or sensor"
        )
    return before


def _annotations(devkit: Any, tokens: list[str], lidar_from_global: np.ndarray) -> dict[str, Any]:
    """The Frame's fields of boxes, in the sample's order of annotations."""
    from nuscenes.eval.detection.utils import category_to_detection_name

    rows = [devkit.get("sample_annotation", token) for token in tokens]
    turn = lidar_from_global[:3, :3]
    boxes = np.zeros((len(rows), 9))
    if rows:
        centres = _numbers(ANNOTATIONS, rows, "translation", (3,))  # G 3, global
        quaternions = _quaternions(ANNOTATIONS, rows)  # G 4, w x y z
        lidar_from_box = turn @ Rotation.from_quat(quaternions[:, [1, 2, 3, 0]]).as_matrix()  # G 3 3
        _check_links(devkit, rows)
        velocities = np.array([devkit.box_velocity(token) for token in tokens])  # G 3, global, NaN where unknown
        velocities[:, 2] = 0.0  # as upstream: the horizontal part is turned
        boxes[:, :3] = centres @ turn.T + lidar_from_global[:3, 3]
        boxes[:, 3:6] = _numbers(ANNOTATIONS, rows, "size", (3,))[:, [1, 0, 2]]  # width length height -> dx dy dz
        # The yaw of pyquaternion's yaw_pitch_roll, which upstream takes; atan2(R10, R00) differs where the car tilts.
        boxes[:, 6] = np.arctan2(-lidar_from_box[:, 0, 1], lidar_from_box[:, 0, 0])
        boxes[:, 7:9] = (velocities @ turn.T)[:, :2]
    seen = np.stack([_counts(rows, f"num_{sensor}_pts") for sensor in ("lidar", "radar")], axis=1)  # G 2
    levels = (row.get("visibility_token") for row in rows)
    return {
        "boxes": boxes,
        "names": tuple(category_to_detection_name(row["category_name"]) or "" for row in rows),
        "valid": seen.sum(axis=1) > 0,
        "num_lidar_points": seen[:, 0],
        "attributes": tuple(
            ", ".join(devkit.get("attribute", token)["name"] for token in row["attribute_tokens"]) for row in rows
        ),
        "visibility": tuple(devkit.get("visibility", level)["level"] if level else "" for level in levels),
        "annotations": tuple(tokens),
        "categories": tuple(row["category_name"] for row in rows),
    }


def _check_links(devkit: Any, rows: list[dict]) -> None:
    """Annotations' prev and next, between which velocities are measured: other annotations of the same object."""
    for row in rows:
        for name in ("prev", "next"):
            if not row[name]:
                continue
            other = devkit.get(ANNOTATIONS, row[name])
            if other is row or other["instance_token"] != row["instance_token"]:
                whose = "itself" if other is row else "of another object"
                raise _Impossible(f"annotation {printable(row['token'])} has a `{name}` that is {whose}")


def _counts(rows: list[dict], field: str) -> np.ndarray:
    """[G] int64."""
    counts = _numbers(ANNOTATIONS, rows, field, ())
    if (bad := possible.POINTS.impossible(counts) | (counts % 1 != 0)).any():
        i = int(np.argmax(bad))
        raise _Impossible(
            f"annotation {printable(rows[i]['token'])} has {field} {counts[i]:g}, which must be {possible.POINTS}"
        )
    return counts.astype(np.int64)


def _numbers(table: str, rows: list[dict], field: str, shape: tuple[int, ...]) -> np.ndarray:
    """That field of the rows, [n, *shape] float64. Raises _Impossible for a row that has no such numbers."""
    try:
        values = np.array([row[field] for row in rows], dtype=np.float64).reshape(len(rows), *shape)
    except (KeyError, TypeError, ValueError, OverflowError):
        for row in rows if len(rows) > 1 else ():
            _numbers(table, [row], field, shape)
        what = "number" if not shape else f"{' x '.join(map(str, shape))} numbers"
        raise _Impossible(f"{table} {printable(rows[0]['token'])} has no {field} of {what}") from None
    return values


def _quaternions(table: str, rows: list[dict]) -> np.ndarray:
    """[n,4], w x y z, of unit length."""
    values = _numbers(table, rows, "rotation", (4,))
    bad = ~(np.abs(np.linalg.norm(values, axis=1) - 1) <= possible.QUATERNION)
    if bad.any():
        row = rows[int(np.argmax(bad))]
        raise _Impossible(f"{table} {printable(row['token'])} has a rotation that is no quaternion of length 1")
    return values


def _poses(devkit: Any, data: dict) -> tuple[np.ndarray, np.ndarray]:
    """(ego_from_sensor, global_from_ego), both 4 4 float64, of a row of sample_data."""
    from nuscenes.utils.geometry_utils import transform_matrix
    from pyquaternion import Quaternion

    def pose(table: str) -> np.ndarray:
        row = devkit.get(table, data[f"{table}_token"])
        if not _is_pose(row):  # then one of these says why
            _quaternions(table, [row])
            _numbers(table, [row], "translation", (3,))
        return transform_matrix(row["translation"], Quaternion(row["rotation"]))

    return pose("calibrated_sensor"), pose("ego_pose")


def _is_pose(row: dict) -> bool:
    """Cheap, as every sweep asks for it twice."""
    try:
        turn, moved = row["rotation"], row["translation"]
        return len(turn) == 4 and len(moved) == 3 and abs(math.hypot(*turn) - 1) <= possible.QUATERNION
    except (KeyError, TypeError, OverflowError):
        return False


# --- cache ---


def _name(version: str, split: str) -> str:
    return f"index-{version}-{split}.npz"


def _header(root: Path, version: str, split: str) -> dict[str, Any]:
    """What a cached file must have been made of: size and mtime [ns] of every table."""
    stats = {name: root / version / f"{name}.json" for name in (*tables.TABLES, "splits")}
    stated = {name: [(s := path.stat()).st_size, s.st_mtime_ns] for name, path in stats.items() if path.is_file()}
    return {"format": FORMAT, "version": version, "split": split, "tables": stated}


def _cached(places: list[Path], name: str, header: dict) -> Packed | None:
    """The stored columns if one of the places has them and they belong to the tables as they are now."""
    for place in places:
        try:
            with np.load(place / name, allow_pickle=False) as file:
                if json.loads(str(file["header"])) == header:
                    return Packed({key: file[key] for key in pack(()).columns})
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            warnings.warn(f"{place / name} is damaged ({error}); the index is built again.", stacklevel=3)
    return None


def _store(places: list[Path], name: str, header: dict, packed: Packed) -> None:
    """Writes the columns to the first place that takes them; without any, the next run builds again."""
    buffer = io.BytesIO()
    np.savez(buffer, header=np.array(json.dumps(header)), **packed.columns)
    reasons = []
    for place in places:
        try:
            return write_atomically(place / name, buffer.getvalue())
        except OSError as error:
            reasons.append(f"{place}: {error.strerror or error}")
    warnings.warn(f"the index cannot be kept ({'; '.join(reasons)}), so the next run builds it again.", stacklevel=3)


@contextlib.contextmanager
def _only_one(places: list[Path], name: str) -> Iterator[None]:
    """Holds a lock that other processes wait for; none where no place can be written or locked (then all build)."""
    with contextlib.ExitStack() as stack:
        for place in places:
            with contextlib.suppress(OSError, ImportError):
                import fcntl  # not on Windows

                place.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(place / name, "w"))
                fcntl.flock(file, fcntl.LOCK_EX)  # the system drops it when the process ends, however it ends
                break
        yield
