"""CenterPoint head: targets against a scalar loop, losses, decoding as their inverse, suppression against numpy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bevfn import tree
from bevfn.distributed import Replicas
from bevfn.heads import centerpoint, centerpoint_loss
from bevfn.heads.transfusion_loss import gaussian_radius
from bevfn.precision import Policy
from bevfn.training import optim, train

CONFIG = centerpoint.Config(
    channels_in=8, channels=4, tasks=(1, 2), lower=(-12.0, -8.0), cell=(1.0, 0.5), cells=(32, 24), queries=20,
    nms_thresholds=(2.0, 1.0), max_per_task=6,
)  # fmt: skip


def boxes_in(config, count, seed=0, margin=1.0):
    """Boxes whose centres lie in (or `margin` m around) the map, three classes."""
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([config.cell[0] * config.cells[1], config.cell[1] * config.cells[0]])
    boxes = torch.rand(1, count, 9, generator=generator)
    boxes[..., :2] = boxes[..., :2] * (extent + 2 * margin) - margin + torch.tensor(config.lower)
    boxes[..., 3:6] = boxes[..., 3:6] * 4 + 0.5
    boxes[..., 6] = boxes[..., 6] * 6 - 3
    return boxes, torch.randint(config.classes, (1, count), generator=generator)


def scalar_targets(boxes, labels, config):
    """Heatmaps [classes Y X], {box: (row, column)} by a loop over boxes and cells."""
    Y, X = config.cells
    heat, found = np.zeros((config.classes, Y, X)), {}
    for i, (box, label) in enumerate(zip(boxes.numpy(), labels.numpy())):
        x, y = ((np.float32(box[a]) - np.float32(config.lower[a])) / np.float32(config.cell[a]) for a in range(2))
        column, row = int(x), int(y)  # toward zero
        if not (0 <= column < X and 0 <= row < Y):
            continue
        size = [torch.tensor(box[3 + a] / config.cell[a]) for a in range(2)]
        radius = max(config.min_radius, int(gaussian_radius(*size, config.gaussian_overlap)))
        found[i] = (row, column)
        for r in range(max(0, row - radius), min(Y, row + radius + 1)):
            for c in range(max(0, column - radius), min(X, column + radius + 1)):
                square = (r - row) ** 2 + (c - column) ** 2
                value = math.exp(-square / (2 * ((2 * radius + 1) / 6) ** 2))
                heat[label, r, c] = max(heat[label, r, c], value)
    return heat, found


def test_heatmaps_and_codes_are_heads_of_their_own():
    """What two heads of one kind of branch predict is what the head with both predicts from the same weights."""
    params, state = centerpoint.init(CONFIG, torch.Generator().manual_seed(0))
    x = torch.randn(2, 8, *CONFIG.cells, generator=torch.Generator().manual_seed(1))
    whole, new = centerpoint.apply(params, state, x, config=CONFIG, train=True)

    def only(head: dict, heatmap: bool) -> dict:
        tasks = [{k: v for k, v in task.items() if (k == "heatmap") == heatmap} for task in head["tasks"]]
        return {**head, "tasks": tasks}

    (first, one), (second, two) = (
        centerpoint.apply(only(params, heatmap), only(state, heatmap), x, config=CONFIG, train=True)
        for heatmap in (True, False)
    )
    tasks = [{**codes, **heatmap} for codes, heatmap in zip(second["tasks"], first["tasks"], strict=True)]
    boxes, labels = boxes_in(CONFIG, 4)
    valid = torch.ones(1, 4, dtype=torch.bool)
    args = (boxes.expand(2, -1, -1), labels.expand(2, -1), valid.expand(2, -1))
    merged, _ = centerpoint_loss.loss(tasks, *args, config=CONFIG)
    wanted, _ = centerpoint_loss.loss(whole["tasks"], *args, config=CONFIG)
    assert torch.equal(merged, wanted)
    assert tree.diff([{**b, **a} for a, b in zip(one["tasks"], two["tasks"])], new["tasks"]) == []


@given(seed=st.integers(0, 1000), count=st.integers(1, 8))
@settings(max_examples=15)
def test_targets_are_those_of_a_scalar_loop(seed, count):
    boxes, labels = boxes_in(CONFIG, count, seed)
    found = centerpoint_loss.targets(boxes, labels, torch.ones(1, count, dtype=torch.bool), CONFIG)
    heat, cells = scalar_targets(boxes[0], labels[0], CONFIG)
    np.testing.assert_allclose(torch.cat(found["heatmaps"], 1)[0].numpy(), heat, atol=1e-6)
    assert found["inside"][0].nonzero()[:, 0].tolist() == sorted(cells)
    for i, (row, column) in cells.items():
        assert int(found["cell"][0, i]) == row * CONFIG.cells[1] + column


def test_a_centre_less_than_a_cell_below_the_map_belongs_to_cell_0_and_one_above_to_none():
    boxes, labels = boxes_in(CONFIG, 3)
    boxes[0, :, 0] = torch.tensor([-12.9, -13.1, 12.0])  # map: -12 .. 12
    boxes[0, :, 1] = 0.0
    found = centerpoint_loss.targets(boxes, labels, torch.ones(1, 3, dtype=torch.bool), CONFIG)
    assert found["inside"][0].tolist() == [1.0, 0.0, 0.0]
    assert found["code"][0, 0, 0] == pytest.approx(-0.9, abs=1e-5)


def test_padded_boxes_ask_for_nothing():
    boxes, labels = boxes_in(CONFIG, 4)
    valid = torch.tensor([[True, False, False, False]])
    boxes[:, 1:] = 0.0
    found = centerpoint_loss.targets(boxes, labels, valid, CONFIG)
    alone = centerpoint_loss.targets(boxes[:, :1], labels[:, :1], valid[:, :1], CONFIG)
    assert torch.isfinite(found["code"]).all()
    for ours, theirs in zip(found["heatmaps"], alone["heatmaps"]):
        torch.testing.assert_close(ours, theirs)
    assert sum(float(m.sum()) for m in found["members"]) == float(alone["inside"].sum())


def maps_of(found, config):
    """Head maps that say exactly what the targets ask for."""
    Y, X = config.cells
    tasks = []
    for t, heat in enumerate(found["heatmaps"]):
        maps = {name: torch.zeros(1, n, Y, X) for name, n in centerpoint.OUTPUTS.items()}
        maps["heatmap"] = torch.where(heat == 1, 4.0, -8.0)
        for i in found["members"][t][0].nonzero()[:, 0].tolist():
            row, column = divmod(int(found["cell"][0, i]), X)
            for name, part in zip(centerpoint.OUTPUTS, found["code"][0, i].split(list(centerpoint.OUTPUTS.values()))):
                maps[name][0, :, row, column] = part
        tasks.append(maps)
    return tasks


def far_apart(config):
    boxes, _ = boxes_in(config, 4, margin=-2.0)
    boxes[0, :, 0] = torch.tensor([-9.0, -3.0, 3.0, 9.0])
    return boxes, torch.tensor([[0, 1, 2, 1]])


def test_decoding_inverts_the_targets():
    boxes, labels = far_apart(CONFIG)
    found = centerpoint_loss.targets(boxes, labels, torch.ones(1, 4, dtype=torch.bool), CONFIG)
    decoded = centerpoint.decode(maps_of(found, CONFIG), CONFIG)
    assert decoded["boxes"].shape == (1, 2 * CONFIG.queries, 9)
    keep = decoded["valid"][0]
    assert int(keep.sum()) == 4
    order = decoded["boxes"][0, keep, 0].argsort()
    torch.testing.assert_close(decoded["boxes"][0, keep][order], boxes[0], atol=1e-4, rtol=1e-4)
    assert decoded["labels"][0, keep][order].tolist() == labels[0].tolist()


def test_perfect_maps_cost_almost_nothing_and_wrong_velocities_what_they_weigh():
    boxes, labels = far_apart(CONFIG)
    valid = torch.ones(1, 4, dtype=torch.bool)
    found = centerpoint_loss.targets(boxes, labels, valid, CONFIG)
    tasks = maps_of(found, CONFIG)
    tasks[1]["vel"] = tasks[1]["vel"] + 2.0
    _, terms = centerpoint_loss.loss(tasks, boxes, labels, valid, config=CONFIG)
    assert float(terms["task0/bbox"]) == 0.0
    # two numbers off by 2 m/s with weight 0.5, mean over the task's boxes
    assert float(terms["task1/bbox"]) == pytest.approx(CONFIG.bbox_weight * 2 * 2.0 * 0.5, rel=1e-5)
    assert float(terms["num_pos"]) == 4


def test_a_task_without_objects_costs_no_box_loss_and_sends_no_gradient():
    boxes, labels = far_apart(CONFIG)
    labels = torch.zeros_like(labels)  # all of task 0
    tasks = [
        {name: torch.randn(1, n, *CONFIG.cells) for name, n in {**centerpoint.OUTPUTS, "heatmap": k}.items()}
        for k in CONFIG.tasks
    ]

    def total(tasks):
        return centerpoint_loss.loss(tasks, boxes, labels, torch.ones(1, 4, dtype=torch.bool), config=CONFIG)

    gradient, (_, terms) = torch.func.grad_and_value(total, has_aux=True)(tasks)
    assert float(terms["task1/bbox"]) == 0.0 and float(terms["task1/heatmap"]) > 0
    assert all(float(gradient[1][name].abs().max()) == 0 for name in centerpoint.OUTPUTS)
    assert float(gradient[0]["reg"].abs().sum()) > 0


@pytest.mark.parametrize("column", range(9))
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_box_that_is_no_box_is_no_target_and_counted(column, value):
    boxes, labels = far_apart(CONFIG)
    tasks = [
        {name: torch.randn(1, n, *CONFIG.cells) for name, n in {**centerpoint.OUTPUTS, "heatmap": k}.items()}
        for k in CONFIG.tasks
    ]
    good = math.isfinite(value) and column not in (3, 4, 5)
    expected, terms = centerpoint_loss.loss(
        tasks, boxes, labels, torch.tensor([[True, True, True, good]]), config=CONFIG
    )
    assert int(terms["bad_boxes"]) == 0
    boxes[0, 3, column] = value
    total, others = centerpoint_loss.loss(tasks, boxes, labels, torch.ones(1, 4, dtype=torch.bool), config=CONFIG)
    assert torch.isfinite(total) and int(others["bad_boxes"]) == (not good)
    assert good or torch.equal(total, expected)
    assert torch.isfinite(others["targets"]["code"]).all()


def test_a_map_of_another_size_and_settings_that_do_not_fit_are_named():
    params, state = centerpoint.init(CONFIG, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"BEV map is \(8, 8\) cells, the head's config.cells is \(32, 24\)"):
        centerpoint.apply(params, state, torch.zeros(1, 8, 8, 8), config=CONFIG, train=False)
    with pytest.raises(ValueError, match=r"nms_thresholds .* one per task"):
        replace(CONFIG, nms_thresholds=(1.0,))
    with pytest.raises(ValueError, match=r"nms \('circle',\) must be one name, or one per task of \(1, 2\)"):
        replace(CONFIG, nms=("circle",))
    with pytest.raises(ValueError, match=r"nms_rescale \(1.0, 2.0\) must be one number per class"):
        replace(CONFIG, nms_rescale=(1.0, 2.0))
    with pytest.raises(ValueError, match="code_weights"):
        replace(CONFIG, code_weights=(1.0,) * 8)


class TwoReplicas(Replicas):
    """Another replica that saw `OTHERS` objects of every task."""

    OTHERS = 5.0

    def mean(self, x):
        return (x + self.OTHERS) / 2


def test_normalisers_are_averaged_over_replicas():
    boxes, labels = far_apart(CONFIG)
    valid = torch.ones(1, 4, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    tasks = [
        {name: torch.randn(1, n, *CONFIG.cells, generator=generator) for name, n in maps.items()}
        for maps in ({**centerpoint.OUTPUTS, "heatmap": k} for k in CONFIG.tasks)
    ]
    _, alone = centerpoint_loss.loss(tasks, boxes, labels, valid, config=CONFIG)
    _, shared = centerpoint_loss.loss(
        tasks, boxes, labels, valid, config=CONFIG, replicas=TwoReplicas("none", rank=0, count=2)
    )
    for t, own in enumerate((1.0, 3.0)):
        for name in ("heatmap", "bbox"):
            ratio = float(alone[f"task{t}/{name}"] / shared[f"task{t}/{name}"])
            assert ratio == pytest.approx((own + 5.0) / 2 / own, rel=1e-5)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "name, term, value",
    [
        ("heatmap", "task1/heatmap", NAN),
        *((name, "task1/bbox", x) for name in ("reg", "dim", "vel") for x in (NAN, INF)),
    ],
)
def test_outputs_that_are_not_finite_make_their_term_and_the_loss_so_and_no_update(name, term, value):
    """No mask hides them, so that the step is skipped and the term named. (An infinite heatmap is clamped, as published.)"""
    boxes, labels = far_apart(CONFIG)
    valid = torch.ones(1, 4, dtype=torch.bool)
    tasks = maps_of(centerpoint_loss.targets(boxes, labels, valid, CONFIG), CONFIG)
    tasks[1][name] = torch.full_like(tasks[1][name], value)

    def loss(params, state, batch, key):
        total, terms = centerpoint_loss.loss(tree.map(lambda x: x + params["bias"], tasks), *batch, config=CONFIG)
        metrics = {f"loss/{name}": x for name, x in terms.items() if name.startswith("task")} | {"loss/total": total}
        return total, (state, metrics)

    optimizer = optim.Config(optim.Schedule(1e-3))
    before = train.init({"bias": torch.zeros(())}, {}, optimizer, precision=Policy.of("fp32"))
    batch = (boxes, labels, valid)
    after, metrics = train.make_step(loss, optimizer)(before, batch)
    assert float(metrics["skipped"]) == 1 and float(after.params["bias"]) == 0
    bad = {name for name, value in metrics.items() if name.startswith("loss/") and not torch.isfinite(value)}
    assert bad == {f"loss/{term}", "loss/total"}
