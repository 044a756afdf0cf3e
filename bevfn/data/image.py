"""Camera images: decoding, and resize, crop, flip, rotate of one image together with the matrix that does the same.

The matrix is `augmented_from_original` for homogeneous pixels (u, v, 1): A in [:2,:2], t in [:2,3]. Resizing moves
pixel u to `resize * u`, without the half-pixel shift that a resampling filter applies: upstream's convention, which
published weights expect.

Source: mmdetection3d projects/BEVFusion ImageAug3D; golden cases bevfusion_lidar_cam (`imgs`, `img_aug_matrix`).
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image


def read(path: Path, *, size: tuple[int, int] | None = None) -> Image.Image:
    """The image file as an RGB picture; `size` (H,W) is the size its calibration is made for (None: any).

    Raises ValueError if the file is missing, truncated, no image, or of another size.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: the image does not exist; check the data folder and the file that names it.")
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise ValueError(f"{path}: the image cannot be decoded ({error}); copy it again.") from error
    if size is not None and (picture.height, picture.width) != tuple(size):
        raise ValueError(
            f"{path}: the image is {picture.width}x{picture.height} but the calibration is for {size[1]}x{size[0]} "
            "(width x height); use the original image, or tables and intrinsics for its size."
        )
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def decode(path: Path, *, size: tuple[int, int] | None = None) -> np.ndarray:
    """`read` as an array, [H,W,3] uint8."""
    return np.asarray(read(path, size=size))


def size(path: Path) -> tuple[int, int]:
    """(H, W) from the file's head. Raises ValueError if the file is missing or no image."""
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except (OSError, SyntaxError) as error:  # as `read`
        raise ValueError(f"{path} is missing or no image ({error}); copy it again.") from error


def centre_crop(source_size: tuple[int, int], size: tuple[int, int], resize: float) -> tuple[int, int]:
    """(left, top) of the test-time crop in the resized image: centred in width, aligned with the bottom in height.

    A factor that just covers may round to an image that is a pixel short; that one is black, as upstream.
    Raises ValueError if the resized image does not cover `size`.
    """
    height, width = (int(side * resize) for side in source_size)
    if height < size[0] - 1 or width < size[1] - 1:
        raise ValueError(
            f"resize {resize} turns {source_size[1]}x{source_size[0]} into {width}x{height} (width x height), smaller "
            f"than image_size {size[1]}x{size[0]}; use a larger resize or a smaller image_size."
        )
    return int(max(0, width - size[1]) / 2), height - size[0]


def transform(
    picture: Image.Image | np.ndarray,
    *,
    size: tuple[int, int],
    resize: float,
    crop: tuple[int, int],
    flip: bool = False,
    rotate_deg: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Resizes (bicubic, antialiased), crops, mirrors and rotates (nearest, about the crop's centre) one image.

    picture: RGB, or [H,W,3] uint8; size (H,W) of the result; resize: factor; crop (left, top) in the resized image, which may
    reach outside of it (black); flip: left-right; rotate_deg: counter-clockwise as seen.
    Returns (image [size,3] uint8, augmented_from_original [4,4] float32).
    """
    height, width = size
    left, top = crop
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture = picture.resize((int(picture.width * resize), int(picture.height * resize)), Image.Resampling.BICUBIC)
    picture = picture.crop((left, top, left + width, top + height))
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(rotate_deg)
    return np.array(picture), matrix(size=size, resize=resize, crop=crop, flip=flip, rotate_deg=rotate_deg)


def matrix(
    *, size: tuple[int, int], resize: float, crop: tuple[int, int], flip: bool = False, rotate_deg: float = 0.0
) -> np.ndarray:
    """augmented_from_original [4,4] float32 of `transform` with the same arguments: rotate @ flip @ crop @ resize."""
    height, width = size
    linear = np.eye(2) * resize
    shift = -np.array(crop, dtype=np.float64)  # px
    if flip:
        mirror = np.diag([-1.0, 1.0])
        linear, shift = mirror @ linear, mirror @ shift + np.array([width, 0.0])
    angle = math.radians(rotate_deg)
    # Rows grow downwards, so a turn that looks counter-clockwise has its sines' signs exchanged.
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    centre = np.array([width, height]) / 2
    linear, shift = turn @ linear, turn @ (shift - centre) + centre
    result = np.eye(4)
    result[:2, :2], result[:2, 3] = linear, shift
    return result.astype(np.float32)
