"""A nuScenes root to an Index, through nuscenes-devkit: built once per split, cached, rebuilt when a table changes.

Numbers come out as mmdetection3d's info files have them (up to 10 sweeps, boxes and velocities in the LiDAR frame,
`valid` by LiDAR and radar points), so recipes written for those files find the same samples.

Source: nuscenes-devkit 1.2; mmdetection3d tools/dataset_converters/nuscenes_converter.py (max_sweeps=10).
"""

import contextlib
import io
import json
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.spatial.transform import Rotation

from bevfn.data import building
from bevfn.data.index import CAMERAS, Camera, Frame, Index, Packed, Sweep, inverse, pack
from bevfn.files import write_atomically

TABLES = (
    "category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log", "scene",
    "sample", "sample_data", "sample_annotation", "map",
)  # fmt: skip
# Which tokens must be found in which table; lists of tokens too. Empty tokens (the ends of chains) refer to nothing.
REFERENCES = {
    "instance": {"category_token": "category"},
    "calibrated_sensor": {"sensor_token": "sensor"},
    "scene": {"log_token": "log"},
    "sample": {"scene_token": "scene", "prev": "sample", "next": "sample"},
    "sample_data": {
        "sample_token": "sample",
        "ego_pose_token": "ego_pose",
        "calibrated_sensor_token": "calibrated_sensor",
        "prev": "sample_data",
        "next": "sample_data",
    },
    "sample_annotation": {
        "sample_token": "sample",
        "instance_token": "instance",
        "visibility_token": "visibility",
        "attribute_tokens": "attribute",
        "prev": "sample_annotation",
        "next": "sample_annotation",
    },
    "map": {"log_tokens": "log"},
}
MAX_SWEEPS = 10
FORMAT = 3  # of the cache file; another number makes every older file be rebuilt
# The devkit scores a split only with the version that it belongs to (nuscenes.eval.common.loaders).
BELONGS = {
    "trainval": ("train", "val", "train_detect", "train_track"), "mini": ("mini_train", "mini_val"), "test": ("test",),
}  # fmt: skip


def index(root: Path, version: str, split: str, cache: Path | None = None) -> Index:
    """The key frames of a split, in the order of the sample table; split `test` of v1.0-test has no boxes.

    root: the folder that holds samples/, sweeps/, maps/ and the version's folder of tables; split: one of the devkit's
    (train, val, test, mini_train, mini_val, ...) or a name in the version's splits.json; cache: folder of the cache
    file, else root/.bevfn, else a folder of `$BEVFN_CACHE` (~/.cache/bevfn) if the root cannot be written.
    The first call reads every table, which takes nuScenes' trainval minutes and gigabytes; later ones read one file.
    Processes that call at once wait for the one that builds.

    Raises ValueError, one sentence, for a wrong root, version or split, a split without scenes, and broken tables.
    """
    root = Path(root)
    check_root(root, version)
    header, name = _header(root, version, split), _name(version, split)
    places = [Path(cache)] if cache is not None else [root / ".bevfn", building.home(root)]
    packed = _cached(places, name, header)
    if packed is None:
        scenes = scenes_of(root, version, split)
        with _only_one(places, f"{name}.lock"):
            packed = _cached(places, name, header)  # another process may have been faster
            if packed is None:
                packed = _build(root, version, split, set(scenes))
                _store(places, name, header, packed)
    return Index(root=root, version=version, split=split, frames=packed)


def versions(root: Path) -> list[str]:
    """Names of the folders in `root` that hold tables."""
    return sorted(path.parent.name for path in Path(root).glob("*/sample.json"))


def check_root(root: Path, version: str) -> None:
    """Raises ValueError, which says what folder or version to give, unless root/version is a folder of tables."""
    root = Path(root)
    if not root.is_dir():
        kind = "is a file" if root.is_file() else "does not exist"
        raise ValueError(f"{root} {kind}; give the folder that holds samples/, sweeps/, maps/ and {version}/.")
    if (root / version).is_dir():
        return
    if found := versions(root):
        raise ValueError(f"{root} has no {version}; it has {', '.join(found)}: choose one of these as version.")
    for above in list(root.resolve().parents)[:3]:
        if (above / version).is_dir() or versions(above):
            raise ValueError(f"{root} is inside the data set; give the folder above it as root: {above}.")
    below = sorted({path.parents[1] for depth in ("*/*", "*/*/*") for path in root.glob(f"{depth}/sample.json")})
    if below:
        raise ValueError(f"{root} is above the data set; give the folder inside it as root: {below[0]}.")
    if (root / "frame.json").is_file():
        raise ValueError(f"{root} holds a single key frame (frame.json), no nuScenes data set; give the root of one.")
    raise ValueError(f"{root} has no {version}; extract nuScenes' metadata archive there, or give another root.")


def has_index(root: Path, version: str, split: str) -> bool:
    """Whether `index` would read a cached file."""
    header = _header(root, version, split)
    return _cached([root / ".bevfn", building.home(root)], _name(version, split), header) is not None


def splits(root: Path, version: str) -> dict[str, list[str]]:
    """Split: names of its scenes that the root has, for every split of this version with at least one scene."""
    from nuscenes.utils.splits import create_splits_scenes  # imports for seconds

    folder = Path(root) / version
    here = {str(scene.get("name")) for scene in read_table(folder / "scene.json")}
    ending = next((ending for ending in BELONGS if version.endswith(ending)), None)
    known = {s: names for s, names in create_splits_scenes().items() if ending is None or s in BELONGS[ending]}
    if (folder / "splits.json").is_file():
        known |= _read_json(folder / "splits.json", dict)
    present = {split: [name for name in names if name in here] for split, names in known.items()}
    return {split: names for split, names in present.items() if names}


def scenes_of(root: Path, version: str, split: str) -> list[str]:
    """Names of the split's scenes; raises ValueError if the root has none."""
    present = splits(root, version)
    if split not in present:
        has = f"the splits with scenes there are {', '.join(present)}" if present else "it has no scene of any split"
        raise ValueError(f"{root}, {version}, has no scene of the split {split!r}; {has}.")
    return present[split]


def read_table(path: Path) -> list[dict]:
    """The rows of a table. Raises ValueError if the file is missing, no complete JSON, or not a list of rows."""
    rows = _read_json(path, list)
    if not all(isinstance(row, dict) and ("token" in row) for row in rows):
        raise ValueError(f"{path}: a row has no token; the table is damaged, extract the metadata archive again.")
    return rows


def read_tables(root: Path, version: str) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """(the tables that can be read, table: what is wrong with it for those that are missing, unreadable, or name rows
    that are nowhere)."""
    folder = Path(root) / version
    tables, problems = {}, {}
    for name in TABLES:
        try:
            tables[name] = read_table(folder / f"{name}.json")
        except (ValueError, OSError) as error:
            problems[name] = str(error)
    tokens = {name: {row["token"] for row in rows} for name, rows in tables.items()}
    for name, fields in REFERENCES.items():
        for field, target in fields.items():
            if name not in tables or target not in tables or name in problems:
                continue
            lost = _dangling(tables[name], field, tokens[target])
            if lost:
                problems[name] = (
                    f"{folder / name}.json: {field} of {len(lost)} of {len(tables[name])} rows names no row of "
                    f"{target}.json (the first is {lost[0]!r}); one of the two is incomplete or of another version, "
                    "extract the metadata archive again."
                )
    if "log" not in problems and "map" not in problems:
        mapped = {token for row in tables["map"] for token in row.get("log_tokens", [])}
        if lost := sorted(tokens["log"] - mapped):
            problems["map"] = f"{folder / 'map.json'}: no map names the log {lost[0]!r}; extract the archive again."
    return tables, problems


def _dangling(rows: list[dict], field: str, tokens: set[str]) -> list[Any]:
    """Values of `field` that are not in `tokens`, one per row that has such a value."""
    lost = []
    for row in rows:
        value = row.get(field)
        values = value if isinstance(value, list) else [value]
        lost += [token for token in values if token != "" and token not in tokens][:1]
    return lost


def _read_json(path: Path, kind: type) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; extract nuScenes' metadata archive again.")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(
            f"{path} is truncated or damaged ({error}); extract nuScenes' metadata archive again."
        ) from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a {kind.__name__}; extract the archive again.")
    return content


# --- building ---


def _build(root: Path, version: str, split: str, scenes: set[str]) -> Packed:
    """Reads the tables; a failure of the devkit is looked into, because it only says which token it missed."""
    from nuscenes import NuScenes  # imports for seconds

    try:
        tables = NuScenes(version=version, dataroot=str(root), verbose=False)
        samples = [s for s in tables.sample if tables.get("scene", s["scene_token"])["name"] in scenes]
        console = Console(stderr=True)
        steps = track(samples, f"index of {version} {split}", console=console, disable=not console.is_terminal)
        frames = pack(_frame(tables, sample) for sample in steps)
    except (LookupError, ValueError, TypeError, AttributeError, AssertionError, OSError) as error:
        _, problems = read_tables(root, version)
        missing = [] if problems else missing_maps(root, version)
        what = next(iter(problems.values()), "") or (
            f"{missing[0]} does not exist but {version}/map.json names it; extract nuScenes' maps archive."
            if missing
            else f"{root / version}: nuscenes-devkit cannot read the tables ({type(error).__name__}: {error})."
        )
        raise ValueError(what) from error
    if not len(frames):
        raise ValueError(f"{root / version}: sample.json has no key frame of the split {split!r}; extract it again.")
    return frames


def missing_maps(root: Path, version: str) -> list[Path]:
    """The map images that map.json names and the root lacks; the devkit does not start without them."""
    files = [Path(root) / row["filename"] for row in read_table(Path(root) / version / "map.json")]
    return [file for file in files if not file.is_file()]


def _frame(tables: Any, sample: dict) -> Frame:
    """One row of the sample table; `tables` is a devkit NuScenes."""
    if "LIDAR_TOP" not in sample["data"]:
        raise ValueError(f"sample {sample['token']} has no LIDAR_TOP in sample_data.json.")
    lidar = tables.get("sample_data", sample["data"]["LIDAR_TOP"])
    ego_from_lidar, global_from_ego = _poses(tables, lidar)
    lidar_from_global = inverse(global_from_ego @ ego_from_lidar)
    time = 1e-6 * lidar["timestamp"]

    sweeps: list[Sweep] = []
    scan = lidar
    while scan["prev"] and len(sweeps) < MAX_SWEEPS:
        scan = tables.get("sample_data", scan["prev"])
        ego_from_scan, global_from_then = _poses(tables, scan)
        lag = 1e-6 * (lidar["timestamp"] - scan["timestamp"])
        sweeps.append(Sweep(scan["filename"], lidar_from_global @ global_from_then @ ego_from_scan, lag))

    cameras = {}
    for channel in CAMERAS:
        if channel in sample["data"]:
            image = tables.get("sample_data", sample["data"][channel])
            ego_from_camera, global_from_then = _poses(tables, image)
            calibration = tables.get("calibrated_sensor", image["calibrated_sensor_token"])
            cameras[channel] = Camera(
                path=image["filename"],
                intrinsics=np.array(calibration["camera_intrinsic"], dtype=np.float64).reshape(3, 3),
                camera_from_lidar=inverse(lidar_from_global @ global_from_then @ ego_from_camera),
                ego_from_camera=ego_from_camera,
                global_from_ego=global_from_then,
                timestamp=1e-6 * image["timestamp"],
                size=(image["height"], image["width"]),
            )
    return Frame(
        token=sample["token"],
        scene=tables.get("scene", sample["scene_token"])["name"],
        previous=sample["prev"],
        timestamp=time,
        lidar_path=lidar["filename"],
        ego_from_lidar=ego_from_lidar,
        global_from_ego=global_from_ego,
        sweeps=tuple(sweeps),
        cameras=cameras,
        **_annotations(tables, sample["anns"], lidar_from_global),
    )


def _annotations(tables: Any, tokens: list[str], lidar_from_global: np.ndarray) -> dict[str, Any]:
    """The Frame's fields of boxes, in the sample's order of annotations."""
    from nuscenes.eval.detection.utils import category_to_detection_name

    rows = [tables.get("sample_annotation", token) for token in tokens]
    turn = lidar_from_global[:3, :3]
    boxes = np.zeros((len(rows), 9))
    if rows:
        centres = np.array([row["translation"] for row in rows])  # G 3, global
        quaternions = np.array([row["rotation"] for row in rows])  # G 4, w x y z
        lidar_from_box = turn @ Rotation.from_quat(quaternions[:, [1, 2, 3, 0]]).as_matrix()  # G 3 3
        velocities = np.array([tables.box_velocity(token) for token in tokens])  # G 3, global, NaN where unknown
        velocities[:, 2] = 0.0  # as upstream: the horizontal part is turned
        boxes[:, :3] = centres @ turn.T + lidar_from_global[:3, 3]
        boxes[:, 3:6] = np.array([row["size"] for row in rows])[:, [1, 0, 2]]  # width length height -> dx dy dz
        # The yaw of pyquaternion's yaw_pitch_roll, which upstream takes; atan2(R10, R00) differs where the car tilts.
        boxes[:, 6] = np.arctan2(-lidar_from_box[:, 0, 1], lidar_from_box[:, 0, 0])
        boxes[:, 7:9] = (velocities @ turn.T)[:, :2]
    seen = np.array([(row["num_lidar_pts"], row["num_radar_pts"]) for row in rows], dtype=np.int64).reshape(-1, 2)
    attributes = (row["attribute_tokens"][:1] for row in rows)
    levels = (row.get("visibility_token") for row in rows)
    return {
        "boxes": boxes,
        "names": tuple(category_to_detection_name(row["category_name"]) or "" for row in rows),
        "valid": seen.sum(axis=1) > 0,
        "num_lidar_points": seen[:, 0],
        "attributes": tuple(tables.get("attribute", a[0])["name"] if a else "" for a in attributes),
        "visibility": tuple(tables.get("visibility", level)["level"] if level else "" for level in levels),
        "annotations": tuple(tokens),
        "categories": tuple(row["category_name"] for row in rows),
    }


def _poses(tables: Any, data: dict) -> tuple[np.ndarray, np.ndarray]:
    """(ego_from_sensor, global_from_ego), both 4 4 float64, of a row of sample_data."""
    from nuscenes.utils.geometry_utils import transform_matrix
    from pyquaternion import Quaternion

    rows = (
        tables.get("calibrated_sensor", data["calibrated_sensor_token"]),
        tables.get("ego_pose", data["ego_pose_token"]),
    )
    first, second = (transform_matrix(row["translation"], Quaternion(row["rotation"])) for row in rows)
    return first, second


# --- cache ---


def _name(version: str, split: str) -> str:
    return f"index-{version}-{split}.npz"


def _header(root: Path, version: str, split: str) -> dict[str, Any]:
    """What a cached file must have been made of: size and mtime [ns] of every table."""
    stats = {name: root / version / f"{name}.json" for name in (*TABLES, "splits")}
    tables = {name: [(s := path.stat()).st_size, s.st_mtime_ns] for name, path in stats.items() if path.is_file()}
    return {"format": FORMAT, "version": version, "split": split, "tables": tables}


def _cached(places: list[Path], name: str, header: dict) -> Packed | None:
    """The stored columns if one of the places has them and they belong to the tables as they are now."""
    for place in places:
        try:
            with np.load(place / name, allow_pickle=False) as file:
                if json.loads(str(file["header"])) == header:
                    return Packed({key: file[key] for key in file.files if key != "header"})
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
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
