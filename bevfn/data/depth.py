"""Depth ground truth of camera images: the key frame's LiDAR points seen by each camera, at its own moment.

A point is (u, v, depth): pixels of the image file and metres along the optical axis. Points are made on the fly or read
from files that `build` made before: one per image, `<image's path in the root>.bin`, little-endian float32, three numbers a
point. In BEVDepth's `depth_gt/` files are called after the image's name alone; a folder of its script can be read too.

Sources: BEVDepth scripts/gen_depth_gt.py and nusc_det_dataset.py (fact sheet bevdepth_r50_2key); BEVNeXt (fact sheet
bevnext_stage1, "Depth ground truth"). Upstream goes through global coordinates of about 1e3 m in float32; here one float64
matrix does, so depths differ by up to 1e-4 m and of BEVDepth's points two in a thousand by a pixel (measured on the golden
frame, where no depth label changes).
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bevfn import host, waiting
from bevfn.data import building, image, points
from bevfn.data.index import Camera, Frame, Index
from bevfn.data.possible import DISTANCE, SIDE
from bevfn.data.reading import Depths
from bevfn.files import checksum, read_json, to_json, write_atomically
from bevfn.names import leaves, printable

MARGIN = 1  # px at the image's border in which points are dropped
NEAR, FAR = 1.0, 60.0  # m, of BEVNeXt's points
DEPTH = "depth.json"
SEALS = "seals.json"  # size and CRC-32 of each file
FRAMES = 32  # of one job
FILES = 256  # of one job that looks at them
FORMAT = 2  # raise it when the files' meaning changes
COLUMNS = 3
BYTES = 4 * COLUMNS


def project(cloud: np.ndarray, camera: Camera, size: tuple[int, int] | None) -> np.ndarray:
    """Which points a camera sees: [P,3] float32 u, v [px of an image of size (H, W)], depth [m], in the cloud's order.

    cloud: [M,3+] in the key frame's lidar frame. Kept are points in front of the camera (depth > 0) that fall more than
    MARGIN inside the image; without a size all in front. Nothing is hidden by what is before it.
    """
    xyz = cloud[:, :3].astype(np.float64) @ camera.camera_from_lidar[:3, :3].T + camera.camera_from_lidar[:3, 3]
    xyz = xyz[xyz[:, 2] > 0]
    seen = xyz @ camera.intrinsics.T
    uv = seen[:, :2] / seen[:, 2:]
    if size is None:
        return np.concatenate([uv, xyz[:, 2:]], axis=1).astype(np.float32)
    inside = ((uv > MARGIN) & (uv < np.array(size[::-1]) - MARGIN)).all(axis=1)
    return np.concatenate([uv, xyz[:, 2:]], axis=1)[inside].astype(np.float32)


def rasterize(seen: np.ndarray, image_aug: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The depth map [H,W] float32 [m] of an image of `size` (H, W) that `image_aug` [4,4] makes of the original one.

    seen: [P,3], see `project`. 0 where no point falls; of several points in a pixel the last one stays, not the nearest.
    Positions are truncated toward zero, as upstream, so the first row and column take points of up to a pixel outside.
    """
    height, width = size
    pixels = (seen[:, :2] @ image_aug[:2, :2].T + image_aug[:2, 3]).astype(np.int32)  # P 2
    inside = ((pixels >= 0) & (pixels < (width, height))).all(axis=1)
    depth = np.zeros(size, dtype=np.float32)
    depth[pixels[inside, 1], pixels[inside, 0]] = seen[inside, 2]
    return depth


def nearest(seen: np.ndarray, image_aug: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`rasterize` by BEVNeXt's rule: positions are rounded (half to even), depths outside of NEAR to FAR do not count, and of
    several points in a pixel the nearest stays.

    Upstream finds it by a float32 key, which leaves the order of points of one pixel open whose depths differ by less than
    1.6 m.
    """
    height, width = size
    seen = seen[(seen[:, 2] >= NEAR) & (seen[:, 2] < FAR)]
    pixels = (seen[:, :2].astype(np.float64) @ image_aug[:2, :2].T + image_aug[:2, 3]).round().astype(np.int64)  # P 2
    inside = ((pixels >= 0) & (pixels < (width, height))).all(axis=1)
    depth = np.full(size, np.inf, dtype=np.float32)
    np.minimum.at(depth, (pixels[inside, 1], pixels[inside, 0]), seen[inside, 2])
    return np.where(np.isfinite(depth), depth, np.float32(0))


def maps(
    index: Index,
    frame: Frame,
    row: list[Camera],
    sizes: list[tuple[int, int]],
    image_size: tuple[int, int],
    moves: list[dict[str, Any]],
    rule: Depths = "last",
) -> tuple[np.ndarray, dict[str, int]]:
    """(depth maps [N,H,W] float32 of a key frame's cameras, counts `bad/points` and `empty/depth`).

    sizes: (H, W) of the image files; moves: arguments of `image.transform`, which makes images of image_size of them.
    The points are those that `build` stored (`stored`), or made of the LiDAR file where there are none.

    Raises ValueError if no point falls into any image.
    """
    files, bad = stored(index, rule), 0
    if files is None:
        cloud, bad = points.scan(frame, index.root)
        # By the nearest rule a point may be seen that the image file had outside, where the augmented image is black.
        seen = [project(cloud, camera, size if rule == "last" else None) for camera, size in zip(row, sizes)]
    else:
        seen = [read(files, camera.path) for camera in row]
    drawn = rasterize if rule == "last" else nearest
    pairs = zip(seen, moves)
    depth = np.stack([drawn(found, image.matrix(size=image_size, **move), image_size) for found, move in pairs])
    lost = not any(len(found) for found in seen) if rule == "last" else not depth.any()
    if lost:
        raise ValueError(
            f"{index.root / frame.lidar_path}: no point falls into an image of key frame {printable(frame.token)}, so its "
            "depth maps are empty; check the calibration, or set depth to False."
        )
    return depth, {"bad/points": bad, "empty/depth": int((depth.max(axis=(1, 2)) == 0).sum())}


def read(files: Path, name: str) -> np.ndarray:
    """The stored points [P,3] float32 of an image, by its path as in the index; `files` is what `folder_of_files` says.

    Raises ValueError if the file is missing, truncated or damaged.
    """
    path, flat = _file(files, name), _file(files, Path(name).name)
    if flat.is_file() and not path.is_file():
        path = flat  # of BEVDepth's script
    try:
        values = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise ValueError(f"{path} does not exist; build depth ground truth with `bevfn data prepare`.") from error
    if len(values) % BYTES:
        raise ValueError(f"{path}: {len(values)} bytes are not a whole number of points of {BYTES}; build it again.")
    seen = values.view("<f4").reshape(-1, COLUMNS)
    if SIDE.impossible(seen[:, :2]).any() or DISTANCE.impossible(seen[:, 2]).any():
        raise ValueError(f"{path} is damaged: it has points that no camera sees; delete it and build it again.")
    return seen


def folder(index: Index) -> Path:
    """Where `bevfn data prepare` puts the depth ground truth of a split."""
    return building.place(index.root, "bevfn_depth") / index.split


def folder_of_files(out: Path, index: Index | None = None) -> Path:
    """The folder of the files that `build` made in `out`. Raises ValueError if there are none, or if they were made of other
    key frames or calibrations than those of `index`."""
    path = Path(out) / DEPTH
    if not path.is_file():
        raise ValueError(f"{path} does not exist; build depth ground truth with `bevfn data prepare`.")
    try:
        content = read_json(path.read_bytes())
        name, origin = content["files"], building.Origin(**content["made_of"])
        if not isinstance(name, str) or not name.startswith("files-") or leaves(name):
            raise ValueError("it names no folder of files")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run `bevfn data prepare` again.") from error
    if index is not None:
        origin.check(path, index, made_of(index))
    return path.parent / name


def prepared(index: Index) -> Path | None:
    """The folder of a split's files where `bevfn data prepare` puts them, None if it made none. Raises ValueError if it made
    them of something else."""
    return folder_of_files(folder(index), index) if (folder(index) / DEPTH).is_file() else None


def made_of(index: Index) -> building.Origin:
    """Everything that decides what the files hold, but for the point files' and images' contents."""
    numbers = ("camera_start", "intrinsics", "camera_from_lidar", "camera_size")
    return building.Origin.of(index, ("token", "lidar_path", "camera_path"), numbers)


def stored(index: Index, rule: Depths) -> Path | None:
    """The `prepared` folder of a split whose points a rule can be applied to; None: it takes the LiDAR's own."""
    return prepared(index) if rule == "last" else None


def damaged(index: Index, *, deep: bool) -> dict[str, str]:
    """Image: what is wrong with its file, of a split's `prepared` ones; `deep` reads them, else their sizes count. Raises
    ValueError where they were made of something else."""
    files = prepared(index)
    return {} if files is None else _damaged(_images(index), files, _seals(files), deep)


def build(index: Index, out: Path, *, workers: int = 1, progress: bool = True) -> Path:
    """Makes the files of all images of `index`, or those that are not there or are damaged; returns their folder, in `out`.

    About 270 kB a key frame on nuScenes. A stopped or killed build goes on where it was. `depth.json`, which names the folder
    and what it was made of, is written last: there are all files or none, or those of the previous build. `seals.json` has
    their checksums, by which a later build finds what was damaged since. The bytes do not depend on the number of workers
    (processes).

    Raises ValueError if a file is missing or damaged, if there is no image, or if another build writes to `out`.
    """
    out = Path(out)
    if not index.channels:
        raise ValueError(
            f"{index.root} ({index.version}, split {index.split!r}) has no camera images to give depth to."
        )
    with building.only_writer(out):
        origin = made_of(index)
        files = out / f"files-{FORMAT}-{origin.files}-{origin.numbers}"
        names = _images(index)
        if files.is_dir():
            for path in filter(Path.is_file, files.rglob(".*")):  # of a killed build
                path.unlink()
            seals = _seals(files)
            jobs = ((part, files, {n: seals[n] for n in part if n in seals}, True) for part in _parts(names))
            bad = {name for found in host.unordered(_damaged, jobs, workers) for name in found}
        else:
            files.mkdir()
            bad = set(names)
        todo = [i for i, frame in enumerate(index) if not bad.isdisjoint(_images_of(frame))]
        with waiting.counted(
            "depth ground truth", len(index), done=len(index) - len(todo), quiet=not progress
        ) as advance:
            for frames in host.unordered(_make, _jobs(index, files, todo), workers):
                advance(frames)
        _seal(files, names, {name for i in todo for name in _images_of(index[i])}, workers)
        write_atomically(out / DEPTH, to_json({"files": files.name, "made_of": asdict(origin)}))
        for stale in set(out.glob("files-*")) - {files}:
            shutil.rmtree(stale, ignore_errors=True)
    return files


def _images_of(frame: Frame) -> Iterator[str]:
    return (camera.path for camera in frame.cameras.values())


def _images(index: Index) -> list[str]:
    return list(dict.fromkeys(name for frame in index for name in _images_of(frame)))


def _parts(names: list[str]) -> Iterator[list[str]]:
    return (names[start : start + FILES] for start in range(0, len(names), FILES))


def _damaged(names: list[str], files: Path, seals: dict[str, tuple[int, int]], deep: bool) -> dict[str, str]:
    """Image: what is wrong with its file, by its seal, or without one by what it holds."""
    found = {}
    for name in names:
        path, seal = _file(files, name), seals.get(name)
        if not path.is_file():
            found[name] = "does not exist"
        elif seal is not None and (checksum(path) if deep else (path.stat().st_size,)) != seal[: 1 + deep]:
            found[name] = "is not what was written"
        elif seal is None and deep:
            try:
                read(files, name)
            except ValueError:
                found[name] = "has no points that a camera sees"
    return found


def _seals(files: Path) -> dict[str, tuple[int, int]]:
    """Image: size and CRC-32 of its file, as far as they were noted; none where that is damaged."""
    try:
        content = read_json((files.parent / SEALS).read_bytes())
        return {str(name): (int(size), int(crc)) for name, (size, crc) in content[files.name].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return {}


def _seal(files: Path, names: list[str], changed: set[str], workers: int) -> None:
    """Notes the checksums of the files that have none yet, or were `changed`."""
    known = _seals(files)
    new = [name for name in names if name in changed or name not in known]
    if new or set(known) != set(names):
        jobs = ((part, files) for part in _parts(new))
        found = {name: seal for seals in host.unordered(_checksums, jobs, workers) for name, seal in seals.items()}
        merged = known | found
        write_atomically(files.parent / SEALS, to_json({files.name: {name: merged[name] for name in names}}))


def _checksums(names: list[str], files: Path) -> dict[str, tuple[int, int]]:
    return {name: checksum(_file(files, name)) for name in names}


def _jobs(index: Index, files: Path, todo: list[int]) -> Iterator[tuple]:
    for start in range(0, len(todo), FRAMES):
        yield [index[i] for i in todo[start : start + FRAMES]], index.root, files


def _make(frames: list[Frame], root: Path, files: Path) -> int:
    """Writes the files of some frames; returns how many frames."""
    for frame in frames:
        cloud, _ = points.scan(frame, root)
        for camera in frame.cameras.values():
            seen = project(cloud, camera, camera.size or image.size(root / camera.path))
            write_atomically(_file(files, camera.path), seen.astype("<f4").tobytes())
    return len(frames)


def _file(files: Path, name: str) -> Path:
    return Path(files) / f"{name}.bin"
