"""What the numbers of a point are, as a text, and clouds of such files."""

import numpy as np
import pytest

from bevfn.data import columns, points


def cloud(count: int = 400) -> np.ndarray:
    """[P,5] x, y, z, intensity 0..255, ring."""
    random = np.random.default_rng(0)
    return np.column_stack(
        [random.normal(0, 20, (count, 3)), random.integers(0, 256, count), random.integers(0, 64, count)]
    ).astype("<f4")


WRITTEN = {  # text: the numbers of `cloud` as it says
    "x y z intensity ring": lambda c: c,
    "x y z intensity/1": lambda c: (c[:, :4] / [1, 1, 1, 255]).astype("<f4"),
    "intensity z:f8 _:u2 y:f8 _ x:f8 ring:u1": lambda c: (
        c[:, 3],
        c[:, 2],
        c[:, 4],
        c[:, 1],
        c[:, 0],
        c[:, 0],
        c[:, 4],
    ),
    "x y z intensity:u2/65535 time:f8": lambda c: (*c[:, :3].T, c[:, 3] * 257, c[:, 0]),
}


@pytest.mark.parametrize("text", WRITTEN)
@pytest.mark.parametrize("ending", ["bin", "npy"])
def test_a_cloud_of_any_columns_is_read_as_it_was(tmp_path, text, ending):
    made, told = cloud(), columns.parse(text)
    values = WRITTEN[text](made)
    rows = np.zeros(len(made), told.dtype)
    for i, name in enumerate(told.dtype.names):
        rows[name] = values[i] if isinstance(values, tuple) else values[:, i]
    path = tmp_path / f"a.{ending}"
    rows.tofile(path) if ending == "bin" else np.save(path, rows)
    read, bad = points.read(path, text)
    wanted = made if "ring" in told.names else np.column_stack([made[:, :4], np.full(len(made), -1)])
    assert bad == 0 and read.dtype == np.float32
    np.testing.assert_allclose(read, wanted, rtol=1e-6, atol=1e-4)


def test_an_array_of_numbers_is_read_in_the_order_of_its_columns(tmp_path):
    np.save(tmp_path / "a.npy", cloud()[:, :3].astype(np.float64))
    read, _ = points.read(tmp_path / "a.npy", "x y z")
    np.testing.assert_array_equal(read[:, :3], cloud()[:, :3])
    assert (read[:, 3] == 0).all() and (read[:, 4] == -1).all()


def test_a_pcd_without_intensity_is_read_where_the_columns_have_none(tmp_path):
    made = cloud(3)[:, :3]
    head = "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 3\nHEIGHT 1\nPOINTS 3\nDATA binary\n"
    (tmp_path / "a.pcd").write_bytes(head.encode() + made.tobytes())
    np.testing.assert_array_equal(points.read(tmp_path / "a.pcd", "x y z")[0][:, :3], made)
    with pytest.raises(ValueError, match="has no field intensity"):
        points.read(tmp_path / "a.pcd")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x y", "have no z; name x, y and z"), ("x y z x", "'x' is there twice"), ("x y z/2", "'z/2' is no column"),
        ("x y z ring:f1", "of no type of numbers"), ("x y z intensity/0", "highest intensity of 0"), ("x;y z", "'x;y' is no column"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_are_refused(text, says):
    with pytest.raises(ValueError, match=says):
        columns.parse(text)


OTHERS = {  # name of the file, what it holds, its columns as they are said: the sentence
    "fewer, of another length": ("a.bin", cloud(401)[:, :4], "", r"6416 bytes are not a whole number of points \(5 float32 = 20"),
    "fewer": ("a.bin", cloud()[:, :4], "", "which fits four float32 a point; write little-endian float32 x, y, z"),
    "more": ("a.bin", cloud(), "x y z intensity", "which fits five float32; write x y z intensity, as its columns are said to be"),
    "of no whole number": ("a.bin", cloud(3)[:, :4], "x y z intensity ring:u1", "48 bytes are not a whole number of points"),
    "an array": ("a.npy", cloud(), "x y z intensity", r"is an array \[400, 5\] of float32, not \[points, 4\] numbers"),
    "no array": ("a.npy", None, "x y z", "is no array that numpy can read"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_cloud_of_other_columns_than_told_is_refused(tmp_path, name):
    file, content, told, says = OTHERS[name]
    path = tmp_path / file
    if content is None:
        path.write_bytes(b"x" * 48)
    elif file.endswith("npy"):
        np.save(path, content)
    else:
        np.ascontiguousarray(content).tofile(path)
    with pytest.raises(ValueError, match=says) as error:
        points.read(path, told)
    assert str(error.value).startswith(f"{path}: ")
