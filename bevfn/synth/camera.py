"""A picture of the world: sky, textured ground (a homography), and flat-shaded solids with a depth buffer."""

from dataclasses import dataclass

import cv2
import numpy as np

from bevfn.synth.shapes import FACES, Solids
from bevfn.synth.world import Weather

NEAR = 0.15  # m, near plane
FAR = 110.0  # m, solids beyond are not drawn
SWITCH = 25.0  # m ahead, where the coarse picture of the ground follows the fine one
GUARD = 8000.0  # px from the corner of the picture; beyond, polygons are clipped before they are drawn
TINY = 0.4  # px, faces narrower than this are not drawn
HORIZON = 200.0  # m, where the ground ends
SUBPIXEL = 4  # fractional bits of the polygons' corners


@dataclass(frozen=True)
class Texture:
    """A picture [H,W,3] uint8 of the ground, `resolution` m a pixel; its lower left corner is at `corner` m, global."""

    picture: np.ndarray
    corner: np.ndarray
    resolution: float


def render(
    solids: Solids,
    near: Texture,
    far: Texture,
    weather: Weather,
    camera_from_global: np.ndarray,
    intrinsics: np.ndarray,
    size: tuple[int, int],
    objects: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(picture [H,W,3] uint8 RGB, visible [objects] pixels, alone [objects] pixels if nothing were in front).

    solids are in the global frame, owners 0..objects-1 are counted; size (H,W); a pixel's centre has integer
    coordinates. `near` shows the ground up to SWITCH m ahead, `far` beyond.
    """
    rotation, translation = camera_from_global[:3, :3], camera_from_global[:3, 3]
    picture = _background(near, far, weather, camera_from_global, intrinsics, size)
    here = solids.moved(rotation, translation)
    here = here.chosen(_in_view(here.corners, intrinsics, size))
    if not len(here.owner):
        return picture, np.zeros(objects, dtype=np.int64), np.zeros(objects, dtype=np.int64)
    _shadows(picture, here, camera_from_global, intrinsics, weather)
    depth = np.zeros(size, dtype=np.float32)  # 1/z, 0 is infinitely far
    face = np.full(size, -1, dtype=np.int32)  # 6 s + face number
    alone = np.zeros(objects, dtype=np.int64)
    polygons = _polygons(here, intrinsics, size)
    planes = here.planes[..., :3] / here.planes[..., 3:] @ np.linalg.inv(intrinsics)  # S 6 3, · (u, v, 1) = 1/z
    for (s, f), polygon in polygons.items():
        _fill(depth, face, 6 * s + f, polygon, planes[s, f])
    outlines: dict[int, list[np.ndarray]] = {}
    for (s, _), polygon in polygons.items():
        outlines.setdefault(int(here.owner[s]), []).append(polygon)
    for owner in outlines.keys() - {-1}:
        alone[owner] = np.count_nonzero(_stencil(outlines[owner], size)[0])
    counts = np.bincount((face + 1).ravel(), minlength=6 * len(here.owner) + 1)[1:].reshape(-1, 6).sum(axis=1)  # S
    visible = np.bincount(here.owner + 1, weights=counts, minlength=objects + 1)[1:].astype(np.int64)
    colours = _shaded(here, rotation @ weather.sun, weather).reshape(-1, 3).astype(np.uint8)  # 6S 3
    rows = np.flatnonzero(face.max(axis=1) >= 0)
    if len(rows):
        band = slice(rows[0], rows[-1] + 1)
        painted = np.take(colours, face[band], axis=0, mode="clip")
        picture[band] = cv2.copyTo(painted, (face[band] >= 0).view(np.uint8), picture[band])
    return picture, visible, alone


def _in_view(corners: np.ndarray, intrinsics: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Mask [S] of solids [S,8,3] that can be seen: not wholly beyond one side of the picture's pyramid."""
    z = corners[..., 2]
    pixel = corners @ intrinsics.T
    out = [
        pixel[..., 0] < 0,
        pixel[..., 0] > size[1] * z,
        pixel[..., 1] < 0,
        pixel[..., 1] > size[0] * z,
        z < NEAR,
        z > FAR,
    ]
    return ~np.any([side.all(axis=1) for side in out], axis=0)


def lit(weather: Weather, facing: np.ndarray) -> np.ndarray:
    """Brightness of a surface, of its colour; facing: cosine between its normal and the sun."""
    return weather.light * (0.58 + 0.47 * np.clip(facing, 0, None))


def _shaded(solids: Solids, sun: np.ndarray, weather: Weather) -> np.ndarray:
    """RGB [S,6,3] of the faces: lambertian light, then haze by distance; sun [3] in the solids' frame."""
    lamp = np.where(solids.brightness > 100, 1 / weather.light, 1.0)  # lamps and reflectors shine at night
    bright = lit(weather, solids.planes[..., :3] @ sun) * lamp[:, None]
    distance = np.linalg.norm(solids.corners.mean(axis=1), axis=-1)
    clear = np.exp(-weather.haze * distance)[:, None, None]
    colour = solids.colour[:, None] * bright[..., None]
    return np.clip(colour * clear + weather.horizon * (1 - clear), 0, 255)


def _background(
    near: Texture,
    far: Texture,
    weather: Weather,
    camera_from_global: np.ndarray,
    intrinsics: np.ndarray,
    size: tuple[int, int],
) -> np.ndarray:
    """Sky and ground [H,W,3] uint8."""
    height, width = size
    normal = camera_from_global[:3, 2]
    # 1/z of the ground at pixel (u, v) is linear: across u + along v + constant
    across, along, constant = (normal @ np.linalg.inv(intrinsics)) / (normal @ camera_from_global[:3, 3])
    rows = (along * np.arange(height) + constant)[:, None].astype(np.float32)
    inverse = (across * np.arange(width)).astype(np.float32) + rows  # H W
    middle = inverse[:, width // 2]
    up = np.clip((1 / HORIZON - middle) / (along * height * 0.55), 0, 1)[:, None]  # 1: the zenith's colour
    result = np.empty((height, width, 3), dtype=np.uint8)
    result[:] = (weather.horizon * (1 - up) + weather.sky * up)[:, None].astype(np.uint8)
    top = int(np.searchsorted(inverse.max(axis=1), 1 / HORIZON))
    switch = int(np.clip(np.searchsorted(middle, 1 / SWITCH), top, height))
    project = intrinsics @ camera_from_global[:3, [0, 1, 3]]
    for texture, rows in ((far, slice(top, switch)), (near, slice(switch, height))):
        if rows.start < rows.stop:
            seen = _warped(texture, project, rows, width)
            result[rows] = _hazed(seen, result[rows], inverse[rows], weather)
    return result


def _warped(texture: Texture, project: np.ndarray, rows: slice, width: int) -> np.ndarray:
    """The rows [h,W,3] of a picture; project [3,3]: pixel from ground (x, y, 1)."""
    step, (x, y) = texture.resolution, texture.corner
    high = y + step * (len(texture.picture) - 0.5)
    ground_from_texture = np.array([[step, 0, x + step / 2], [0, -step, high], [0, 0, 1.0]])
    shift = np.array([[1, 0, 0], [0, 1, -rows.start], [0, 0, 1.0]])
    border = texture.picture[:4].reshape(-1, 3).mean(axis=0).tolist()
    size, mode = (width, rows.stop - rows.start), cv2.BORDER_CONSTANT
    view = shift @ project @ ground_from_texture
    return cv2.warpPerspective(texture.picture, view, size, flags=cv2.INTER_LINEAR, borderMode=mode, borderValue=border)


def _hazed(ground: np.ndarray, sky: np.ndarray, inverse: np.ndarray, weather: Weather) -> np.ndarray:
    """The ground [h,W,3] through the air, row by row (the horizon is nearly a row), and the sky above the horizon."""
    distance = 1 / np.maximum(inverse[:, inverse.shape[1] // 2], 1e-4)  # h
    clear = np.exp(-weather.haze * distance)[:, None, None].astype(np.float32)
    result = (ground * clear + (weather.horizon * (1 - clear)).astype(np.float32)).astype(np.uint8)
    below = inverse > 1 / HORIZON
    return result if below.all() else np.where(below[..., None], result, sky)


def _shadows(
    picture: np.ndarray, solids: Solids, camera_from_global: np.ndarray, intrinsics: np.ndarray, weather: Weather
) -> None:
    """Darkens the ground below things (not below buildings: they stand away from everything)."""
    dark = np.zeros(picture.shape[:2], dtype=np.uint8)
    for owner in np.unique(solids.owner[solids.owner >= 0]):
        bottom = solids.corners[solids.owner == owner].reshape(-1, 3)
        world = (bottom - camera_from_global[:3, 3]) @ camera_from_global[:3, :3]  # n 3, global
        cast = world[:, :2] - world[:, 2:] * 0.35 * weather.sun[:2]  # soft: short shadows
        loop = cv2.convexHull(np.vstack([cast, world[:, :2]]).astype(np.float32))[:, 0]
        flat = np.column_stack([loop, np.zeros(len(loop))]) @ camera_from_global[:3, :3].T + camera_from_global[:3, 3]
        pixels = _projected(flat.astype(np.float64), intrinsics, (dark.shape[0], dark.shape[1]))
        if pixels is not None:
            cv2.fillConvexPoly(dark, np.round(pixels * 2**SUBPIXEL).astype(np.int32), [1], cv2.LINE_8, SUBPIXEL)
    rows = np.flatnonzero(dark.any(axis=1))
    if len(rows):
        band = slice(rows[0], rows[-1] + 1)
        np.copyto(picture[band], (picture[band] * np.float32(0.55)).astype(np.uint8), where=dark[band, :, None] > 0)


def _polygons(solids: Solids, intrinsics: np.ndarray, size: tuple[int, int]) -> dict[tuple[int, int], np.ndarray]:
    """Corners in the picture, [n,2] int32 in 1/16 pixels, of every face (s, f) that looks at the camera and shows."""
    looks = solids.planes[..., 3] < 0  # S 6: the camera is outside that face
    pixels = solids.corners @ intrinsics.T
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = pixels[..., :2] / pixels[..., 2:]  # S 8 2
    tame = (solids.corners[..., 2] > NEAR).all(axis=1) & (np.abs(pixels) < GUARD).all(axis=(1, 2))  # S
    polygon = np.where(tame[:, None, None], pixels, 0.0)[:, FACES]  # S 6 4 2
    low, high = polygon.min(axis=2), polygon.max(axis=2)  # S 6 2
    shows = (high > 0).all(axis=-1) & (low < [size[1] - 1, size[0] - 1]).all(axis=-1)
    shows &= (high - low > TINY).all(axis=-1)
    fixed = np.round(polygon * 2**SUBPIXEL).astype(np.int32)
    result = {(s, f): fixed[s, f] for s, f in np.argwhere(looks & shows & tame[:, None]).tolist()}
    for s, f in np.argwhere(looks & ~tame[:, None]).tolist():
        clipped = _projected(solids.corners[s, FACES[f]], intrinsics, size)
        if clipped is not None:
            result[s, f] = np.round(clipped * 2**SUBPIXEL).astype(np.int32)
    return result


def _projected(polygon: np.ndarray, intrinsics: np.ndarray, size: tuple[int, int]) -> np.ndarray | None:
    """Pixels [m,2] of a convex polygon [n,3] (camera frame), clipped to near plane and picture; None if outside."""
    if (polygon[:, 2] < NEAR).any():
        polygon = _clip(polygon, polygon[:, 2] - NEAR)
        if len(polygon) < 3:
            return None
    pixels = polygon @ intrinsics.T
    pixels = pixels[:, :2] / pixels[:, 2:]
    low, high = pixels.min(axis=0), pixels.max(axis=0)
    end = np.array([size[1] - 1, size[0] - 1])
    if (high < 0).any() or (low > end).any():
        return None
    for axis in (0, 1):
        if low[axis] < -2:
            pixels = _clip(pixels, pixels[:, axis] + 2)
        if len(pixels) >= 3 and high[axis] > end[axis] + 2:
            pixels = _clip(pixels, end[axis] + 2 - pixels[:, axis])
        if len(pixels) < 3:
            return None
    return pixels


def _clip(polygon: np.ndarray, height: np.ndarray) -> np.ndarray:
    """The part of a polygon [n,k] where `height` [n] at the corners is positive (Sutherland-Hodgman)."""
    following, after = np.roll(polygon, -1, axis=0), np.roll(height, -1)
    kept = []
    for a, b, h, g in zip(polygon, following, height, after):
        if h >= 0:
            kept.append(a)
        if (h >= 0) != (g >= 0):
            kept.append(a + (b - a) * (h / (h - g)))
    return np.array(kept).reshape(-1, polygon.shape[1])


def _fill(depth: np.ndarray, face: np.ndarray, number: int, polygon: np.ndarray, plane: np.ndarray) -> None:
    """Writes a face [n,2] (1/16 pixels) where it is nearest; plane·(u, v, 1) = 1/z."""
    inside, u, v = _stencil([polygon], (depth.shape[0], depth.shape[1]))
    across = (plane[0] * np.arange(u.start, u.stop)).astype(np.float32)
    along = (plane[1] * np.arange(v.start, v.stop) + plane[2]).astype(np.float32)
    nearer = across + along[:, None]  # h w, 1/z
    old = depth[v, u]
    write = (nearer > old) & inside.view(bool)
    np.copyto(old, nearer, where=write)
    np.copyto(face[v, u], number, where=write)


def _stencil(polygons: list[np.ndarray], size: tuple[int, int]) -> tuple[np.ndarray, slice, slice]:
    """Mask [h,w] uint8 of convex polygons [n,2] (1/16 pixels) in the picture, and the columns and rows it is of."""
    every = polygons[0] if len(polygons) == 1 else np.vstack(polygons)
    (u0, v0), (u1, v1) = every.min(axis=0).tolist(), every.max(axis=0).tolist()
    u = slice(max(u0 >> SUBPIXEL, 0), min((u1 >> SUBPIXEL) + 2, size[1]))
    v = slice(max(v0 >> SUBPIXEL, 0), min((v1 >> SUBPIXEL) + 2, size[0]))
    mask = np.zeros((max(v.stop - v.start, 0), max(u.stop - u.start, 0)), dtype=np.uint8)
    corner = np.array([u.start << SUBPIXEL, v.start << SUBPIXEL], dtype=np.int32)
    for polygon in polygons if mask.size else ():  # OpenCV refuses a picture without pixels
        cv2.fillConvexPoly(mask, polygon - corner, [1], cv2.LINE_8, SUBPIXEL)
    return mask, u, v


def encode(picture: np.ndarray, quality: int = 90) -> bytes:
    """JPEG of an RGB picture."""
    done, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"a picture of {picture.shape} could not be encoded as JPEG.")
    return data.tobytes()
