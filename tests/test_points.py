"""Point files that are not five little-endian float32 a point, or hold what no lidar saw."""

import gzip
import io

import numpy as np
import pytest

from bevfn.data import points


def cloud(count: int = 3000) -> np.ndarray:
    """[P,5] float32 as a lidar's."""
    random = np.random.default_rng(0)
    xyz = random.normal(0, 20, (count, 3))
    return np.column_stack([xyz, random.integers(0, 256, count), random.integers(0, 32, count)]).astype("<f4")


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def with_intensity(value) -> np.ndarray:
    made = cloud()
    made[:, 3] = value if np.isscalar(value) else value(made[:, 3])
    return made


def missing(count: int, columns: int = 3) -> bytes:
    """A cloud whose first points have no number in as many columns."""
    made = cloud()
    made[:count, :columns] = np.nan
    return made.tobytes()


PCD = b"# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\nFIELDS x y z intensity ring\nDATA binary\n"
WRONG = {
    "four columns": (cloud()[:, :4].tobytes(), "which fits four float32 a point"),
    "six columns": (np.column_stack([cloud(), np.zeros(3000, "<f4")]).tobytes(), "which fits six float32 a point"),
    "float64": (cloud().astype("<f8").tobytes(), "which fits float64"),
    "big endian": (cloud().astype(">f4").tobytes(), "which fits big-endian float32"),
    "npy": (npy(cloud()), "has the header of an .npy file"),
    "pcd": (PCD + cloud().tobytes(), "has the header of a PCD file"),
    "gzip": (gzip.compress(cloud().tobytes()), "is compressed"),
    "intensity -5": (
        with_intensity(-5).tobytes(),
        "3,000 of 3,000 points have coordinates or an intensity that must be from -1000 to 1000 m, from 0 to 255; write",
    ),
    "intensity 1e30": (with_intensity(1e30).tobytes(), "intensity that must be"),
    "half written": (
        cloud()[:1500].tobytes() + bytes(1500 * 20),
        "1,500 of 3,000 points are at 0 0 0, as where an inter",
    ),
    "a hole": (
        cloud()[:1500].tobytes() + bytes(100 * 20) + cloud()[1600:].tobytes(),
        "100 of 3,000 points are at 0 0 0",
    ),
    "in mm": (
        (cloud() * [1000, 1000, 1000, 1, 1]).astype("<f4").tobytes(),
        "have coordinates or an intensity that must be",
    ),
    "int32 in mm": ((cloud() * 1000).astype("<i4").tobytes(), "points have coordinates below 1e-38, as integers"),
    "uint32 in mm": (
        (np.abs(cloud()) * 1000).astype("<u4").tobytes(),
        "of 3,000 points have coordinates below 1e-38, as integers",
    ),
    "nothing but NaN": (np.full((3000, 5), np.nan, "<f4").tobytes(), "3,000 of 3,000 points are NaN, so that there is"),
    "NaN and 29 points": (missing(2971), "2,971 of 3,000 points are NaN, so that there is no cloud"),
    "NaN in x alone": (missing(301, 1), "301 of 3,000 points have NaN in some of their numbers alone"),
    "part of a point": (cloud().tobytes()[:-4], "not a whole number of points"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_cannot_be_meant_is_refused_by_name(tmp_path, name):
    content, what = WRONG[name]
    content = content[: len(content) // 20 * 20] if name != "part of a point" else content  # sizes give nothing away
    (tmp_path / "a.pcd.bin").write_bytes(content)
    with pytest.raises(ValueError, match=what) as error:
        points.read(tmp_path / "a.pcd.bin")
    assert str(error.value).startswith(f"{tmp_path}/a.pcd.bin: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("column, value", [(0, 20_000.0), (2, -1e30), (3, -5.0), (3, 256.0), (3, np.nan), (4, np.inf)])
def test_a_few_points_that_cannot_be_are_dropped_and_counted(tmp_path, column, value):
    broken = cloud()
    broken[[3, 70], column] = value
    broken.tofile(tmp_path / "a.pcd.bin")
    kept, bad = points.read(tmp_path / "a.pcd.bin")
    assert bad == 2
    np.testing.assert_array_equal(kept, np.delete(cloud(), [3, 70], axis=0))


@pytest.mark.parametrize("columns", [3, 5])
def test_missing_returns_of_a_driver_are_dropped_and_counted_however_many(tmp_path, columns):
    (tmp_path / "a.pcd.bin").write_bytes(missing(2900, columns))
    kept, bad = points.read(tmp_path / "a.pcd.bin")
    assert bad == 2900
    np.testing.assert_array_equal(kept, cloud()[2900:])


def test_a_point_at_the_origin_stays(tmp_path):
    made = cloud()
    made[3, :3] = 0.0
    made.tofile(tmp_path / "a.pcd.bin")
    np.testing.assert_array_equal(points.read(tmp_path / "a.pcd.bin")[0], made)


@pytest.mark.parametrize("intensity", [0, 1, 7.5, lambda x: x, lambda x: x / 255])
def test_intensities_that_can_be_meant_pass(tmp_path, intensity):
    with_intensity(intensity).tofile(tmp_path / "a.pcd.bin")
    assert points.read(tmp_path / "a.pcd.bin")[1] == 0


def test_intensities_of_another_scale_are_known():
    assert points.dim(with_intensity(lambda x: x / 255)) and points.dim(with_intensity(0.5))
    assert not any(points.dim(with_intensity(value)) for value in (0, 1, 7.5, lambda x: x)) and not points.dim(
        cloud()[:0]
    )


def test_a_file_that_ends_in_zeros_is_known(tmp_path):
    for content, zeros in (
        (cloud().tobytes(), False),
        (cloud()[:9].tobytes() + bytes(64 * 20), True),
        (bytes(40), True),
    ):
        (tmp_path / "a.bin").write_bytes(content)
        assert points.ends_in_zeros(tmp_path / "a.bin") == zeros
