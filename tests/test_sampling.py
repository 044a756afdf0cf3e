"""Orders, random numbers and class balance as functions of seed, epoch and position."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_frames import indexed, labelled

from bevfn.data import sampling

NUMBER = st.integers(0, 2**31)


@given(NUMBER, NUMBER, NUMBER)
def test_a_sample_draws_the_same_numbers_every_time_and_others_than_its_neighbours(seed, epoch, position):
    drawn = sampling.generator(seed, epoch, position).random(4)
    np.testing.assert_array_equal(drawn, sampling.generator(seed, epoch, position).random(4))
    for other in ((seed + 1, epoch, position), (seed, epoch + 1, position), (seed, epoch, position + 1)):
        assert (drawn != sampling.generator(*other).random(4)).any()


def test_the_order_draws_other_numbers_than_any_sample():
    """numpy pads short seeds with zeros, so [0, 0] and [0, 0, 0] would be one stream."""
    items = np.arange(50)
    shuffled = sampling.order(items, 0, 0, shuffle=True)
    assert (shuffled != sampling.generator(0, 0, 0).permutation(items)).any()
    assert (shuffled != sampling.generator(0, 0, 1).permutation(items)).any()


@given(st.lists(st.integers(0, 9), max_size=40), NUMBER, st.integers(0, 30))
def test_an_order_is_a_permutation_and_a_function_of_seed_and_epoch(items, seed, epoch):
    shuffled = sampling.order(np.array(items), seed, epoch, shuffle=True)
    assert sorted(shuffled) == sorted(items)
    np.testing.assert_array_equal(shuffled, sampling.order(np.array(items), seed, epoch, shuffle=True))
    np.testing.assert_array_equal(sampling.order(np.array(items), seed, epoch, shuffle=False), items)


def test_epochs_differ_in_order():
    orders = {tuple(sampling.order(np.arange(20), 0, epoch, shuffle=True)) for epoch in range(10)}
    assert len(orders) == 10


def test_cbgs_gives_every_class_an_equal_share_of_frames():
    names = ("car", "truck", "bus")
    frames = [labelled(("car", "car", "")) for _ in range(80)] + [labelled(("truck",)) for _ in range(16)]
    frames += [labelled(("car", "bus")) for _ in range(4)]
    drawn = sampling.cbgs(indexed(frames), names, seed=0)
    share = (84 + 16 + 4) // 3
    assert drawn.dtype == np.int64 and len(drawn) == 3 * share
    first, second, third = np.split(drawn, 3)  # class by class
    assert (second >= 80).all() and (second < 96).all() and (third >= 96).all()
    assert ((first < 80) | (first >= 96)).all()
    np.testing.assert_array_equal(drawn, sampling.cbgs(indexed(frames), names, seed=0))
    assert (drawn != sampling.cbgs(indexed(frames), names, seed=1)).any()


def test_cbgs_counts_valid_boxes_only_and_a_class_without_frames_supplies_none():
    frames = [labelled(("car", "bus"), (True, False)), labelled(("car", "truck"))]
    drawn = sampling.cbgs(indexed(frames), ("car", "truck", "bus"), seed=3)
    assert len(drawn) == 2 and drawn[1] == 1  # floor(3 / 3) each for car and truck


def test_cbgs_shares_among_the_classes_that_occur():
    """One class of ten: an epoch of every frame, not of one."""
    names = tuple("abcdefghij")
    drawn = sampling.cbgs(indexed([labelled(("d",))] * 12 + [labelled(())] * 3), names, seed=0)
    assert len(drawn) == 12 and (drawn < 12).all()
    drawn = sampling.cbgs(indexed([labelled(("d",))] * 9 + [labelled(("d", "h"))]), names, seed=0)
    assert len(drawn) == 10 and (drawn[5:] == 9).all()


def test_cbgs_rounds_as_upstream():
    """A third of 12 is 4; 5 times 1/3 over 5/12 is less than 4 in floating point."""
    frames = [labelled(("a",))] * 5 + [labelled(("b",))] * 5 + [labelled(("c",))] * 2
    drawn = sampling.cbgs(indexed(frames), ("a", "b", "c"), seed=0)
    assert [int((drawn // 5 == k).sum()) for k in range(3)] == [3, 3, 4]


def test_bevdepths_pools_count_categories_and_boxes_without_points():
    people = ("human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.adult")
    crowd = labelled(("pedestrian",) * 3 + ("bus", ""), (True, False, True, False, True))
    crowd = dataclasses.replace(crowd, categories=(*people, "vehicle.bus.rigid", "animal"))
    assert sampling.boxed(crowd) == ["", "pedestrian"]
    assert sorted(sampling.categorised(crowd)) == ["", "bus", "pedestrian", "pedestrian"]
    frames = indexed([crowd, labelled(("car",))])
    names = ("car", "pedestrian", "bus")
    assert len(sampling.cbgs(frames, names, 0)) == 2  # cars 1, pedestrians 1
    drawn = sampling.cbgs(frames, names, 0, sampling.categorised)
    assert drawn.tolist() == [1, 0, 0]  # cars 1, pedestrians 2, buses 1: 4 / 3 each
    unnamed = dataclasses.replace(crowd, categories=())  # an info file does not say
    assert sorted(sampling.categorised(unnamed)) == ["", "bus", "pedestrian"]


def test_cbgs_without_any_box_says_so():
    with pytest.raises(ValueError, match=r"split 'mini_train'.*too few of its 1 frames hold boxes of car, truck"):
        sampling.cbgs(indexed([labelled(("", "bus"))]), ("car", "truck"), seed=0)
