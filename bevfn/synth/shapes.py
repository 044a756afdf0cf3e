"""What the things of the world look like, to lidar and camera alike: solids with a rectangular bottom and top.

A part is a hexahedron given in fractions of its object's box (x along the length, y along the width, both -0.5..0.5;
z from 0 to 1), so a class has one shape and every instance its own size. Shapes keep `INSET` metres away from the faces
of the annotated box, as people draw boxes: the range noise of the lidar stays inside.
"""

from dataclasses import dataclass

import numpy as np

INSET = 0.04  # m between the box and the shape, each side

# material: (RGB, lidar intensity 0..255, 0 for paint that a lidar does not meet); "body" and "second" take the
# instance's colours, "wall" the building's
MATERIALS: dict[str, tuple[tuple[int, int, int], int]] = {
    "body": ((0, 0, 0), 30),
    "second": ((0, 0, 0), 25),
    "glass": ((45, 58, 72), 6),
    "tyre": ((28, 28, 30), 8),
    "dark": ((60, 60, 64), 15),
    "steel": ((150, 152, 156), 45),
    "white": ((235, 235, 230), 70),
    "lamp": ((250, 245, 215), 110),
    "tail": ((205, 25, 25), 140),
    "skin": ((205, 160, 130), 20),
    "reflector": ((240, 240, 235), 200),
    "bark": ((92, 70, 50), 18),
    "leaf": ((58, 104, 46), 14),
    "wall": ((0, 0, 0), 35),
    "window": ((45, 58, 72), 0),
}

# corner numbers of a face, so that (b - a) x (d - a) points outwards: bottom, top, right, front, left, rear
FACES = np.array([[0, 3, 2, 1], [4, 5, 6, 7], [0, 1, 5, 4], [1, 2, 6, 5], [2, 3, 7, 6], [3, 0, 4, 7]])


Span = tuple[float, float]
Part = tuple[str, tuple[float, ...]]  # material; x0 x1 y0 y1 of the bottom, x0 x1 y0 y1 of the top, z0 z1


@dataclass(frozen=True)
class Solids:
    """Convex hexahedra in one frame of reference.

    corners [S,8,3] m (four of the bottom, counter-clockwise from above, then four of the top); planes [S,6,4] (outward
    unit normal n and d with n·x <= d inside, in the order of FACES); owner [S] number of the object, -1 scenery;
    colour [S,3] RGB 0..255 float; brightness [S] lidar intensity, 0 paint.
    """

    corners: np.ndarray
    planes: np.ndarray
    owner: np.ndarray
    colour: np.ndarray
    brightness: np.ndarray

    def moved(self, rotation: np.ndarray, translation: np.ndarray) -> "Solids":
        """Rigidly moved by rotation [3,3] or [S,3,3] and translation [3] or [S,3]."""
        rotation = np.broadcast_to(rotation, (len(self.owner), 3, 3))
        translation = np.broadcast_to(translation, (len(self.owner), 3))
        corners = self.corners @ rotation.transpose(0, 2, 1) + translation[:, None]
        normals = self.planes[..., :3] @ rotation.transpose(0, 2, 1)  # S 6 3
        offsets = self.planes[..., 3] + (normals @ translation[..., None])[..., 0]  # S 6
        planes = np.concatenate([normals, offsets[..., None]], axis=-1)
        return Solids(corners, planes, self.owner, self.colour, self.brightness)

    def chosen(self, index: np.ndarray) -> "Solids":
        """Those that `index` (a mask or numbers) selects."""
        return Solids(*(values[index] for values in vars(self).values()))


def solids(corners: np.ndarray, owner: np.ndarray, colour: np.ndarray, brightness: np.ndarray) -> Solids:
    """Solids with the planes of corners [S,8,3]."""
    face = corners[:, FACES]  # S 6 4 3
    normal = np.cross(face[:, :, 1] - face[:, :, 0], face[:, :, 3] - face[:, :, 0])
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    offset = (normal * face[:, :, 0]).sum(axis=-1, keepdims=True)
    return Solids(corners, np.concatenate([normal, offset], axis=-1), owner, colour, brightness)


def _part(
    material: str, x: Span, y: Span | float, z: Span, top_x: Span | None = None, top_y: Span | float | None = None
) -> Part:
    """A part; y and top_y may be half widths, and the top is as the bottom where it is not given."""
    bottom, top = ((w if isinstance(w, tuple) else (-w, w)) for w in (y, y if top_y is None else top_y))
    return material, (*x, *bottom, *(top_x or x), *top, *z)


def _wheel(low: float, high: float, y: Span | float, height: float) -> list[Part]:
    """A hexagonal wheel between x = low and high."""
    inner = (low + 0.25 * (high - low), high - 0.25 * (high - low))
    return [
        _part("tyre", inner, y, (0.0, height / 2), (low, high)),
        _part("tyre", (low, high), y, (height / 2, height), inner),
    ]


def _wheels(at: tuple[float, ...], length: float, height: float) -> list[Part]:
    """Pairs of wheels at x = at, a little outside the body."""
    half, thickness = 0.504, 0.14
    sides = ((-half, -half + thickness), (half - thickness, half))
    return [part for x in at for y in sides for part in _wheel(x - length / 2, x + length / 2, y, height)]


def _rider(x: float, low: float, high: float) -> list[Part]:
    """Torso and head of somebody who sits at x between the heights low and high, leaning forward."""
    middle = low + 0.72 * (high - low)
    return [
        _part("second", (x - 0.13, x + 0.05), 0.30, (low, middle), (x - 0.04, x + 0.12), 0.34),
        _part("second", (x, x + 0.28), 0.26, (low - 0.12, low + 0.06), (x - 0.08, x + 0.16)),
        _part("skin", (x - 0.01, x + 0.12), 0.16, (middle, high)),
    ]


def _riderless(cycle: list[Part]) -> list[Part]:
    """A cycle as it fills a box that is as high as the cycle alone, not as its rider."""
    return [(material, (*plan, low * 1.3, high * 1.3)) for material, (*plan, low, high) in cycle]


_CAR = [
    _part("body", (-0.5, 0.5), 0.5, (0.20, 0.58), (-0.49, 0.47), 0.47),
    _part("glass", (-0.42, 0.24), 0.45, (0.58, 0.97), (-0.32, 0.08), 0.36),
    _part("body", (-0.31, 0.07), 0.36, (0.965, 1.0)),
    *_wheels((-0.30, 0.31), 0.15, 0.38),
    _part("lamp", (0.485, 0.503), (0.28, 0.46), (0.38, 0.48)),
    _part("lamp", (0.485, 0.503), (-0.46, -0.28), (0.38, 0.48)),
    _part("tail", (-0.505, -0.485), (0.28, 0.47), (0.40, 0.52)),
    _part("tail", (-0.505, -0.485), (-0.47, -0.28), (0.40, 0.52)),
]
_TRUCK = [
    _part("body", (0.22, 0.5), 0.48, (0.16, 0.50)),
    _part("body", (0.22, 0.49), 0.48, (0.50, 0.80), (0.22, 0.44)),
    _part("glass", (0.44, 0.502), 0.42, (0.50, 0.70), (0.40, 0.47)),
    _part("second", (-0.5, 0.18), 0.5, (0.26, 1.0)),
    _part("dark", (-0.48, 0.40), 0.30, (0.12, 0.26)),
    *_wheels((-0.36, -0.20, 0.33), 0.13, 0.30),
    _part("tail", (-0.502, -0.48), (0.30, 0.46), (0.28, 0.34)),
    _part("tail", (-0.502, -0.48), (-0.46, -0.30), (0.28, 0.34)),
    _part("lamp", (0.48, 0.502), (0.26, 0.44), (0.24, 0.32)),
    _part("lamp", (0.48, 0.502), (-0.44, -0.26), (0.24, 0.32)),
]
_BUS = [
    _part("body", (-0.5, 0.5), 0.49, (0.09, 0.97)),
    _part("glass", (-0.47, 0.44), 0.5, (0.42, 0.74)),
    _part("glass", (0.40, 0.501), 0.46, (0.30, 0.80)),
    _part("white", (-0.45, 0.45), 0.40, (0.97, 1.0)),
    *_wheels((-0.30, 0.30), 0.09, 0.26),
    _part("lamp", (0.48, 0.501), (0.28, 0.46), (0.14, 0.22)),
    _part("lamp", (0.48, 0.501), (-0.46, -0.28), (0.14, 0.22)),
    _part("tail", (-0.501, -0.48), (0.34, 0.48), (0.16, 0.34)),
    _part("tail", (-0.501, -0.48), (-0.48, -0.34), (0.16, 0.34)),
]
_TRAILER = [
    _part("body", (-0.5, 0.5), 0.5, (0.28, 1.0)),
    _part("second", (-0.501, 0.501), 0.503, (0.55, 0.68)),
    _part("dark", (-0.48, 0.46), 0.28, (0.20, 0.28)),
    _part("steel", (0.26, 0.30), 0.34, (0.0, 0.20)),
    *_wheels((-0.40, -0.31, -0.22), 0.075, 0.25),
    _part("tail", (-0.5015, -0.49), 0.46, (0.29, 0.32)),
]
_CONSTRUCTION = [
    _part("tyre", (-0.46, 0.22), (-0.5, -0.28), (0.0, 0.26)),
    _part("tyre", (-0.46, 0.22), (0.28, 0.5), (0.0, 0.26)),
    _part("dark", (-0.34, 0.12), 0.3, (0.14, 0.30)),
    _part("body", (-0.5, -0.10), 0.44, (0.30, 0.62), (-0.48, -0.10)),
    _part("body", (-0.10, 0.14), (-0.44, 0.0), (0.30, 0.55)),
    _part("glass", (-0.12, 0.12), (0.02, 0.44), (0.36, 0.94), (-0.10, 0.06)),
    _part("body", (-0.12, 0.08), (0.0, 0.45), (0.94, 1.0)),
    _part("body", (0.06, 0.16), (-0.26, -0.08), (0.50, 0.98), (0.26, 0.34)),
    _part("body", (0.40, 0.46), (-0.24, -0.10), (0.26, 0.98), (0.26, 0.33)),
    _part("dark", (0.34, 0.5), (-0.36, 0.02), (0.02, 0.26), (0.38, 0.47)),
]
_BARRIER = [  # stripes along the width
    _part("body" if k % 2 else "white", (-0.5, 0.5), (k / 5 - 0.5, k / 5 - 0.3), (0.0, 0.30), (-0.30, 0.30))
    for k in range(5)
] + [
    _part("body" if k % 2 else "white", (-0.28, 0.28), (k / 5 - 0.5, k / 5 - 0.3), (0.30, 1.0), (-0.16, 0.16))
    for k in range(5)
]
_CONE = [
    _part("dark", (-0.5, 0.5), 0.5, (0.0, 0.06)),
    _part("body", (-0.38, 0.38), 0.38, (0.06, 0.42), (-0.26, 0.26), 0.26),
    _part("reflector", (-0.26, 0.26), 0.26, (0.42, 0.68), (-0.17, 0.17), 0.17),
    _part("body", (-0.17, 0.17), 0.17, (0.68, 1.0), (-0.06, 0.06), 0.06),
]
_MOTORCYCLE = [
    *_wheel(-0.5, -0.21, 0.10, 0.42),
    *_wheel(0.21, 0.5, 0.10, 0.42),
    _part("body", (-0.30, 0.26), 0.20, (0.22, 0.56), (-0.38, 0.20)),
    _part("dark", (-0.44, -0.02), 0.18, (0.52, 0.60)),
    _part("steel", (0.22, 0.30), 0.10, (0.36, 0.70), (0.12, 0.18)),
    _part("steel", (0.12, 0.18), 0.48, (0.66, 0.72)),
    _part("lamp", (0.20, 0.27), 0.14, (0.56, 0.66)),
    _part("tail", (-0.48, -0.42), 0.10, (0.50, 0.57)),
]
_BICYCLE = [
    *_wheel(-0.5, -0.10, 0.06, 0.50),
    *_wheel(0.10, 0.5, 0.06, 0.50),
    _part("body", (-0.26, 0.22), 0.07, (0.30, 0.54), (-0.16, 0.26)),
    _part("body", (0.24, 0.31), 0.08, (0.26, 0.74), (0.16, 0.22)),
    _part("dark", (-0.22, -0.06), 0.18, (0.56, 0.62)),
    _part("steel", (0.15, 0.22), 0.48, (0.70, 0.75)),
]
_PEDESTRIAN = [
    _part("second", (-0.05, 0.22), (-0.26, -0.04), (0.0, 0.48), (-0.14, 0.12)),
    _part("second", (-0.24, 0.03), (0.04, 0.26), (0.0, 0.48), (-0.14, 0.12)),
    _part("body", (-0.17, 0.17), 0.30, (0.46, 0.82), (-0.20, 0.20), 0.36),
    _part("body", (-0.06, 0.28), (0.36, 0.48), (0.42, 0.80), (-0.12, 0.10)),
    _part("body", (-0.30, 0.04), (-0.48, -0.36), (0.42, 0.80), (-0.12, 0.10)),
    _part("skin", (-0.12, 0.14), 0.14, (0.85, 1.0)),
    _part("skin", (-0.08, 0.08), 0.09, (0.82, 0.85)),
]
SHAPES: dict[str, list[Part]] = {
    "car": _CAR,
    "truck": _TRUCK,
    "construction_vehicle": _CONSTRUCTION,
    "bus": _BUS,
    "trailer": _TRAILER,
    "barrier": _BARRIER,
    "motorcycle": [*_MOTORCYCLE, *_rider(-0.10, 0.58, 1.0)],
    "motorcycle without rider": _riderless(_MOTORCYCLE),
    "bicycle": [*_BICYCLE, *_rider(-0.10, 0.60, 1.0)],
    "bicycle without rider": _riderless(_BICYCLE),
    "pedestrian": _PEDESTRIAN,
    "traffic_cone": _CONE,
    # scenery
    "building": [
        _part("wall", (-0.5, 0.5), 0.5, (0.0, 1.0)),
        *[_part("window", (-0.46, 0.46), 0.504, (z, z + 0.10)) for z in (0.12, 0.32, 0.52, 0.72)],
        *[_part("window", (-0.504, 0.504), 0.44, (z, z + 0.10)) for z in (0.12, 0.32, 0.52, 0.72)],
    ],
    "tree": [
        _part("bark", (-0.06, 0.06), 0.06, (0.0, 0.42)),
        _part("leaf", (-0.30, 0.30), 0.30, (0.36, 0.62), (-0.5, 0.5), 0.5),
        _part("leaf", (-0.5, 0.5), 0.5, (0.62, 1.0), (-0.22, 0.22), 0.22),
    ],
    "pole": [
        _part("steel", (-0.06, 0.06), 0.5, (0.0, 1.0)),
        _part("steel", (-0.06, 1.6), 0.4, (0.98, 1.0)),
    ],
}


def assemble(
    shape: str, size: np.ndarray, owner: int, body: np.ndarray, second: np.ndarray, inset: float = INSET
) -> Solids:
    """The solids of one thing in its own frame (origin on the ground below its middle, x forward), size (l,w,h) m."""
    materials, fractions = zip(*SHAPES[shape])
    x0, x1, y0, y1, u0, u1, v0, v1, z0, z1 = np.array(fractions).T  # each S
    bottom = [[x0, y0, z0], [x1, y0, z0], [x1, y1, z0], [x0, y1, z0]]  # counter-clockwise from above
    top = [[u0, v0, z1], [u1, v0, z1], [u1, v1, z1], [u0, v1, z1]]
    corners = np.array([*bottom, *top]).transpose(2, 0, 1)  # S 8 3
    corners = corners * (np.asarray(size) - 2 * inset) + [0.0, 0.0, inset]
    own = {"body": body, "second": second, "wall": body}
    colour = np.array([own[m] if m in own else MATERIALS[m][0] for m in materials], dtype=np.float64)
    brightness = np.array([MATERIALS[m][1] for m in materials], dtype=np.float64)
    return solids(corners, np.full(len(materials), owner), colour, brightness)


def concatenate(parts: list[Solids]) -> Solids:
    """All of them, in order."""
    return Solids(*map(np.concatenate, zip(*(vars(part).values() for part in parts))))
