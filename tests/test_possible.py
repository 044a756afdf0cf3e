"""What values can be: limits and what they say, rotations and intrinsics."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bevfn.data import possible

LENS = np.array([[1266.0, 0.0, 816.0], [0.0, 1266.0, 491.0], [0.0, 0.0, 1.0]])


def test_a_kind_takes_its_ends_and_nothing_beyond():
    values = np.array([0.0, 1e-3, 1.9, 1e3, 1e30, np.inf, -np.inf, np.nan, -1.9])
    assert possible.SIZE.impossible(values).tolist() == [True, False, False, False, True, True, True, True, True]
    assert possible.VELOCITY.impossible(values).tolist() == [False] * 4 + [True, True, True, False, False]
    assert str(possible.SIZE) == "from 0.001 to 1000 m" and str(possible.POINTS) == "from 0 to 1e+09"


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        (lambda turn: turn, False),
        (lambda turn: turn.astype(np.float32).astype(float), False),
        (lambda turn: turn @ np.diag([1.0, -1.0, 1.0]), True),  # mirrored
        (lambda turn: 1.01 * turn, True),
        (lambda turn: 0 * turn, True),
        (lambda turn: np.full((3, 3), np.nan), True),
    ],
)
def test_only_proper_rotations_are_rotations(change, bad):
    turns = Rotation.random(20, random_state=0).as_matrix()
    assert (possible.no_rotation(np.array([change(turn) for turn in turns])) == bad).all()


@pytest.mark.parametrize(
    ("lens", "bad"),
    [
        (LENS, False),
        (LENS * [[0.01], [0.01], [1]], False),  # a small picture
        (LENS.T, True),
        (LENS * [[0], [1], [1]], True),
        (LENS * [[-1], [1], [1]], True),
        (LENS * [[1e30], [1], [1]], True),
        (LENS * 2, True),
        (np.where(LENS == 816, np.nan, LENS), True),
    ],
)
def test_intrinsics_have_focal_lengths_and_a_last_row(lens, bad):
    assert possible.no_intrinsics(lens) == bad and possible.no_intrinsics(np.stack([LENS, lens])).tolist() == [
        False,
        bad,
    ]


def test_how_far_outside_of_its_image_a_centre_lies():
    centres = np.array([[8.0, 4.5], [0.0, 9.0], [-4.0, 4.0], [8.0, 27.0]])
    assert possible.outside(centres, np.array([9, 16])).tolist() == [0.0, 0.0, 0.25, 2.0]
