"""What a data set knows about its key frames, without pixels or points: files, times, transforms, annotations.

`nuscenes.index`, `t4.index`, `own.index` and `infos.read` make an Index; `scene.load` turns its frames into Samples. Transforms
are named target_from_source, 4 4 float64, and move column vectors. The frames of a large data set are kept as columns (`pack`)
and made when asked for: nuScenes' 28,130 training frames as Python objects would take gigabytes in every process.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from bevfn.names import printable, unusable

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
CLASSES = (
    *("car", "truck", "trailer", "bus", "construction_vehicle"),
    *("bicycle", "motorcycle", "pedestrian", "traffic_cone", "barrier"),
)

Part = Literal["lidar", "ego poses", "velocity", "scenes"]
Metric = Literal["nuscenes", "t4", "recall"]


def inverse(transform: np.ndarray) -> np.ndarray:
    """Of a rigid 4 4 transform, in its dtype: the rotation transposed, exact where a general inverse would round.

    Of float32 every sum is rounded and no product, in the order of the axes, as where the golden cases were made: what BLAS
    does depends on the machine.
    """
    result = np.eye(4, dtype=transform.dtype)
    result[:3, :3] = transform[:3, :3].T
    products = transform[:3, :3].T * transform[:3, 3].astype(np.float64)  # 3 3
    total = products[:, 0].astype(transform.dtype)
    for product in products[:, 1:].T:
        total = (total + product).astype(transform.dtype)
    result[:3, 3] = -total
    return result


@dataclass(frozen=True)
class Camera:
    """One exposure of one camera that belongs to a key frame."""

    path: str
    """The image file, relative to Index.root."""
    intrinsics: np.ndarray
    """3 3 float64: pixels of the image file from the camera frame."""
    camera_from_lidar: np.ndarray
    """4 4 float64: the key frame's lidar frame to the camera, through both ego poses (the car moves in between)."""
    ego_from_camera: np.ndarray
    """4 4 float64."""
    global_from_ego: np.ndarray
    """4 4 float64, at the camera's own time."""
    timestamp: float
    """s."""
    size: tuple[int, int] | None = None
    """(H, W) of the image file in pixels, for which the intrinsics are made; None where the data set does not say."""


@dataclass(frozen=True)
class Sweep:
    """An earlier LiDAR scan, to be added to the key frame's points."""

    path: str
    """The point file, relative to Index.root."""
    lidar_from_sweep: np.ndarray
    """4 4 float64: the sweep's lidar frame to the key frame's, through both ego poses."""
    lag: float
    """s: the key frame's time minus the sweep's, > 0."""


@dataclass(frozen=True)
class Frame:
    """One key frame (a nuScenes sample) with G annotated boxes."""

    token: str
    """The sample's token."""
    scene: str
    """The scene's name, of T4 its folder without the revision; "" where the source does not say. No two scenes share one."""
    previous: str
    """Token of the previous key frame of the scene; "" for the first one."""
    timestamp: float
    """s, of the LiDAR scan."""
    lidar_path: str
    """The point file, relative to Index.root."""
    ego_from_lidar: np.ndarray
    """4 4 float64."""
    global_from_ego: np.ndarray
    """4 4 float64, at the LiDAR's time."""
    sweeps: tuple[Sweep, ...]
    """Newest first, at most 10."""
    cameras: dict[str, Camera]
    """By channel, in the order of CAMERAS."""
    boxes: np.ndarray
    """G 9 float64: x y z of the GRAVITY centre, dx (length), dy (width), dz, yaw, vx, vy [m, rad, m/s; lidar frame];
    velocity NaN where unknown."""
    names: tuple[str, ...]
    """G detection classes ("car"); "" for a category that is none."""
    valid: np.ndarray
    """G bool: LiDAR + radar points > 0."""
    num_lidar_points: np.ndarray
    """G int64; -1 where unknown."""
    attributes: tuple[str, ...]
    """G attribute names, "" for none; "a, b" for two, which nuScenes never has."""
    visibility: tuple[str, ...]
    """G visibility levels ("v60-80"), "" where unknown."""
    annotations: tuple[str, ...]
    """G annotation tokens, "" where unknown."""
    categories: tuple[str, ...] = ()
    """G categories of the data set, finer than names ("human.pedestrian.child"); () where the source does not say."""
    columns: str = ""
    """What the numbers of a point are in its clouds' files, see `points.Layout`; "": nuScenes' five."""
    lidar_from_scan: np.ndarray = field(default_factory=lambda: np.eye(4))
    """4 4 float64: what moves the points of `lidar_path`, as they are in the file, to the lidar frame."""

    def rig(self, channels: tuple[str, ...]) -> list[Camera]:
        """The cameras of these channels, in their order. Raises ValueError if one is missing."""
        missing = [channel for channel in channels if channel not in self.cameras]
        if missing:
            has = ", ".join(map(printable, self.cameras)) or "no camera"
            raise ValueError(
                f"key frame {printable(self.token)} has no {', '.join(missing)}, which the reading's Cameras.channels name; it "
                f"has {has}."
            )
        return [self.cameras[channel] for channel in channels]

    def ego_poses(self, channels: tuple[str, ...]) -> np.ndarray:
        """N 4 4 float64: global_from_ego at these cameras' times. Raises ValueError if one is missing or unknown."""
        poses = np.stack([camera.global_from_ego for camera in self.rig(channels)])
        if not np.isfinite(poses).all():
            raise ValueError(
                f"key frame {printable(self.token)} has cameras without ego pose; read the data set's own tables."
            )
        return poses

    @property
    def global_from_lidar(self) -> np.ndarray:
        """4 4 float64."""
        return self.global_from_ego @ self.ego_from_lidar


@dataclass(frozen=True)
class Packed(Sequence):
    """Frames as columns: F of them with S sweeps, N camera images and G boxes in all. Pickles, copies and stores well.

    Transforms lack their last row; text that repeats is a code into `<column>_words`; the rows of frame i in a table
    of sweeps, cameras or boxes are those from `<table>_start[i]` to `<table>_start[i + 1]`.
    """

    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["token"])

    def __getitem__(self, i: int) -> Frame:  # type: ignore[override]  # no slices
        if not -len(self) <= i < len(self):
            raise IndexError(f"frame {i} of {len(self)}")
        i %= len(self)
        column = self.columns

        def rows(table: str) -> slice:
            return slice(int(column[f"{table}_start"][i]), int(column[f"{table}_start"][i + 1]))

        def words(name: str, where: slice) -> tuple[str, ...]:
            return tuple(column[f"{name}_words"][code].decode() for code in column[name][where])

        sweeps, cameras, boxes, one = rows("sweep"), rows("camera"), rows("box"), slice(i, i + 1)
        return Frame(
            token=column["token"][i].decode(),
            scene=words("scene", one)[0],
            previous=column["previous"][i].decode(),
            timestamp=float(column["timestamp"][i]),
            lidar_path=column["lidar_path"][i].decode(),
            ego_from_lidar=_square(column["ego_from_lidar"][i]),
            global_from_ego=_square(column["global_from_ego"][i]),
            sweeps=tuple(
                Sweep(column["sweep_path"][k].decode(), _square(column["sweep_transform"][k]), float(lag))
                for k, lag in enumerate(column["sweep_lag"][sweeps], sweeps.start)
            ),
            cameras={
                channel: Camera(
                    path=column["camera_path"][k].decode(),
                    intrinsics=column["intrinsics"][k].copy(),
                    camera_from_lidar=_square(column["camera_from_lidar"][k]),
                    ego_from_camera=_square(column["ego_from_camera"][k]),
                    global_from_ego=_square(column["camera_global_from_ego"][k]),
                    timestamp=float(column["camera_timestamp"][k]),
                    size=_size(column["camera_size"][k]),
                )
                for k, channel in enumerate(words("channel", cameras), cameras.start)
            },
            boxes=column["boxes"][boxes].copy(),
            names=words("names", boxes),
            valid=column["valid"][boxes].copy(),
            num_lidar_points=column["num_lidar_points"][boxes].astype(np.int64),
            attributes=words("attributes", boxes),
            visibility=words("visibility", boxes),
            annotations=tuple(token.decode() for token in column["annotation"][boxes]),
            categories=categories if any(categories := words("categories", boxes)) else (),
            columns=words("columns", one)[0],
            lidar_from_scan=_square(column["lidar_from_scan"][i]),
        )

    @property
    def nbytes(self) -> int:
        """Memory of the columns."""
        return sum(value.nbytes for value in self.columns.values())


def pack(frames: Iterable[Frame]) -> Packed:
    """The frames as columns; what is taken out again equals what was put in."""
    frames = list(frames)
    sweeps = [sweep for frame in frames for sweep in frame.sweeps]
    cameras = [camera for frame in frames for camera in frame.cameras.values()]
    columns = {
        "token": _texts("token", (frame.token for frame in frames)),
        "previous": _texts("previous", (frame.previous for frame in frames)),
        "timestamp": np.array([frame.timestamp for frame in frames], dtype=np.float64),
        "lidar_path": _texts("lidar_path", (frame.lidar_path for frame in frames)),
        "ego_from_lidar": _transforms(frame.ego_from_lidar for frame in frames),
        "global_from_ego": _transforms(frame.global_from_ego for frame in frames),
        "lidar_from_scan": _transforms(frame.lidar_from_scan for frame in frames),
        "sweep_start": _starts(len(frame.sweeps) for frame in frames),
        "sweep_path": _texts("sweep_path", (sweep.path for sweep in sweeps)),
        "sweep_transform": _transforms(sweep.lidar_from_sweep for sweep in sweeps),
        "sweep_lag": np.array([sweep.lag for sweep in sweeps], dtype=np.float64),
        "camera_start": _starts(len(frame.cameras) for frame in frames),
        "camera_path": _texts("camera_path", (camera.path for camera in cameras)),
        "intrinsics": np.array([camera.intrinsics for camera in cameras], dtype=np.float64).reshape(-1, 3, 3),
        "camera_from_lidar": _transforms(camera.camera_from_lidar for camera in cameras),
        "ego_from_camera": _transforms(camera.ego_from_camera for camera in cameras),
        "camera_global_from_ego": _transforms(camera.global_from_ego for camera in cameras),
        "camera_timestamp": np.array([camera.timestamp for camera in cameras], dtype=np.float64),
        "camera_size": _sizes(camera.size or (0, 0) for camera in cameras),
        "box_start": _starts(len(frame.boxes) for frame in frames),
        "boxes": np.concatenate([np.zeros((0, 9)), *(frame.boxes for frame in frames)]),
        "valid": np.concatenate([np.zeros(0, bool), *(frame.valid for frame in frames)]),
        "num_lidar_points": np.concatenate([np.zeros(0, np.int32), *(f.num_lidar_points for f in frames)]).astype("i4"),
        "annotation": _texts("annotation", (token for frame in frames for token in frame.annotations)),
    }
    repeating = {
        "scene": [frame.scene for frame in frames],
        "columns": [frame.columns for frame in frames],
        "channel": [channel for frame in frames for channel in frame.cameras],
        "names": [name for frame in frames for name in frame.names],
        "attributes": [name for frame in frames for name in frame.attributes],
        "visibility": [level for frame in frames for level in frame.visibility],
        "categories": [name for frame in frames for name in frame.categories or ("",) * len(frame.boxes)],
    }
    for name, values in repeating.items():
        columns[f"{name}_words"], codes = np.unique(_texts(name, values), return_inverse=True)
        columns[name] = codes.astype(np.uint16)
    return Packed(columns)


def join(parts: Iterable[Packed]) -> Packed:
    """The frames of all parts, one after the other, as `pack` would have made them of all at once."""
    parts = [pack(()), *parts]
    columns: dict[str, np.ndarray] = {}
    for name in parts[0].columns:
        values = [part.columns[name] for part in parts]
        if name.endswith("_start"):
            offsets = np.cumsum([0, *(value[-1] for value in values[:-1])])
            columns[name] = np.concatenate([[0], *(value[1:] + first for value, first in zip(values, offsets))])
        elif f"{name}_words" in parts[0].columns:
            words = [part.columns[f"{name}_words"] for part in parts]
            columns[f"{name}_words"], codes = np.unique(np.concatenate(words), return_inverse=True)
            splits = np.split(codes, np.cumsum([len(word) for word in words])[:-1])
            columns[name] = np.concatenate([code[value] for code, value in zip(splits, values)]).astype(np.uint16)
        elif not name.endswith("_words"):
            columns[name] = np.concatenate(values)
    return Packed(columns)


def _texts(column: str, values: Iterable[str]) -> np.ndarray:
    """Fixed-width bytes: a quarter of numpy's str. Raises ValueError for a text that would not come back, or makes all wide."""
    made = []
    for value in values:
        if what := unusable(value):
            raise ValueError(f"{column.replace('_', ' ')} '{printable(value)}' {what}; repair or remove it.")
        made.append(value.encode())
    return np.array(made, dtype=np.bytes_)


def _sizes(values: Iterable[tuple[int, int]]) -> np.ndarray:
    """[n,2] int32; what does not fit becomes the nearest, which no image has (see `possible.SIDE`)."""
    made = np.array(list(values), dtype=np.float64).reshape(-1, 2)
    return made.clip(-(2**31), 2**31 - 1).astype(np.int32)


def _transforms(values: Iterable[np.ndarray]) -> np.ndarray:
    """4 4 each -> n 3 4 float64."""
    return np.array([value[:3] for value in values], dtype=np.float64).reshape(-1, 3, 4)


def _square(transform: np.ndarray) -> np.ndarray:
    """3 4 -> 4 4."""
    return np.concatenate([transform, [[0.0, 0.0, 0.0, 1.0]]])


def _size(row: np.ndarray) -> tuple[int, int] | None:
    """0 0 is unknown."""
    height, width = row.tolist()
    return (height, width) if height else None


def _starts(counts: Iterable[int]) -> np.ndarray:
    """Counts per frame -> F + 1 offsets."""
    return np.concatenate([[0], np.cumsum(list(counts), dtype=np.int64)]).astype(np.int64)


@dataclass(frozen=True)
class Chosen(Sequence):
    """Some frames of others, made when they are asked for."""

    frames: Sequence[Frame]
    places: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Frame:  # type: ignore[override]  # no slices
        return self.frames[self.places[i]]


@dataclass(frozen=True)
class Share:
    """One of several data sets that are read as one, its key frames behind those of the part before it."""

    root: str
    """Relative to the Index's."""
    frames: int
    weight: float
    """Its share of an epoch's samples is this over the sum of all parts'."""


@dataclass(frozen=True, repr=False)
class Index:
    """The key frames of one split; len(index) of them, index[i] is a Frame."""

    root: Path
    """The folder that the frames' paths are relative to."""
    version: str
    """The data set's version ("v1.0-trainval")."""
    split: str
    """"train", "val", "test", "mini_train", "mini_val"; "" where the source does not say."""
    frames: Sequence[Frame]
    """A tuple, or a lazy sequence that makes a Frame when it is asked for one."""
    class_names: tuple[str, ...] = CLASSES
    """What the data set annotates, whether or not this split has any of it."""
    metric: Metric | None = None
    """How detections in it are scored; None: as `judge` finds its files."""
    shares: tuple[Share, ...] = ()
    """Of a mixture; (): it is one data set."""

    def __repr__(self) -> str:
        of = ", ".join(printable(part) for part in (self.version, self.split) if part)
        return f"Index of {len(self):,} key frames: {self.root}{f' ({of})' if of else ''}"

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> Frame:
        return self.frames[i]

    def __iter__(self) -> Iterator[Frame]:
        return (self.frames[i] for i in range(len(self.frames)))

    @cached_property
    def image_files(self) -> dict[tuple[str, tuple[int, int] | None], str]:
        """(channel, (H, W) as the data set says) of every kind of camera image, in the order of CAMERAS: one such file."""
        found: dict[tuple[str, tuple[int, int] | None], str] = {}
        if isinstance(self.frames, Packed):
            column = self.frames.columns
            kinds = np.column_stack([column["channel"], column["camera_size"]])
            for k in np.unique(kinds, axis=0, return_index=True)[1]:
                channel = column["channel_words"][column["channel"][k]].decode()
                found[channel, _size(column["camera_size"][k])] = column["camera_path"][k].decode()
        else:
            for frame in self:
                for channel, camera in frame.cameras.items():
                    found.setdefault((channel, camera.size), camera.path)
        known = {channel: place for place, channel in enumerate(CAMERAS)}
        return dict(sorted(found.items(), key=lambda item: known.get(item[0][0], len(known))))

    @property
    def annotated(self) -> bool:
        """Whether a key frame has a box of one of the classes: something to score."""
        if not isinstance(self.frames, Packed):
            return any(name for frame in self for name in frame.names)
        column = self.frames.columns
        return bool((column["names_words"][column["names"]] != b"").any()) if len(column["names"]) else False

    def lacking(self, channel: str) -> int:
        """How many key frames have no image of that camera."""
        if not isinstance(self.frames, Packed):
            return sum(channel not in frame.cameras for frame in self)
        column = self.frames.columns
        return len(self) - int((column["channel_words"][column["channel"]] == channel.encode()).sum())

    @property
    def channels(self) -> tuple[str, ...]:
        """The cameras of its key frames; one of them may lack some."""
        return tuple(dict.fromkeys(channel for channel, _ in self.image_files))

    @property
    def judge(self) -> Metric:
        """How detections in it are scored: as `metric` says, or by nuScenes' devkit where its tables are, else by recall."""
        if self.metric is not None:
            return self.metric
        return "nuscenes" if (self.root / self.version / "sample.json").is_file() else "recall"

    def has(self, part: Part) -> bool:
        """Whether key frames have a part: judged by the first one, velocities by all boxes (yes if there is none)."""
        if not len(self):
            return False
        frame = self[0]
        if part == "lidar":
            return bool(frame.lidar_path)
        if part == "scenes":
            return bool(frame.scene)
        if part == "ego poses":
            return all(np.isfinite(camera.global_from_ego).all() for camera in frame.cameras.values())
        frames = self.frames
        # Packed frames are one array of all boxes: no need to make each frame.
        boxes = frames.columns["boxes"] if isinstance(frames, Packed) else np.concatenate([f.boxes for f in self])
        return not len(boxes) or bool(np.isfinite(boxes[:, 7:9]).all(axis=1).any())

    @cached_property
    def positions(self) -> dict[str, int]:
        """Sample token to place in `frames`."""
        packed = self.frames.columns["token"] if isinstance(self.frames, Packed) else None
        tokens = [frame.token for frame in self] if packed is None else [token.decode() for token in packed]
        return {token: i for i, token in enumerate(tokens)}

    @cached_property
    def scenes(self) -> frozenset[str]:
        """Names of its key frames' scenes, as far as they are known."""
        if not isinstance(self.frames, Packed):
            return frozenset(frame.scene for frame in self if frame.scene)
        column = self.frames.columns
        return frozenset(column["scene_words"][code].decode() for code in np.unique(column["scene"])) - {""}

    @cached_property
    def by_time(self) -> np.ndarray:
        """[n] int64: the places of its key frames in order of time, of equal times in their own order."""
        packed = self.frames.columns["timestamp"] if isinstance(self.frames, Packed) else None
        return np.argsort([frame.timestamp for frame in self] if packed is None else packed, kind="stable")

    @cached_property
    def ranks(self) -> np.ndarray:
        """[n] int64: every key frame's place in `by_time`."""
        return np.argsort(self.by_time)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Column of the packed frames: SHA-256 of it, by which what was made of these key frames is known again."""
        packed = self.frames if isinstance(self.frames, Packed) else pack(self)
        return {name: hashlib.sha256(np.ascontiguousarray(c).data).hexdigest() for name, c in packed.columns.items()}

    def select(self, places: Sequence[int] | np.ndarray) -> "Index":
        """The key frames at these places alone."""
        return replace(self, frames=Chosen(self.frames, tuple(int(place) for place in places)), shares=())

    def position(self, token: str) -> int:
        """The place of the key frame `token`. Raises ValueError if the index has no such frame."""
        if token not in self.positions:
            raise ValueError(f"no key frame {printable(token)} in {self.root} ({self.version}, split {self.split!r}).")
        return self.positions[token]
