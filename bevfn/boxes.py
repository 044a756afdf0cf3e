"""Oriented 3-D boxes: corners, yaw, overlap of rotated rectangles, IoU from above and in 3-D. Static shapes, no gradient needed.

A box is [x, y, z, dx, dy, dz, yaw, ...]: metres and radians; x y z is the BOTTOM centre, z up; yaw counts from +x
counter-clockwise seen from above, and dx runs along yaw. Further columns (velocity) are ignored here.
"""

import math

import torch
from torch import Tensor

# Sizes are clipped to this many metres, centre distances to ten times that: products of three stay finite in float32.
LARGEST_M = 1e6

# An edge that climbs less than this contributes nothing that float32 could hold; dividing by it could overflow.
LEVEL_M = 1e-20

# Along (dx, dy) in units of the half size, counter-clockwise from above, starting at front left.
_SIGNS = ((1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0))


def only_usable(boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What can be a target: boxes [... G 7+], valid [... G] bool -> (boxes without NaN and infinities, valid ones whose
    numbers are finite and sizes above 0, how many others were valid: 0-d int64).

    The logarithm of a size of 0 makes a loss infinite, or hides: the gradient of an L1 distance from NaN is 0.
    """
    finite = torch.isfinite(boxes)
    # sums, since Ascend reduces no booleans
    usable = (finite.sum(-1) == boxes.shape[-1]) & ((boxes[..., 3:6] > 0).sum(-1) == 3)
    return torch.where(finite, boxes, 0.0), valid & usable, (valid & ~usable).sum()


def log_size(boxes: Tensor) -> Tensor:
    """boxes [... 7+] -> [... 3]: log of dx, dy, dz; 0 where a size, as in padding, has none."""
    size = boxes[..., 3:6]
    return torch.where(size > 0, size, 1.0).log()


def limit_yaw(yaw: Tensor) -> Tensor:
    """The same direction in [-pi, pi)."""
    turned = yaw - torch.floor(yaw / (2 * math.pi) + 0.5) * (2 * math.pi)
    return torch.where(turned >= math.pi, turned - 2 * math.pi, turned)  # rounding can reach the open end


def bev_corners(boxes: Tensor) -> Tensor:
    """boxes [... 7+] -> [... 4 2] x, y: front left, rear left, rear right, front right (front = along yaw)."""
    boxes = _wide(boxes)
    signs = boxes.new_tensor(_SIGNS)  # 4 2
    half = boxes[..., None, 3:5] * signs * 0.5  # ... 4 2
    cos, sin = torch.cos(boxes[..., 6:7]), torch.sin(boxes[..., 6:7])  # ... 1
    x = half[..., 0] * cos - half[..., 1] * sin
    y = half[..., 0] * sin + half[..., 1] * cos
    return torch.stack([x, y], dim=-1) + boxes[..., None, 0:2]


def corners(boxes: Tensor) -> Tensor:
    """boxes [... 7+] -> [... 8 3]: the four corners of `bev_corners` at the bottom, then the same four at the top."""
    boxes = _wide(boxes)
    flat = bev_corners(boxes)  # ... 4 2
    bottom = boxes[..., 2:3].unsqueeze(-1).expand(*flat.shape[:-1], 1)  # ... 4 1
    top = bottom + boxes[..., 5:6].unsqueeze(-1)
    return torch.cat([torch.cat([flat, bottom], dim=-1), torch.cat([flat, top], dim=-1)], dim=-2)


def rotated_overlap_bev(a: Tensor, b: Tensor) -> Tensor:
    """Area shared by each pair of rotated rectangles: a [... Q 7+], b [... G 7+] -> [... Q G] m².

    Green's theorem for the rectangle |x| <= a_x/2, |y| <= a_y/2 of box a, in a's axes, and the polygon b:

        area = sum over the edges of b, as far as they lie in |y| <= a_y/2, of the integral of clip(x, ±a_x/2) dy

    since d/dx clip(x) is 1 inside the strip and 0 outside. Only b's four edges appear and every term is continuous in
    the boxes, so coincident, parallel and touching edges need no special case. The origin is b's centre, and the
    clipped value at that centre is subtracted (the integral of a constant over a closed curve is 0): no term is larger
    than either box. Float32 error: about 1e-6 of the smaller area for boxes of like size. Never NaN: a pair with a NaN
    or infinite centre or yaw has overlap 0; sizes are clipped to 0 .. 1e6 m.
    """
    a, b = _wide(a)[..., :, None, :], _wide(b)[..., None, :, :]  # ... Q 1 7+, ... 1 G 7+
    cos, sin = torch.cos(a[..., 6]), torch.sin(a[..., 6])  # ... Q 1
    east, north = _offset(b[..., 0] - a[..., 0]), _offset(b[..., 1] - a[..., 1])  # ... Q G
    center_x, center_y = cos * east + sin * north, cos * north - sin * east  # b's centre in a's axes
    half_x, half_y = _size(a[..., 3]) * 0.5, _size(a[..., 4]) * 0.5  # ... Q 1
    left, right = -half_x - center_x, half_x - center_x  # ... Q G, the window a seen from b's centre
    below, above = -half_y - center_y, half_y - center_y

    turn = b[..., 6] - a[..., 6]  # ... Q G
    along_x, along_y = torch.cos(turn), torch.sin(turn)  # b's front in a's axes
    front, side = _size(b[..., 3]) * 0.5, _size(b[..., 4]) * 0.5  # ... 1 G
    x = torch.stack([i * front * along_x - j * side * along_y for i, j in _SIGNS])  # 4 ... Q G
    y = torch.stack([i * front * along_y + j * side * along_x for i, j in _SIGNS])
    next_x, next_y = torch.cat([x[1:], x[:1]]), torch.cat([y[1:], y[:1]])

    start, end = _clip(y, below, above), _clip(next_y, below, above)  # the part inside the horizontal strip
    rise, run = next_y - y, next_x - x
    slope = run / torch.where(rise.abs() < LEVEL_M, 1.0, rise)
    start_x = _between(x + (start - y) * slope, x, next_x)
    end_x = _between(x + (end - y) * slope, x, next_x)
    mean = _mean_clipped(start_x, end_x, left, right) - _clip(torch.zeros_like(left), left, right)
    area = (mean * (end - start)).sum(0)
    return torch.where(area > 0, area, 0.0)  # also turns NaN into 0


def iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of volumes: a [... Q 7+], b [... G 7+] -> [... Q G] in 0 .. 1.

    BEV overlap times height overlap. Boxes without volume, or with NaN, have IoU 0.
    """
    overlap = rotated_overlap_bev(a, b)  # ... Q G
    a, b = _wide(a)[..., :, None, :], _wide(b)[..., None, :, :]
    bottom = _offset(b[..., 2] - a[..., 2])  # of b, seen from a's bottom
    height_a, height_b = _size(a[..., 5]), _size(b[..., 5])
    height = torch.minimum(height_a, bottom + height_b) - torch.clamp(bottom, min=0)
    shared = overlap * torch.clamp(height, min=0)
    volume_a = _size(a[..., 3]) * _size(a[..., 4]) * height_a
    volume_b = _size(b[..., 3]) * _size(b[..., 4]) * height_b
    return _share(shared, volume_a + volume_b - shared)


def iou_bev(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of the rectangles seen from above: a [... Q 7+], b [... G 7+] -> [... Q G] in 0 .. 1.

    Boxes without area, or with NaN, have IoU 0.
    """
    shared = rotated_overlap_bev(a, b)  # ... Q G
    area_a, area_b = (_size(box[..., 3]) * _size(box[..., 4]) for box in (_wide(a), _wide(b)))
    return _share(shared, area_a[..., :, None] + area_b[..., None, :] - shared)


def _share(shared: Tensor, union: Tensor) -> Tensor:
    """shared / union in 0 .. 1; 0 where there is no union, or a NaN."""
    iou = shared / torch.where(union > 0, union, 1.0)
    return torch.where(iou > 0, torch.clamp(iou, max=1.0), 0.0)


def _mean_clipped(x0: Tensor, x1: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Mean of clip(x, low, high) for x running evenly from x0 to x1."""
    y0, y1 = _clip(x0, low, high), _clip(x1, low, high)
    # The mean is y0 before the window is entered, (y0 + y1) / 2 inside, y1 after it is left.
    length = x1 - x0
    share = (0.5 * (y1 - y0) + (x1 - y1)) / torch.where(length.abs() < LEVEL_M, 1.0, length)
    return y0 + (y1 - y0) * torch.clamp(share, 0, 1)


def _clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, low), high)


def _between(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _clip(x, torch.minimum(a, b), torch.maximum(a, b))


def _size(x: Tensor) -> Tensor:
    return torch.clamp(x, 0, LARGEST_M)


def _offset(x: Tensor) -> Tensor:
    return torch.clamp(x, -10 * LARGEST_M, 10 * LARGEST_M)


def _wide(boxes: Tensor) -> Tensor:
    return boxes if boxes.dtype == torch.float64 else boxes.float()
