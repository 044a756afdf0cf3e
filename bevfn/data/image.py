"""Camera images: decoding, and resize, crop, flip, rotate of one image together with the matrix that does the same.

The matrix is `augmented_from_original` for homogeneous pixels (u, v, 1): A in [:2,:2], t in [:2,3]. Resizing moves
pixel u to `resize * u`, without the half-pixel shift that a resampling filter applies: upstream's convention, which
published weights expect.

Source: mmdetection3d projects/BEVFusion ImageAug3D; golden cases bevfusion_lidar_cam (`imgs`, `img_aug_matrix`).
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel at most; they become RGB
LARGEST = 2**26  # pixels: 8192 x 8192, which take 200 MB
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
Filter = Literal["nearest", "bicubic"]
FILTERS: dict[Filter, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bicubic": Image.Resampling.BICUBIC,
}
HOLE = bytes(64)
SCANS = 100  # of a progressive JPEG; encoders write about ten


class _Refused(ValueError):
    """What we say about an image, unlike what Pillow says."""


def read(path: Path, *, size: tuple[int, int] | None = None) -> Image.Image:
    """The image file as an RGB picture; `size` (H,W) is the size its calibration is made for (None: any).

    Raises ValueError, before pixels are decoded, if the file is missing, no image, of another size or of more than
    LARGEST pixels, has more than 8 bits a channel, is to be turned by its EXIF tag, or is a JPEG with a hole of zeros; and
    if it is truncated.
    """
    with _opened(Path(path), whole=True) as (picture, file):
        if size is not None and (picture.height, picture.width) != tuple(size):
            raise _Refused(
                f"{path}: the image is {picture.width}x{picture.height} but the calibration is for {size[1]}x{size[0]} "
                "(width x height); use the original image, or tables and intrinsics for its size."
            )
        if wrong := _wrong(picture, file):
            raise _Refused(f"{path}: {wrong}.")
        picture.load()
        return picture if picture.mode == "RGB" else picture.convert("RGB")


def decode(path: Path, *, size: tuple[int, int] | None = None) -> np.ndarray:
    """`read` as an array, [H,W,3] uint8."""
    return np.asarray(read(path, size=size))


def size(path: Path) -> tuple[int, int]:
    """(H, W) from the file's head. Raises ValueError if the file is missing, no image or of more than LARGEST pixels."""
    with _opened(Path(path), whole=False) as (picture, _):
        return picture.height, picture.width


@contextlib.contextmanager
def _opened(path: Path, *, whole: bool) -> Iterator[tuple[Image.Image, io.BytesIO]]:
    """The image, of which no more than the head is decoded, and the `whole` file; whatever Pillow raises inside becomes a
    sentence."""
    try:
        if not path.is_file():  # a pipe would never end
            raise FileNotFoundError
        if path.stat().st_size > 4 * LARGEST:
            raise _Refused(
                f"{path}: the image file has {path.stat().st_size:,} bytes, more than any camera's; copy it again."
            )
        file = io.BytesIO(path.read_bytes() if whole else b"")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's own limit, which the devkit lifts to 3.2e11 pixels
            picture = Image.open(file if whole else path, formats=FORMATS)
        with picture:
            if picture.width * picture.height > LARGEST:
                raise Image.DecompressionBombError
            yield picture, file
    except (_Refused, MemoryError):
        raise
    except FileNotFoundError:
        raise ValueError(
            f"{path}: the image does not exist; check the data folder and the file that names it."
        ) from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: the image says that it has more than {LARGEST:,} pixels; copy it again.") from None
    except Exception as error:  # of a damaged file: nearly any
        what = "none of these formats" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(
            f"{path}: the image cannot be decoded ({what}); copy it again, or convert it to {' or '.join(FORMATS[:2])}."
        ) from error


def _wrong(picture: Image.Image, file: io.BytesIO) -> str:
    """What a decoder would not say of an image that its head, or its bytes, give away; empty if nothing."""
    if picture.mode not in MODES:
        return f"its pixels are of the kind {picture.mode}, of more than 8 bits a channel; convert it to RGB"
    if picture.getexif().get(ORIENTATION, 1) not in (0, 1):
        return (
            "its EXIF tag says that it is to be turned when shown, but its calibration does not say whether it is for the "
            "turned image; store it upright, without that tag"
        )
    if picture.format == "JPEG" and (scans := file.getvalue().count(b"\xff\xda")) > SCANS:
        return f"the JPEG has {scans} scans, each of which takes as long as an image; convert it"
    if picture.format == "JPEG" and _has_hole(file.getvalue()):
        return "the JPEG has zeros in its middle, as an interrupted copy leaves them; copy it again"
    return ""


def _has_hole(jpeg: bytes) -> bool:
    """Whether the coded pixels have a run of zeros that no encoder writes; decoders make noise of it and say nothing.

    Zero bits are the first code of each Huffman table again and again. If it means "no more coefficients" in all of them,
    a run may be an even part of the picture; if another thing in one, as in the standard's tables, it is a hole.
    """
    place, first = 2, set()
    while jpeg[place : place + 1] == b"\xff" and jpeg[place + 1 : place + 2] != b"\xda":  # segments before the scan
        length = int.from_bytes(jpeg[place + 2 : place + 4], "big")
        if jpeg[place + 1 : place + 2] == b"\xc4":
            first |= _first_codes(jpeg[place + 4 : place + 2 + length])
        place += 2 + length
    pixels = jpeg[place + 2 : jpeg.rfind(b"\xff\xd9")]
    return any(first) and HOLE in pixels and b"\xff\xda" not in pixels  # several scans have components alone


def _first_codes(tables: bytes) -> set[int]:
    """What the all-zero code of each table of AC coefficients means: 0 is "no more"."""
    found = set()
    while len(tables) > 17:
        if tables[0] >> 4 == 1:
            found.add(tables[17])
        tables = tables[17 + sum(tables[1:17]) :]
    return found


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
    turned: Filter = "nearest",
) -> tuple[np.ndarray, np.ndarray]:
    """Resizes (bicubic, antialiased), crops, mirrors and rotates (about the crop's centre) one image.

    picture: RGB, or [H,W,3] uint8; size (H,W) of the result; resize: factor; crop (left, top) in the resized image, which may
    reach outside of it (black); flip: left-right; rotate_deg: counter-clockwise as seen; turned: of what pixels are then made.
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
    picture = picture.rotate(rotate_deg, FILTERS[turned])
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
