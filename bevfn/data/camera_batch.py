"""What a step of a camera-only, multi-frame model reads: the padded CameraBatch of fixed shapes.

Letters: B batch, T frames (0 the key frame, then earlier ones, newest first), N cameras, H W image rows and columns, G
padded boxes. "ego" is the vehicle's frame at the key frame (x forward, y left, z up, metres), in which boxes, the BEV
grid and the frustums of all frames live; every camera's pose already contains the ego motion since its exposure, so
that nothing is warped later. Transforms are `target_from_source`.

Source: BEVDepth (Li et al. 2022, arXiv 2206.10092); golden case bevdepth_r50_2key, "Inputs".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bevfn import geometry, tree
from bevfn.data import layout


@tree.register
@dataclass(frozen=True)
class CameraBatch:
    """A pytree of tensors; annotations and depth may be None where nothing is trained.

    `make` computes the inverses on the host, as `data.batch.collate` does: a graph for the NPU has no matrix inversion.
    """

    images: Tensor
    """[B,T,N,H,W,3] uint8 RGB, resized and cropped."""
    intrinsics: Tensor
    """[B,T,N,4,4] float32: original pixels (times depth) from camera."""
    image_aug: Tensor
    """[B,T,N,4,4] float32: pixels of `images` from pixels of the original image; depth passes through."""
    ego_from_camera: Tensor
    """[B,T,N,4,4] float32: the KEY frame's vehicle frame from the camera of frame t, not augmented."""
    bev_aug: Tensor
    """[B,4,4] float32: augmented ego from ego."""
    undo_image_aug: Tensor
    """[B,T,N,3,3] float32: inverse of image_aug[:3,:3]."""
    ego_from_pixel: Tensor
    """[B,T,N,3,3] float32: ego_from_camera[:3,:3] @ inverse(intrinsics[:3,:3])."""
    depth: Tensor | None = None
    """[B,N,H,W] float32: LiDAR depth along the optical axis in the key frame's images [m], 0 where no point falls."""
    boxes: Tensor | None = None
    """[B,G,9] float32: x, y, z of the BOTTOM centre, dx (length, along yaw), dy, dz [m], yaw [rad], vx, vy [m/s];
    augmented ego."""
    labels: Tensor | None = None
    """[B,G] int64 class index, 0 in padding."""
    boxes_valid: Tensor | None = None
    """[B,G] bool."""

    def to(self, device: torch.device | str) -> CameraBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {name: v if v is None else v.to(device) for name, v in layout.fields(self).items()}
        return CameraBatch(**moved)

    def validate(self) -> None:
        """Checks shapes, dtypes and values on the host (not for graphs: it looks at the data).

        Raises ValueError naming the first field that is wrong.
        """
        layout.check(self, _LAYOUT)
        if self.depth is not None and bool((self.depth < 0).any()):
            raise ValueError("CameraBatch.depth has values below 0 m; a pixel without a point is 0.")
        annotations = (self.boxes, self.labels, self.boxes_valid)
        if any(a is None for a in annotations) and any(a is not None for a in annotations):
            raise ValueError("CameraBatch needs all of boxes, labels and boxes_valid, or none of them.")


def make(
    images: Tensor, intrinsics: Tensor, image_aug: Tensor, ego_from_camera: Tensor, bev_aug: Tensor, **rest: Tensor
) -> CameraBatch:
    """A CameraBatch with its inverses, on the host; `rest`: depth and annotations."""
    return CameraBatch(
        images=images,
        intrinsics=intrinsics,
        image_aug=image_aug,
        ego_from_camera=ego_from_camera,
        bev_aug=bev_aug,
        undo_image_aug=geometry.invert(image_aug[..., :3, :3]),
        ego_from_pixel=geometry.unprojection(ego_from_camera, intrinsics),
        **rest,
    )


_LAYOUT: dict[str, tuple[str, torch.dtype]] = {
    "images": ("B T N H W 3", torch.uint8),
    "intrinsics": ("B T N 4 4", torch.float32),
    "image_aug": ("B T N 4 4", torch.float32),
    "ego_from_camera": ("B T N 4 4", torch.float32),
    "bev_aug": ("B 4 4", torch.float32),
    "undo_image_aug": ("B T N 3 3", torch.float32),
    "ego_from_pixel": ("B T N 3 3", torch.float32),
    "depth": ("B N H W", torch.float32),
    "boxes": ("B G 9", torch.float32),
    "labels": ("B G", torch.int64),
    "boxes_valid": ("B G", torch.bool),
}
