"""Camera-only batches of random images: two cameras over two key frames, made without files."""

import math

import torch

from bevfn.data.batch import Base, Batch
from bevfn.data.batch import make as make_batch


def yaw(angle: float) -> torch.Tensor:
    """[4 4] rotation about z."""
    turned = torch.eye(4)
    turned[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return turned


def make(
    *, B: int = 2, T: int = 2, size: tuple[int, int] = (32, 96), boxes: int = 6, classes: int = 4, reach: float = 12.0,
    seed: int = 0, base_aug: torch.Tensor | None = None,
) -> Batch:  # fmt: skip
    """Cameras that look forward and back, a vehicle that drives 2 m and turns 0.1 rad between frames."""
    generator = torch.Generator().manual_seed(seed)
    N, (H, W) = 2, size
    forward = torch.tensor([[0.0, 0, 1, 0.2], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]])
    cameras = torch.stack([forward, yaw(math.pi) @ forward])  # N 4 4
    earlier = yaw(-0.1).clone()
    earlier[0, 3] = -2.0
    poses = torch.stack([torch.matrix_power(earlier, t) @ cameras for t in range(T)])  # T N 4 4
    intrinsics = torch.eye(4)
    intrinsics[0, 0] = intrinsics[1, 1] = float(W)
    intrinsics[0, 2], intrinsics[1, 2] = W - 3.0, float(H)
    image_aug = torch.diag(torch.tensor([0.5, 0.5, 1.0, 1.0]))
    image_aug[1, 3] = -2.0
    depth = torch.where(
        torch.rand(B, N, H, W, generator=generator) < 0.02, 1.0 + 30 * torch.rand(B, N, H, W, generator=generator), 0.0
    )
    found = torch.rand(B, boxes, 9, generator=generator)
    found[..., :2] = (found[..., :2] * 2 - 1) * reach
    found[..., 3:6] = found[..., 3:6] * 3 + 1
    valid = torch.arange(boxes).expand(B, boxes) < torch.tensor([boxes - 1 - b for b in range(B)])[:, None]
    labels = torch.randint(classes, (B, boxes), generator=generator)
    return make_batch(
        base=Base.EGO_AT_CAMERAS,
        base_aug=(torch.eye(4) if base_aug is None else base_aug).expand(B, 4, 4).clone(),
        boxes=found * valid[..., None],
        labels=labels * valid,
        boxes_valid=valid,
        images=torch.randint(256, (B, T, N, H, W, 3), dtype=torch.uint8, generator=generator),
        intrinsics=intrinsics.expand(B, T, N, 4, 4).clone(),
        image_aug=image_aug.expand(B, T, N, 4, 4).clone(),
        base_from_camera=poses.expand(B, T, N, 4, 4).clone(),
        image_from_base=(intrinsics @ torch.linalg.inv(poses)).expand(B, T, N, 4, 4).clone(),
        depth=depth,
    )
