"""AWML's rules for T4 annotations: raw categories to classes, truck and trailer as one, two-wheelers without rider left out.

Boxes are x, y, z of the centre, length, width, height, yaw, in any upright frame. What is odd here is upstream's, and its
published models were trained with it: the merge takes the centre's z for the bottom, so merged boxes are too low and too
tall, and it does not look at heights when it asks whether footprints meet.

Source: tier4/AWML autoware_ml/configs/detection3d/dataset/t4dataset, tools/detection3d (fact sheet t4dataset, section 4; golden
awml_classes, awml_merge).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

CLASSES = ("car", "truck", "bus", "bicycle", "pedestrian")  # in AWML's label order
NEAR = 2.0  # m between face centres of what is merged
FASTEST = 50.0  # m/s, to which velocities are shortened

_SOURCES: dict[str, tuple[str, ...]] = {
    "car": (
        *("vehicle.car", "car", "vehicle.emergency (ambulance & police)", "vehicle.ambulance", "ambulance"),
        *("vehicle.police", "police_car", "forklift", "kart"),
    ),
    "truck": (
        *("vehicle.truck", "truck", "vehicle.construction", "construction_vehicle", "vehicle.fire", "fire_truck"),
        "tractor_unit",
    ),
    "bus": ("vehicle.bus (bendy & rigid)", "vehicle.bus", "bus"),
    "bicycle": ("vehicle.bicycle", "bicycle", "vehicle.motorcycle", "motorcycle"),
    "pedestrian": (
        *("pedestrian", "pedestrian.adult", "pedestrian.child", "pedestrian.construction_worker"),
        *("pedestrian.personal_mobility", "pedestrian.police_officer", "pedestrian.stroller", "pedestrian.wheelchair"),
        *("police_officer", "construction_worker", "stroller", "wheelchair", "personal_mobility"),
    ),
    # no classes, but names that rules and people ask for
    "trailer": ("vehicle.trailer", "trailer", "semi_trailer"),
    "barrier": ("movable_object.barrier",),
    "traffic_cone": ("movable_object.trafficcone", "movable_object.traffic_cone"),
    "debris": ("movable_object.debris",),
    "pushable_pullable": ("movable_object.pushable_pullable",),
    "animal": ("animal",),
    "bicycle_rack": ("static_object.bicycle_rack",),
    "bicycle rack": ("static_object.bicycle rack",),
    "bollard": ("static_object.bollard",),
}
MAPPING = {category: name for name, categories in _SOURCES.items() for category in categories}
DROPPED = frozenset(
    (category, attribute)
    for category in ("vehicle.bicycle", "vehicle.motorcycle", "bicycle", "motorcycle")
    for attribute in ("vehicle_state.parked", "cycle_state.without_rider", "motorcycle_state.without_rider")
)


@dataclass(frozen=True)
class Rules:
    """What becomes of annotations; the defaults are those of all six of AWML's T4 data configs."""

    classes: tuple[str, ...] = CLASSES
    """What is detected, in label order."""
    mapping: Mapping[str, str] = field(default_factory=lambda: dict(MAPPING))
    """Raw category to name; one that is not in it keeps its own."""
    merged: tuple[tuple[str, str, str], ...] = (("truck", "truck", "trailer"),)
    """(name of the merged, names of the two that are merged)."""
    dropped: frozenset[tuple[str, str]] = DROPPED
    """(raw category, attribute) of what is no object to detect."""

    def name(self, category: str) -> str:
        """The category's name, whether it is a class or not; case counts."""
        return self.mapping.get(category, category)

    def label(self, category: str, attributes: Sequence[str] = ()) -> int:
        """The place among the classes; -1 for what is none, or is dropped for an attribute."""
        name = self.name(category)
        gone = any((category, attribute) in self.dropped for attribute in attributes)
        return self.classes.index(name) if name in self.classes and not gone else -1


@dataclass(frozen=True)
class Objects:
    """G annotations of a key frame."""

    boxes: np.ndarray
    """G 7 float64: x, y, z of the centre, length, width, height [m], yaw [rad]."""
    velocities: np.ndarray
    """G 2 float64 [m/s], NaN where unknown."""
    points: np.ndarray
    """G int64 LiDAR points."""
    categories: tuple[str, ...]
    """G raw categories; of a merged object its name."""
    attributes: tuple[tuple[str, ...], ...]
    """G lists of names."""
    valid: np.ndarray
    """G bool: `lidar_valid`; of a merged object whether both were, which training does not ask."""
    sources: tuple[int, ...] = ()
    """G places in what was merged: of the object itself, or of the first of two; () before `merge`."""

    def __len__(self) -> int:
        return len(self.boxes)


def lidar_valid(points: np.ndarray) -> np.ndarray:
    """[G] bool: seen by the LiDAR, for which radar points do not count: `bbox_3d_isvalid` of AWML's info files."""
    return np.asarray(points) > 0


def clipped(velocities: np.ndarray, fastest: float = FASTEST) -> np.ndarray:
    """[G,2] of the same directions, none longer than `fastest`; NaN stays."""
    speeds = np.linalg.norm(velocities, axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(speeds > fastest, velocities * (fastest / speeds), velocities)


def labels(found: Objects, rules: Rules) -> np.ndarray:
    """[G] int64, see `Rules.label`."""
    pairs = zip(found.categories, found.attributes)
    return np.array([rules.label(category, attributes) for category, attributes in pairs], dtype=np.int64)


def merge(found: Objects, rules: Rules) -> Objects:
    """With every pair that a rule names as one object, those first, then the others in their order.

    Pairs are taken as they come, by the place of the first, then of the second; an object is merged once.
    """
    names = [rules.name(category) for category in found.categories]
    taken: set[int] = set()
    pairs: list[tuple[str, int, int]] = []
    for target, one, other in rules.merged:
        for i in (i for i, name in enumerate(names) if name == one):
            for j in (j for j, name in enumerate(names) if name == other):
                if not taken & {i, j} and near(found.boxes[i], found.boxes[j]):
                    taken |= {i, j}
                    pairs.append((target, i, j))
    kept = [i for i in range(len(found)) if i not in taken]
    first, second = [i for _, i, _ in pairs], [j for _, _, j in pairs]
    both = [extended(found.boxes[i], found.boxes[j]) for i, j in zip(first, second)]
    united = [tuple(dict.fromkeys(found.attributes[i] + found.attributes[j])) for i, j in zip(first, second)]
    return replace(
        found,
        boxes=np.concatenate([np.array(both).reshape(-1, 7), found.boxes[kept]]),
        velocities=np.concatenate([(found.velocities[first] + found.velocities[second]) / 2, found.velocities[kept]]),
        points=np.concatenate([found.points[first] + found.points[second], found.points[kept]]),
        categories=(*(target for target, _, _ in pairs), *(found.categories[i] for i in kept)),
        attributes=(*united, *(found.attributes[i] for i in kept)),
        valid=np.concatenate([found.valid[first] & found.valid[second], found.valid[kept]]),
        sources=(*first, *kept),
    )


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two boxes [7] are merged: their footprints touch, or centres of a front or rear face are within NEAR in 3D."""
    ends = [box[:3] + side * box[3] / 2 * np.append(_axis(box[6]), 0.0) for box in (one, other) for side in (1, -1)]
    gaps = [np.linalg.norm(ends[i] - ends[j]) for i in (0, 1) for j in (2, 3)]
    return bool(min(gaps) <= NEAR) or _touch(one, other)


def extended(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The box [7] of the larger footprint (of equal ones the first), lengthened to the far end of the smaller.

    The far end falls on the line of the larger's longer side, at some distance from the larger's end that is nearer to the
    smaller's centre: that much longer it becomes, and its centre moves half of it, also where the far end lies inside.
    Heights are united as if z were the bottom.
    """
    larger, smaller = (one, other) if one[3] * one[4] >= other[3] * other[4] else (other, one)
    far = max(reversed(_ends(smaller)), key=lambda end: np.linalg.norm(end - larger[:2]))
    close = min(reversed(_ends(larger)), key=lambda end: np.linalg.norm(end - smaller[:2]))
    along = (close - larger[:2]) / np.linalg.norm(close - larger[:2])
    longer = (far - close) @ along
    made = larger.copy()
    made[:2] += along * longer / 2
    made[3 if larger[3] >= larger[4] else 4] += abs(longer)
    made[2] = min(one[2], other[2])
    made[5] = max(one[2] + one[5], other[2] + other[5]) - made[2]
    return made


def _axis(yaw: float) -> np.ndarray:
    return np.array([np.cos(yaw), np.sin(yaw)])


def _ends(box: np.ndarray) -> list[np.ndarray]:
    """Centres x y of the two short sides of the footprint, ahead and behind."""
    along = box[3] / 2 * _axis(box[6]) if box[3] >= box[4] else box[4] / 2 * _axis(box[6] + np.pi / 2)
    return [box[:2] + along, box[:2] - along]


def _touch(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two footprints meet, borders included: no side of either separates them."""
    between = other[:2] - one[:2]
    for turned in (one, other):
        for angle in (turned[6], turned[6] + np.pi / 2):
            axis = _axis(angle)
            reach = sum(
                box[3] / 2 * abs(axis @ _axis(box[6])) + box[4] / 2 * abs(axis @ _axis(box[6] + np.pi / 2))
                for box in (one, other)
            )
            if abs(axis @ between) > reach:
                return False
    return True
