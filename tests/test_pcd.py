"""Clouds with a header: any order, types and encoding give the same points; what is none is refused by name."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bevfn.data import check, pcd, points

AUTOWARE = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("intensity", "u1"), ("return_type", "u1"), ("channel", "<u2")]
LETTERS = {"f": "F", "i": "I", "u": "U"}


def cloud(count: int, layout: list[tuple[str, str]], seed: int = 0) -> np.ndarray:
    """Points a lidar may have seen, as rows of that layout."""
    rng = np.random.default_rng(seed)
    made = np.zeros(count, layout)
    for name, _ in layout:
        made[name] = rng.normal(0, 20, count) if name in "xyz" else rng.integers(0, 120, count)
    return made


def header(made: np.ndarray, encoding: str) -> bytes:
    kinds = [made.dtype[name] for name in made.dtype.names]
    lines = [
        "# .PCD v0.7 - Point Cloud Data file format",
        "VERSION 0.7",
        f"FIELDS {' '.join(made.dtype.names)}",
        f"SIZE {' '.join(str(kind.itemsize) for kind in kinds)}",
        f"TYPE {' '.join(LETTERS[kind.kind] for kind in kinds)}",
        f"COUNT {' '.join('1' for _ in kinds)}",
        f"WIDTH {len(made)}",
        "HEIGHT 1",
        "VIEWPOINT 0 0 0 1 0 0 0",
        f"POINTS {len(made)}",
        f"DATA {encoding}",
    ]
    return "\n".join(lines).encode() + b"\n"


def squeezed(data: bytes) -> bytes:
    """LZF of a simple encoder: copies of a byte's run, else literals."""
    out, place = bytearray(), 0
    while place < len(data):
        run = 1
        while place + run < len(data) and data[place + run] == data[place] and run < 200:
            run += 1
        if run >= 4:
            length = run - 3  # after the literal, run - 1 bytes are copied, of which the format counts 2 less
            out += bytes([0, data[place]])
            out += bytes([min(length, 7) << 5]) + (bytes([length - 7]) if length >= 7 else b"") + b"\0"
            place += run
        else:
            out += bytes([0, data[place]])
            place += 1
    return bytes(out)


def encoded(made: np.ndarray, encoding: str) -> bytes:
    if encoding == "binary":
        return made.tobytes()
    if encoding == "ascii":
        return "\n".join(" ".join(repr(v.item()) for v in row) for row in made).encode()
    raw = b"".join(made[name].tobytes() for name in made.dtype.names)
    packed = squeezed(raw)
    return len(packed).to_bytes(4, "little") + len(raw).to_bytes(4, "little") + packed


def write(path: Path, made: np.ndarray, encoding: str = "binary") -> Path:
    path.write_bytes(header(made, encoding) + encoded(made, encoding))
    return path


@pytest.mark.parametrize("encoding", ["binary", "ascii", "binary_compressed"])
@pytest.mark.parametrize("count", [1, 500])
def test_every_encoding_gives_the_points(tmp_path, encoding, count):
    made = cloud(count, AUTOWARE)
    read, bad = points.read(write(tmp_path / "a.pcd", made, encoding))
    want = np.column_stack([made[name].astype("<f4") for name in ("x", "y", "z", "intensity", "channel")])
    np.testing.assert_array_equal(read, want.reshape(-1, 5))
    assert bad == 0 and read.dtype == np.float32


@pytest.mark.parametrize("sign", ["", "-"])
def test_a_number_of_500_digits_is_not_printed_whole(tmp_path, sign):
    content = write(tmp_path / "a.pcd", cloud(5, AUTOWARE)).read_bytes()
    (tmp_path / "a.pcd").write_bytes(content.replace(b"POINTS 5", f"POINTS {sign}{'7' * 500}".encode()))
    with pytest.raises(ValueError, match=rf"a.pcd: the point file's header says {sign}7+\.\.\. POINTS, but") as error:
        points.read(tmp_path / "a.pcd")
    assert len(str(error.value)) < 250


@settings(max_examples=30)
@given(
    st.permutations(["x", "y", "z", "intensity", "ring", "time", "_"]),
    st.sampled_from(["<f4", "<f8"]),
    st.integers(0, 99),
)
def test_fields_may_have_any_order_and_width(tmp_path_factory, names, wide, seed):
    layout = [(name, wide if name in "xyz" else "<f4" if name == "time" else "<u2") for name in names]
    made = cloud(20, layout, seed)
    read = pcd.read(write(tmp_path_factory.mktemp("c") / "a.pcd", made), points.MOST)
    want = np.column_stack([made[name] for name in ("x", "y", "z", "intensity", "ring")])
    np.testing.assert_array_equal(read, want.astype("<f4"))


def test_without_a_ring_it_is_minus_one_and_nan_points_are_counted(tmp_path):
    made = cloud(50, AUTOWARE[:4])
    made["x"][:3] = np.nan
    read, bad = points.read(write(tmp_path / "a.pcd", made, "ascii"))
    assert bad == 3 and len(read) == 47 and (read[:, 4] == -1).all()


GOOD = cloud(20, AUTOWARE)
WRONG = {
    "other fields": (
        header(GOOD[["x", "y", "z"]].copy(), "binary"),
        r"has no field intensity; it has x, y, z: write x, y, z",
    ),
    "no header": (GOOD.tobytes() * 30, r"has no PCD header that ends in DATA"),
    "short": (
        header(GOOD, "binary") + GOOD.tobytes()[:-1],
        r"has 319 bytes behind its header, which says 320; it is trunc",
    ),
    "short text": (header(GOOD, "ascii") + b"1 2 3\n", r"is not 20 lines of 6 numbers, as its header says"),
    "words": (header(GOOD, "ascii") + b"a b c\n" * 40, r"is not 20 lines of 6 numbers"),
    "another encoding": (
        header(GOOD, "zstd") + GOOD.tobytes(),
        r"DATA is 'zstd'; write ascii, binary or binary_compressed",
    ),
    "no sizes": (
        header(GOOD, "binary").replace(b"SIZE", b"SIZES"),
        r"does not say FIELDS, SIZE, TYPE, COUNT, POINTS and",
    ),
    "a wrong type": (header(GOOD, "binary").replace(b"TYPE F", b"TYPE X"), r"does not say FIELDS, SIZE, TYPE"),
    "no DATA": (header(GOOD, "").rstrip() + b"\n", r"does not say FIELDS"),
    "many": (
        header(GOOD, "binary").replace(b"POINTS 20", b"POINTS 99999999999"),
        r"says 99,999,999,999 POINTS, but WIDTH times HEIGHT is 20; it is damaged",
    ),
    "many in a row": (
        header(GOOD, "binary").replace(b"POINTS 20", b"POINTS 99999999999").replace(b"WIDTH 20", b"WIDTH 99999999999"),
        r"says 99,999,999,999 points of 16 bytes, not 1 to 10,000,000 of at most 200,000,000 bytes together",
    ),
    "negative": (
        header(GOOD, "binary").replace(b"POINTS 20", b"POINTS -1").replace(b"WIDTH 20", b"WIDTH -1"),
        r"says -1 points of 16 bytes, not 1 to",
    ),
    "none": (header(GOOD[:0], "binary"), r"the point file is empty \(0 points\); copy it again"),
    "wide": (
        header(GOOD, "binary").replace(b"COUNT 1", b"COUNT 9999999"),
        r"says 20 points of 40,000,008 bytes, not 1 to .* of at most 200,000,000 bytes together",
    ),
    "another grid": (
        header(GOOD, "binary").replace(b"HEIGHT 1", b"HEIGHT 2") + GOOD.tobytes(),
        r"says 20 POINTS, but WIDTH times HEIGHT is 40",
    ),
    "more points": (
        header(GOOD, "binary") + GOOD.tobytes() * 2,
        r"has 640 bytes behind its header, which says 320; it is damaged",
    ),
    "a byte behind zeros": (
        header(GOOD, "binary") + GOOD.tobytes() + bytes(100) + b"\1",
        r"has 421 bytes behind its header, which says 320; it is damaged",
    ),
    "text and zeros": (
        header(GOOD, "ascii") + encoded(GOOD, "ascii") + bytes(100),
        r"is not 20 lines of 6 numbers, as its header says",
    ),
    "more text": (
        header(GOOD, "ascii") + encoded(GOOD, "ascii") + b"\n1 2 3 4 5 6",
        r"is not 20 lines of 6 numbers, as its header says",
    ),
    "more packed": (
        header(GOOD, "binary_compressed") + encoded(GOOD, "binary_compressed") + b"\1",
        r"bytes behind its header, which says .*; it is damaged",
    ),
    "another frame": (
        header(GOOD, "binary").replace(b"VIEWPOINT 0 0 0 1", b"VIEWPOINT 5 0 0 1") + GOOD.tobytes(),
        r"VIEWPOINT is 5 0 0 1 0 0 0, not 0 0 0 1 0 0 0, so it is not certain in which frame",
    ),
    "half a viewpoint": (header(GOOD, "binary").replace(b"VIEWPOINT 0 0 0 1", b"VIEWPOINT 0"), r"does not say FIELDS"),
    "bad copies": (
        header(GOOD, "binary_compressed") + b"\4\0\0\0\x40\1\0\0" + b"\x20\xff\x20\xff",
        r"compressed points are damaged",
    ),
    "a bomb": (
        header(GOOD, "binary_compressed") + b"\5\0\0\0\x40\1\0\0" + b"\0\1\xe0\xff\0",
        r"compressed points are damaged",
    ),
    "short packed": (header(GOOD, "binary_compressed") + b"\xff\0\0\0\x40\1\0\0", r"it is truncated, copy it again"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_cloud_is_one_sentence(tmp_path, name):
    content, says = WRONG[name]
    (tmp_path / "a.pcd").write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        points.read(tmp_path / "a.pcd")
    assert str(error.value).startswith(f"{tmp_path}/a.pcd: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("value, type_of", [("300", "U 1"), ("-1", "U 1"), ("0.5", "U 1"), ("nan", "U 1"), ("128", "I 1"),
                                            ("65536", "U 2"), ("2e19", "U 8"), ("-9.3e18", "I 8"), ("1e39", "F 4")])  # fmt: skip
def test_text_that_its_type_cannot_hold_is_refused(tmp_path, value, type_of):
    kind, size = type_of.split()
    (tmp_path / "a.pcd").write_text(
        f"FIELDS x y z intensity\nSIZE 4 4 4 {size}\nTYPE F F F {kind}\nPOINTS 2\nDATA ascii\n1 2 3 4\n1 2 3 {value}\n"
    )
    name = f"float{8 * int(size)}" if kind == "F" else f"int{8 * int(size)}"
    says = rf"a.pcd: intensity of a point is {re.escape(f'{float(value):g}')}, which .* in the header, u?{name}, cannot hold"
    with pytest.raises(ValueError, match=says):
        points.read(tmp_path / "a.pcd")


@pytest.mark.parametrize("encoding", ["binary", "binary_compressed"])
def test_zeros_at_the_end_are_room_that_a_writer_left_to_reader_and_check(tmp_path, encoding):
    path = write(tmp_path / "a.pcd", GOOD, encoding)
    whole = path.read_bytes()
    for room in (0, 4096, pcd.PAGE):
        path.write_bytes(whole + bytes(room))
        assert len(points.read(path)[0]) == 20 and check.examine(path, deep=False) is None
        assert pcd.extent(path) == len(whole)
    path.write_bytes(whole + bytes(pcd.PAGE + 1))
    for read in (points.read, pcd.extent):
        with pytest.raises(
            ValueError, match=r"a.pcd: the point file has .* bytes behind its header, which says .*; it is damaged"
        ):
            read(path)
    assert check.examine(path, deep=False)[0] == "damaged"


def test_points_that_are_zeros_are_an_interrupted_copy_whatever_is_behind_them(tmp_path):
    made = cloud(200, AUTOWARE)
    content = header(made, "binary") + made.tobytes()[:-1600] + bytes(1600)
    for room in (0, 4096):
        (tmp_path / "a.pcd").write_bytes(content + bytes(room))
        with pytest.raises(
            ValueError, match=r"100 of 200 points are at 0 0 0, as where an interrupted copy wrote nothing"
        ):
            points.read(tmp_path / "a.pcd")
        assert check.examine(tmp_path / "a.pcd", deep=False) == (
            "damaged",
            "ends in zeros, as an interrupted copy leaves them",
        )


def test_bytes_that_are_missing_are_found_without_reading_the_points(tmp_path):
    for encoding in ("binary", "binary_compressed"):
        path = write(tmp_path / "a.pcd", GOOD, encoding)
        path.write_bytes(path.read_bytes()[:-1])
        kind, what = check.examine(path, deep=False)
        assert kind == "damaged" and re.search(r"bytes behind its header, which says .*; it is truncated", what)


@pytest.mark.parametrize("kept", [True, False])
def test_padding_of_compressed_points_is_there_or_left_out_as_pcl_does(tmp_path, kept):
    layout = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("_", "<u4"), ("intensity", "<f4"), ("ring", "<u2")]
    made = cloud(40, layout)
    raw = b"".join(made[name].tobytes() for name in made.dtype.names if kept or name != "_")
    packed = squeezed(raw)
    sizes = len(packed).to_bytes(4, "little") + len(raw).to_bytes(4, "little")
    (tmp_path / "a.pcd").write_bytes(header(made, "binary_compressed") + sizes + packed + bytes(100))
    want = np.column_stack([made[name] for name in ("x", "y", "z", "intensity", "ring")])
    np.testing.assert_array_equal(points.read(tmp_path / "a.pcd")[0], want.astype("<f4"))


@settings(max_examples=50)
@given(st.lists(st.one_of(st.binary(min_size=1, max_size=32), st.tuples(st.integers(1, 8192), st.integers(3, 264)))))
def test_copies_repeat_what_came_before(parts):
    """Byte by byte, as LZF is told, against copies of many bytes at once."""
    packed, want = bytearray(b"\0a"), bytearray(b"a")
    for part in parts:
        if isinstance(part, bytes):
            packed += bytes([len(part) - 1]) + part
            want += part
            continue
        back, length = min(part[0], len(want)) - 1, part[1] - 2
        packed += (
            bytes([min(length, 7) << 5 | back >> 8])
            + (bytes([length - 7]) if length >= 7 else b"")
            + bytes([back & 255])
        )
        for _ in range(length + 2):
            want.append(want[-back - 1])
    assert pcd._unpacked(bytes(packed), len(want)) == want


@settings(max_examples=150)
@given(st.integers(0, 2**31))
def test_damage_is_a_sentence_or_other_points(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    raw = bytearray(header(GOOD, "binary_compressed") + encoded(GOOD, "binary_compressed"))
    for place in rng.integers(0, len(raw), 4):
        raw[place] = rng.integers(0, 256)
    path = tmp_path_factory.mktemp("c") / "a.pcd"
    path.write_bytes(raw)
    try:
        read, _ = points.read(path)
    except ValueError as error:
        assert str(error).startswith(str(path))
    else:
        assert read.shape[1] == 5 and np.isfinite(read).all()
