"""Suppression is the textbook's greedy loop, whatever makes two boxes near."""

import math
from dataclasses import replace

import ge_graphs
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shapely.geometry import Polygon

from bevfn.boxes import bev_corners
from bevfn.heads import centerpoint

CONFIG = centerpoint.Config(tasks=(1, 2), nms_thresholds=(2.0, 1.0), max_per_task=6)
KINDS = ("circle", "size_aware_circle", "rotated")
THRESHOLDS = {"circle": (2.0, 1.0), "size_aware_circle": (0.5, 0.3), "rotated": (0.2, 0.05)}


def random_boxes(seed, *, span=6.0):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(2, 2, 12, 9, generator=generator) * span
    return boxes, torch.rand(2, 2, 12, generator=generator) < 0.8


def greedy(boxes, valid, near, limit):
    """Which boxes stay, by the textbook loop, in order."""
    kept = []
    for j in range(len(boxes)):
        if valid[j] and not any(near(boxes[i], boxes[j]) for i in kept):
            kept.append(j)
    return kept[:limit]


def near_circle(threshold):
    return lambda a, b: (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 <= threshold


def near_size_aware(scale):
    def near(a, b):
        reach = [0.0, 0.0]
        for box in (a, b):
            c, s = abs(math.cos(box[6])), abs(math.sin(box[6]))
            reach[0] += box[3] * c + box[4] * s
            reach[1] += box[3] * s + box[4] * c
        return all(abs(a[k] - b[k]) <= scale / 2 * reach[k] for k in range(2))

    return near


def near_rotated(threshold):
    def near(a, b):
        first, second = (Polygon(bev_corners(torch.tensor(box, dtype=torch.float64)).tolist()) for box in (a, b))
        iou = first.intersection(second).area / first.union(second).area
        assume(abs(iou - threshold) > 1e-5)  # float32 may differ there
        return iou > threshold

    return near


NEAR = {"circle": near_circle, "size_aware_circle": near_size_aware, "rotated": near_rotated}


@given(seed=st.integers(0, 10_000), kinds=st.tuples(*[st.sampled_from(KINDS)] * 2), limit=st.integers(1, 12))
@settings(max_examples=40)
def test_suppression_is_the_greedy_loop(seed, kinds, limit):
    boxes, valid = random_boxes(seed)
    thresholds = tuple(THRESHOLDS[kind][t] for t, kind in enumerate(kinds))
    config = replace(CONFIG, max_per_task=limit, nms=kinds, nms_thresholds=thresholds)
    keep = centerpoint.suppress(boxes, valid, config)
    for b in range(2):
        for t, (kind, threshold) in enumerate(zip(kinds, thresholds)):
            wanted = greedy(boxes[b, t].double().tolist(), valid[b, t].tolist(), NEAR[kind](threshold), limit)
            assert keep[b, t].nonzero()[:, 0].tolist() == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_one_name_means_all_tasks(kind):
    boxes, valid = random_boxes(3)
    one, each = (
        centerpoint.suppress(boxes, valid, replace(CONFIG, nms=nms, nms_thresholds=THRESHOLDS[kind]))
        for nms in (kind, (kind, kind))
    )
    assert torch.equal(one, each) and bool((valid & ~one).any())


def test_of_equal_boxes_the_surest_stays_and_boxes_that_only_touch_both_do():
    boxes = torch.tensor([[0.0, 0, 0, 4, 2, 1.5, 0.3, 0, 0]]).repeat(1, 2, 3, 1)
    config = replace(CONFIG, nms="rotated", nms_thresholds=(0.99, 0.0))
    valid = torch.ones(1, 2, 3, dtype=torch.bool)
    assert centerpoint.suppress(boxes, valid, config).tolist() == [[[True, False, False]] * 2]
    apart = boxes.clone()
    apart[:, :, :, 6] = 0.0
    apart[0, :, 1, 0], apart[0, :, 2, 1] = 4.0, 2.0
    assert bool(centerpoint.suppress(apart, valid, config).all())


def maps_with(boxes, labels, scores, config):
    """Head maps of one task whose only high cells are these boxes' (gravity centres)."""
    Y, X = config.cells
    maps = {name: torch.zeros(1, n, Y, X) for name, n in centerpoint.OUTPUTS.items()}
    maps["heatmap"] = torch.full((1, config.classes, Y, X), -8.0)
    for (x, y, z, *size, yaw, vx, vy), label, score in zip(boxes, labels, scores):
        place = [(v - low) / step for v, low, step in zip((x, y), config.lower, config.cell)]
        column, row = (int(p) for p in place)
        maps["heatmap"][0, label, row, column] = math.log(score / (1 - score))
        for name, values in {
            "reg": [place[0] - column, place[1] - row],
            "height": [z],
            "dim": [math.log(v) for v in size],
            "rot": [math.sin(yaw), math.cos(yaw)],
            "vel": [vx, vy],
        }.items():
            maps[name][0, :, row, column] = torch.tensor(values)
    return maps


def test_sizes_are_rescaled_by_class_for_the_suppression_only():
    """Two cones half a metre apart do not overlap; nine times as large they do. The pedestrians stay as they are."""
    config = centerpoint.Config(tasks=(2,), queries=20, nms="rotated", nms_thresholds=(0.2,), nms_rescale=(1.0, 9.0))
    pair = [[x, 3.0, 0.5, 0.4, 0.4, 1.0, 0.0, 0.0, 0.0] for x in (1.2, 2.0)]
    for label, left in ((0, 2), (1, 1)):
        found = centerpoint.decode([maps_with(pair, [label] * 2, [0.9, 0.8], config)], config)
        assert int(found["valid"].sum()) == left
        sizes = found["boxes"][0, found["valid"][0], 3:6]
        torch.testing.assert_close(sizes, torch.tensor([[0.4, 0.4, 1.0]]).expand(left, -1))
        assert float(found["scores"][found["valid"]][0]) == pytest.approx(0.9)


def test_the_suppression_reaches_an_npu_graph():
    ge_graphs.need_torchair()
    config = replace(CONFIG, nms=("rotated", "circle"), max_per_task=3)
    boxes, valid = random_boxes(0)
    ge_graphs.round_trip(lambda b, v: centerpoint.suppress(b, v.bool(), config).int(), boxes, valid.int())
