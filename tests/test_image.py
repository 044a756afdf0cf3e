"""Image files that mean nothing, or not what their calibration says, are refused before their pixels are decoded."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bevfn.data import image, points

SIZE = (90, 160)  # H W


def picture() -> Image.Image:
    """Noise, which no encoder makes short."""
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(form: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    picture().save(file, form, **options)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[image.ORIENTATION] = orientation
    return encoded(exif=exif)


def of_size(height: int, width: int) -> bytes:
    """A JPEG whose head says that size, and whose pixels are those of another."""
    content = bytearray(encoded())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def sixteen_bits() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full(SIZE, 40_000, np.uint16)).save(file, "PNG")
    return file.getvalue()


def huge_png() -> bytes:
    """A kilobyte that asks for 12 GB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 65_500, 65_500, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def zeroed(**options) -> bytes:
    content = bytearray(encoded(**options))
    content[len(content) // 2 : len(content) // 2 + 512] = bytes(512)
    return bytes(content)


WRONG = {
    "turned": (turned(6), "its EXIF tag says that it is to be turned"),
    "gif": (encoded("GIF"), "cannot be decoded (none of these formats)"),
    "16 bits": (sixteen_bits(), "its pixels are of the kind I;16, of more than 8 bits a channel; convert it to RGB"),
    "middle zeroed": (zeroed(), "the JPEG has zeros in its middle"),
    "many scans": (encoded() + b"\xff\xda" * 101, "the JPEG has 10"),
    "half": (encoded()[:2000], "cannot be decoded"),
    "another size": (of_size(91, 160), "the image is 160x91 but the calibration is for 160x90"),
    "nothing": (b"", "cannot be decoded (none of these formats); copy it again, or convert it to JPEG or PNG"),
}


def write(folder: Path, content: bytes) -> Path:
    (folder / "a.jpg").write_bytes(content)
    return folder / "a.jpg"


@pytest.mark.parametrize("name", WRONG)
def test_an_image_that_cannot_be_meant_is_refused_by_name(tmp_path, name):
    content, what = WRONG[name]
    with pytest.raises(ValueError) as error:
        image.read(write(tmp_path, content), size=SIZE)
    assert str(error.value).startswith(f"{tmp_path}/a.jpg: ") and what in str(error.value)


@pytest.mark.parametrize("limit", [None, int(3.2e11)])  # Pillow's own, and what the devkit makes of it
@pytest.mark.parametrize("content", [of_size(65_500, 65_500), huge_png()], ids=["jpeg", "png"])
def test_an_image_that_says_it_is_huge_is_refused_before_it_is_decoded(tmp_path, monkeypatch, content, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit or Image.MAX_IMAGE_PIXELS)
    monkeypatch.setattr(Image.core, "new", None)  # which makes room for the pixels
    path = write(tmp_path, content)
    for look in (image.read, image.size):
        with pytest.raises(ValueError, match=r"a.jpg: the image says that it has more than 67,108,864 pixels"):
            look(path)


@pytest.mark.parametrize(
    "content",
    [encoded(), encoded(optimize=True), encoded(progressive=True), encoded("PNG"), encoded("WEBP"), turned(1)],
)
def test_a_good_image_is_read(tmp_path, content):
    read = image.read(write(tmp_path, content), size=SIZE)
    assert read.mode == "RGB" and read.size == SIZE[::-1]


@pytest.mark.parametrize("read, name", [(image.read, "a.jpg"), (image.size, "a.jpg"), (points.read, "a.bin")])
def test_a_file_without_end_is_not_read(tmp_path, read, name):
    with open(tmp_path / name, "wb") as file:
        file.truncate(2**40)  # of which the disk holds nothing
    with pytest.raises(ValueError, match=rf"{name}: the (image|point) file has 1,099,511,627,776 bytes, more than"):
        read(tmp_path / name)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: the (image|point file) does not exist"):
        read(tmp_path / name)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_of_8_bits_become_rgb(tmp_path, mode):
    file = io.BytesIO()
    picture().convert(mode).save(file, "JPEG")
    assert image.decode(write(tmp_path, file.getvalue())).shape == (*SIZE, 3)


@pytest.mark.parametrize("optimize", [True, False])
def test_an_even_image_has_no_hole(tmp_path, optimize):
    file = io.BytesIO()
    Image.new("RGB", (1600, 900)).save(file, "JPEG", optimize=optimize)  # whose coded pixels may be zeros
    assert not image.decode(write(tmp_path, file.getvalue())).any()
