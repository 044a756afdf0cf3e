"""Frames, projection, the camera frustum and BEV cells, with upstream's float32 rounding.

Frames: pixel (u right, v down, of the network's input image), camera, base (the batch's base frame, LiDAR or ego);
"augmented" is the base frame after the 3D augmentation, in which points, boxes and the BEV grid live. Matrices are
`target_from_source`.

One ulp moves frustum points across cell borders (54 of 1,993,728 in the golden case bevfusion_lidar_cam), and one such
point is 1/118 of a context vector, so the order of the float32 operations below is part of the contract: products of
a matrix and a point are written out as (a0 b0 + a1 b1) + a2 b2, each operation rounded. A matrix product would leave
that to the machine's library (fused multiply-add, TF32) and moves pixels of the golden case; this gives its bits.
Source: mmdetection3d projects/BEVFusion/bevfusion/depth_lss.py.
"""

import math

import numpy as np
import torch
from torch import Tensor

_NORMAL = 0x00800000  # bits of the smallest normal float32
Planes = tuple[Tensor, ...]  # x, y, z apart and broadcastable, since most factors vary along one or two axes only


def invert(matrix: Tensor) -> Tensor:
    """Inverse of [... 3 3] float32 by elimination with partial pivoting, every operation rounded; for the host.

    torch.inverse depends on the machine: for intrinsics, LAPACK here rounds -c/f where the golden case's rounded
    -(c (1/f)), which moves 10 frustum points to another cell. This order of operations gives the golden case's bits.
    """
    rows = torch.cat([matrix, torch.eye(3, dtype=matrix.dtype).expand_as(matrix)], -1)  # ... 3 6
    place = torch.arange(3)
    for k in range(3):
        candidates = rows[..., k].abs().masked_fill(place < k, -1.0)  # ... 3
        pivot = candidates.argmax(-1, keepdim=True)  # ... 1
        order = torch.where(place == k, pivot, torch.where(place == pivot, k, place))  # ... 3
        rows = rows.gather(-2, order[..., None].expand_as(rows))
        factor = rows[..., k : k + 1] / rows[..., k : k + 1, k : k + 1]  # ... 3 1
        below = (place > k)[:, None]  # 3 1
        rows = torch.where(below, rows - factor * rows[..., k : k + 1, :], rows)
    upper, right = rows[..., :3], rows[..., 3:]
    for k in (2, 1, 0):
        solved = right[..., k : k + 1, :] * (1.0 / upper[..., k : k + 1, k : k + 1])  # ... 1 3
        rest = torch.where((place < k)[:, None], right - upper[..., k : k + 1] * solved, right)
        right = torch.where((place == k)[:, None], solved, rest)
    return right


def unprojection(base_from_camera: Tensor, intrinsics: Tensor) -> Tensor:
    """base_from_pixel [... 3 3]: (u d, v d, d) of an original image to base axes centred on its camera; for the host.

    Both matrices [... 4 4] or [... 3 3], float32.
    """
    rotation, columns = base_from_camera[..., :3, :3], invert(intrinsics[..., :3, :3]).unbind(-1)
    return torch.stack([torch.stack(rotate(rotation, column.unbind(-1)), -1) for column in columns], -1)


def rotate(matrix: Tensor, point: Planes) -> Planes:
    """matrix [S 3 3] times a point whose planes are [S ...] or broadcast to it -> planes [S ...]."""
    x, y, z = point
    tail = (1,) * (max(p.dim() for p in point) - (matrix.dim() - 2))
    m = [[matrix[..., i, j].reshape(*matrix.shape[:-2], *tail) for j in range(3)] for i in range(3)]
    a, b, c = (row[0] * x + row[1] * y + row[2] * z for row in m)
    return a, b, c


def translate(offset: Tensor, point: Planes) -> Planes:
    """Adds offset [S 3] to planes [S ...]."""
    tail = (1,) * (max(p.dim() for p in point) - (offset.dim() - 1))
    x, y, z = (p + offset[..., i].reshape(*offset.shape[:-1], *tail) for i, p in enumerate(point))
    return x, y, z


def frustum(
    image_size: tuple[int, int],
    feature_size: tuple[int, int],
    depth_m: tuple[float, float, float],
    device: torch.device,
) -> Planes:
    """Pixel x [1 1 W], pixel y [1 H 1] and depth in m [D 1 1] of the frustum's points.

    Features sit on a grid whose corners are the image's corner pixels: linspace(0, size - 1), no half-pixel shift.
    """
    (image_h, image_w), (h, w) = image_size, feature_size
    x, y = (torch.tensor(_spread(*axis), device=device) for axis in ((image_w - 1, w), (image_h - 1, h)))
    depth = torch.arange(*depth_m, dtype=torch.float32, device=device)
    return x.view(1, 1, -1), y.view(1, -1, 1), depth.view(-1, 1, 1)


def _spread(last: int, count: int) -> list[float]:
    """torch.linspace(0, last, count) bit for bit, which rounds otherwise in compiled code and may on other devices.

    Steps of a float32 width from the nearer end, rounded once (by the tensor that is made of them).
    """
    mantissa, exponent = math.frexp(last / max(count - 1, 1))
    step = math.ldexp(round(mantissa * 2**24), exponent - 24)
    return [step * i if i < max(count // 2, 1) else last - step * (count - 1 - i) for i in range(count)]


def frustum_in_base(
    point: Planes,
    *,
    image_aug: Tensor,
    undo_image_aug: Tensor,
    base_from_pixel: Tensor,
    base_from_camera: Tensor,
    base_aug: Tensor,
) -> Planes:
    """Frustum points (see `frustum`) in the augmented base frame: planes [B N D H W], m.

    image_aug, base_from_camera [B N 4 4]; undo_image_aug, base_from_pixel [B N 3 3]; base_aug [B 4 4].
    """
    point = translate(-image_aug[..., :3, 3], tuple(p[None, None] for p in point))
    x, y, depth = rotate(undo_image_aug, point)  # pixels of the original image
    point = rotate(base_from_pixel, (x * depth, y * depth, depth))
    point = translate(base_from_camera[..., :3, 3], point)
    return translate(base_aug[..., :3, 3], rotate(base_aug[..., :3, :3], point))


def bev_cells(point: Planes, bounds_m: tuple[tuple[float, float, float], ...], *, truncate_toward_zero: bool) -> Tensor:
    """Cell of every point: int32 [B N D H W], ((b X + x) Y + y) Z + z, or -1 outside. bounds_m: (low, high, step) each.

    truncate_toward_zero keeps upstream's rule: points up to one cell below a lower bound land in cell 0. In the golden
    case 232,806 of 1,835,478 kept points are kept only by it. False takes the floor.
    """
    shape = torch.broadcast_shapes(*(p.shape for p in point))
    cell = torch.arange(shape[0], dtype=torch.int32, device=point[0].device).view(-1, *(1,) * (len(shape) - 1))
    inside = torch.ones((), dtype=torch.bool, device=cell.device)
    for coordinate, (low, high, step) in zip(point, bounds_m):
        count = num_cells((low, high, step))
        place = in_cells(coordinate, (low, high, step))
        inside = inside & (place > -1 if truncate_toward_zero else place >= 0) & (place < count)
        cell = cell * count + place.to(torch.int32)
    return torch.where(inside, cell, -1)


def in_cells(coordinate: Tensor, bounds_m: tuple[float, float, float]) -> Tensor:
    """A coordinate in cells from the lower bound of an axis (low, high, step), like coordinate."""
    low, _, step = bounds_m
    # Tensors, because CUDA divides by a Python number through its reciprocal. Lower bound: upstream's bx - dx/2.
    size, centre = (coordinate.new_full((), value) for value in (step, low + step / 2))
    return (coordinate - (centre - size / 2)) / size


def num_cells(bounds_m: tuple[float, float, float]) -> int:
    """Cells of one axis of a grid (low, high, step)."""
    low, high, step = bounds_m
    return round((high - low) / step)


def cell_centres(bounds_m: tuple[float, float, float], device: torch.device) -> Tensor:
    """[cells] centres of the cells of one axis (low, high, step), m."""
    low, _, step = bounds_m
    # Rounded once: a float32 torch.arange rounds otherwise on other machines and in compiled code.
    return torch.tensor([low + step * (i + 0.5) for i in range(num_cells(bounds_m))], device=device)


def project(
    points: Tensor, *, undo_base_aug: Tensor, base_aug: Tensor, image_from_base: Tensor, image_aug: Tensor
) -> Planes:
    """Points [B P 3+] of the augmented base frame in the input images: u, v (pixels) and depth (m), each [B N P].

    undo_base_aug [B 3 3], base_aug [B 4 4], image_from_base and image_aug [B N 4 4]. The depth is clamped to
    [1e-5, 1e5] before the division and not tested for its sign: upstream counts on points behind a camera landing far
    outside.
    """
    point = translate(-base_aug[:, :3, 3], points[..., :3].unbind(-1))
    x, y, z = rotate(undo_base_aug, point)  # B P, original base frame
    point = rotate(image_from_base[..., :3, :3], (x[:, None], y[:, None], z[:, None]))
    x, y, z = translate(image_from_base[..., :3, 3], point)  # B N P
    depth = z.clamp(1e-5, 1e5)
    u, v, _ = translate(image_aug[..., :3, 3], rotate(image_aug[..., :3, :3], (x / depth, y / depth, depth)))
    return u, v, depth


def depth_map(pixel_depth: Planes, valid: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Sparse depth images [B N H W] in m, 0 where no point falls, from `project`'s planes and valid [B P].

    Of several points on a pixel the last in point order counts, on every backend.
    """
    u, v, depth = pixel_depth
    (B, N, P), (H, W) = u.shape, image_size
    inside = (u >= 0) & (u < W) & (v >= 0) & (v < H) & valid[:, None]
    row, column = (torch.where(inside, x, torch.zeros_like(x)).to(torch.int32) for x in (v, u))
    pixel = torch.where(inside, row * W + column, H * W).view(B * N, P)
    # Sorted as the bits of positive normal floats, which are in the order of the integers: Ascend's AI Core sorts floats.
    bits, order = torch.sort((pixel + _NORMAL).view(torch.float32), dim=1, stable=True)
    pixel = bits.view(torch.int32) - _NORMAL
    last = torch.cat([pixel[:, 1:] != pixel[:, :-1], torch.ones_like(pixel[:, :1], dtype=torch.bool)], 1)
    kept = last & (pixel < H * W)
    # Every pixel gets one depth and zeros: a sum in any order. The zeros are spread, not added to a single pixel.
    spread = torch.arange(P, dtype=torch.int32, device=u.device) % (H * W)
    image = torch.arange(B * N, dtype=torch.int32, device=u.device)[:, None] * (H * W)
    depth = depth.reshape(B * N, P).gather(1, order)
    place = (image + torch.where(kept, pixel, spread)).view(-1)
    made = depth.new_zeros(B * N * H * W).index_add(
        0, place, torch.where(kept, depth, torch.zeros_like(depth)).view(-1)
    )
    return made.view(B, N, H, W)


def depth_map_on_host(pixel_depth: Planes, valid: Tensor, image_size: tuple[int, int]) -> Tensor:
    """`depth_map` of tensors on the CPU, bit for bit: numpy writes in the order of the points, so that nothing is sorted."""
    u, v, depth = (plane.numpy() for plane in pixel_depth)
    (H, W), seen = image_size, valid.numpy()[:, None]
    b, n, p = np.nonzero((u >= 0) & (u < W) & (v >= 0) & (v < H) & seen)
    made = np.zeros((*u.shape[:2], H, W), dtype=np.float32)
    made[b, n, v[b, n, p].astype(np.int32), u[b, n, p].astype(np.int32)] = depth[b, n, p]
    return torch.from_numpy(made)
