"""What is read of a key frame: the config of `scene.load`. A recipe's published values are in its experiment."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bevfn.data import augment
from bevfn.data import paste as pasting
from bevfn.data import sweeps as aggregation
from bevfn.data.batch import Base, Capacities
from bevfn.data.index import CAMERAS
from bevfn.data.points import Range

CLASS_NAMES = (  # nuScenes' ten in mmdetection3d's order, which published checkpoints have and the devkit has not
    *("car", "truck", "construction_vehicle", "bus", "trailer"),
    *("barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone"),
)
History = Literal["scene", "time"]
Depths = Literal["last", "nearest"]
Size = tuple[int, int]
PUBLISHED_SOURCE, PUBLISHED_IMAGE = (900, 1600), (256, 704)  # the sizes that factors of resizing are given for


def cover(source: Size, size: Size) -> float:
    """The factor with which an image of size `source` just covers `size`."""
    return max(wanted / there for wanted, there in zip(size, source))


COVERING = cover(PUBLISHED_SOURCE, PUBLISHED_IMAGE)


@dataclass(frozen=True)
class Points:
    """LiDAR points of the key frame and of earlier sweeps. See `sweeps.aggregate`."""

    sweeps: int = 9
    """Earlier LiDAR scans added to the key frame's."""
    sweep_choice: aggregation.Choice = "newest"
    """Which ones, if there are more."""
    sweep_pool: int = pasting.SWEEPS
    """Of how many, the newest ones, random ones are drawn."""
    pad_empty_sweeps: bool = True
    """Repeat the key frame where there is no sweep at all."""
    published_sweeps: bool = False
    """Move sweeps as the published BEVFusion does, which is not quite where they belong (`sweeps.motion`)."""
    shuffle: bool = False
    """Random order, which decides which points a full voxel keeps."""

    @property
    def oldest(self) -> int:
        """The oldest sweep that may be read, counted from 1, the newest; 0: none is."""
        return max(self.sweep_pool, self.sweeps) if self.sweeps and self.sweep_choice == "random" else self.sweeps


@dataclass(frozen=True)
class Cameras:
    """Images of the key frame and of those before it, and their calibration.

    Factors of resizing change with the sizes as the one with which an image just covers image_size, every camera by its own,
    unless `covering` says otherwise.
    """

    channels: tuple[str, ...] = CAMERAS
    """In the batch's order."""
    frames: int = 1
    """Key frames, the current one first."""
    history: History = "scene"
    """Which key frames are earlier: those of the scene, one before the other; or, as published for BEVNeXt, those before it
    in the order of time of all scenes, of which those of other scenes do not count (`cameras.key_frames`)."""
    image_size: Size = PUBLISHED_IMAGE
    """(H, W) of the model's images in pixels."""
    resize: float | None = None
    """Factor before the crop, without augmentation; None: the image just covers image_size. The crop is centred in width
    and aligned with the bottom in height."""
    augmentation: augment.Images | None = None
    """One draw per camera for all its frames; None: `resize`."""
    covering: float | None = COVERING
    """The factor at which images just cover image_size that the factors of resizing are given for. None: they are taken as they
    are for images of every size, and smaller images of a key frame lie in the upper left of the largest one's size, the rest
    of which is black, as AWML (mmdetection3d) has them."""

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames {self.frames} must be at least 1, the current key frame")

    def relative(self, source: Size) -> float:
        """What factors of resizing are multiplied with for image files of size (H, W)."""
        return 1.0 if self.covering is None else cover(source, self.image_size) / self.covering


@dataclass(frozen=True)
class Reading:
    """The parts that are read, each None where it is not; boxes always are."""

    base: Base = Base.LIDAR
    """Where points, boxes and cameras are."""
    points: Points | None = None
    cameras: Cameras | None = None
    depth: bool = False
    """Depth maps of the key frame's images, from the LiDAR."""
    depths: Depths = "last"
    """Which point of a pixel counts, and which pixel is a point's: BEVDepth's rule or BEVNeXt's (`depth.rasterize`,
    `depth.nearest`)."""
    class_names: tuple[str, ...] = CLASS_NAMES
    """Label i is class_names[i]; annotations of other classes are dropped."""
    range: Range | None = None
    """Lower x, y, z, upper x, y, z [m, augmented base]; points must lie strictly inside, box centres only in x and y.
    None: all stay."""
    class_reach: tuple[float, ...] = ()
    """[m] of each class, in x and y from the base frame's origin: boxes that are farther are no targets, and T4 scores leave
    them and detections out. (): `range` alone."""
    augmentation: augment.Global | None = None
    """Of the base frame; None: base_aug is the identity."""
    paste: pasting.Config | None = None
    """GT paste from a database; None: nothing is pasted."""
    velocities: bool = True
    """They are learned; no: of data without them."""
    redraw: bool = False
    """Another key frame, drawn at random, takes the place of one whose boxes are all filtered away."""
    capacities: Capacities = field(default_factory=Capacities)
    """Padded sizes that `batch.collate` makes of the samples."""

    def __post_init__(self) -> None:
        if self.cameras is None and (self.depth or self.base is not Base.LIDAR):
            what = "depth maps" if self.depth else f"base frame of the {self.base.value}"
            raise ValueError(f"a reading without cameras has no {what}; give Reading.cameras")
        if self.base is not Base.LIDAR and self.points is not None:
            raise ValueError(f"points are read in the LiDAR's frame, not in that of the {self.base.value}")
        if self.class_reach and len(self.class_reach) != len(self.class_names):
            raise ValueError(
                f"class_reach has {len(self.class_reach)} numbers; give one for each of {', '.join(self.class_names)}"
            )
        if self.paste is not None and self.points is None:
            raise ValueError("GT paste adds points and boxes; give Reading.points or set paste to None")

    @property
    def channels(self) -> tuple[str, ...]:
        """The cameras that are read."""
        return () if self.cameras is None else self.cameras.channels

    @property
    def random(self) -> bool:
        """Whether `scene.load` draws random numbers."""
        points, cameras = self.points, self.cameras
        drawn = (self.augmentation, self.paste, None if cameras is None else cameras.augmentation)
        if points is not None and (points.shuffle or points.sweep_choice == "random"):
            return True
        return self.redraw or any(part is not None for part in drawn)


@dataclass(frozen=True)
class Needs:
    """What a model takes: the other side of a Reading, held against it before the first step."""

    model: str
    """For sentences."""
    base: Base
    classes: int
    points: bool = False
    image_size: Size | None = None
    """(H, W); None: it looks at no images."""
    frames: int = 1
    """Key frames, the current one included."""
    depth: bool = False
    """To learn from."""
    boxes: bool = True
    """To learn from."""
    range: Range | None = None
    """Where it looks: lower x, y, z, upper x, y, z [m, base]; None: as its grid says, in x and y alone."""

    def check(self, reading: Reading, *, train: bool) -> None:
        """Raises ValueError, one sentence that names both sides, for a reading that the model cannot take."""
        wanted = {"boxes": self.boxes, "points": self.points}
        room = {name: getattr(reading.capacities, name) for name, is_wanted in wanted.items() if is_wanted}
        cameras = reading.cameras
        wrong = {
            f"base frame {reading.base.value!r}, not {self.base.value!r}": reading.base is not self.base,
            f"{len(reading.class_names)} classes, not {self.classes}": len(reading.class_names) != self.classes,
            "no points": self.points and reading.points is None,
            "no images": self.image_size is not None and cameras is None,
            "no depth maps": train and self.depth and not reading.depth,
        }
        if cameras is not None and self.image_size is not None:
            ours, theirs = ("{} x {}".format(*size) for size in (self.image_size, cameras.image_size))
            wrong[f"images of {theirs} pixels, not {ours}"] = cameras.image_size != self.image_size
            wrong[f"{cameras.frames} key frames, not {self.frames}"] = cameras.frames < self.frames
        wrong |= {f"room for no {name} (capacities.{name} is {count})": count < 1 for name, count in room.items()}
        if found := [what for what, is_wrong in wrong.items() if is_wrong]:
            raise ValueError(
                f"the {'training' if train else 'evaluation'} reading does not fit {self.model}: it gives {found[0]}; "
                "change the recipe's Reading or the model's Config"
            )


def for_model(needs: Needs, **others: Any) -> Reading:
    """The plain way to read what a model takes: its base frame, range, image size, key frames and depth maps, the LiDAR's own scan
    without earlier ones, nothing random.

        how = reading.for_model(bevfusion.needs(config))
        sample = scene.load(index, 0, how)

    How a published recipe reads, with its sweeps and augmentation, is in its experiment (`Detector.reading` of a trained model).

    others: fields of Reading, such as class_names, capacities or cameras. Raises ValueError, one sentence that names both sides,
    where they do not fit the model.
    """
    seen = None if needs.image_size is None else Cameras(image_size=needs.image_size, frames=needs.frames)
    made = Reading(
        base=needs.base,
        points=Points(sweeps=0) if needs.points else None,
        cameras=seen,
        depth=needs.depth,
        range=needs.range,
    )
    made = replace(made, **others)
    needs.check(made, train=needs.depth)
    return made
