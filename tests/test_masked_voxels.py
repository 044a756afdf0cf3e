"""Masked voxels: what is hidden stays hidden, what is asked for is where the voxels are, and the LiDAR branch learns from it."""

from dataclasses import replace

import numpy as np
import pytest
import small_frames
import small_steps
import tiny_experiment
import torch
from graph_counts import graph_counts

from bevfn import rng, tree
from bevfn.data import batch as batches
from bevfn.models import bevfusion, masked_voxels
from bevfn.synth import key_frame
from bevfn.training import optim

CONFIG = masked_voxels.Config(tiny_experiment.model(), ratios=(0.6, 0.4), edges=(12.0,), channels=8)
KEY = rng.key(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return key_frame.write_frame(tmp_path_factory.mktemp("frame"), image_size=(225, 400))


@pytest.fixture(scope="module")
def batch(folder):
    """The same key frame twice."""
    reading = replace(
        small_frames.SMALL, cameras=None, class_names=(), range=tiny_experiment.RANGE,
        capacities=batches.Capacities(6000, 1),
    )  # fmt: skip
    sample = small_frames.load(folder, reading)
    sample = replace(sample, points=sample.points[::4])
    assert sample.counts["empty/boxes"] == 0  # none is asked for
    return batches.collate([sample] * 2, capacities=reading.capacities)[0]


@pytest.fixture(scope="module")
def weights():
    return masked_voxels.init(CONFIG, seed=0)


def voxels_of(batch):
    return bevfusion.voxelise(batch.points, batch.points_valid, CONFIG.detector.voxels, train=True)[0]


def test_its_parameters_are_the_detectors_and_a_decoder(weights):
    params, state = weights
    theirs, their_state = bevfusion.init(CONFIG.detector, seed=0)
    assert params.keys() == state.keys() == {"lidar", "bev", "pretext"}
    for ours, full in ((params, theirs), (state, their_state)):
        shapes = {name: leaf.shape for name, leaf in tree.flatten({k: ours[k] for k in ("lidar", "bev")}).items()}
        assert shapes == {n: x.shape for n, x in tree.flatten({k: full[k] for k in ("lidar", "bev")}).items()}


def test_each_band_hides_its_share_and_every_step_others(batch):
    voxels = voxels_of(batch)
    there = voxels["count"] > 0
    shown, hidden = masked_voxels.mask(voxels, CONFIG, KEY)
    assert not (hidden & ~there).any()
    place = (voxels["coords"][..., :2].float() + 0.5) * 0.75 - 24.0
    near = place.norm(dim=-1) < 12.0
    for band, ratio in ((near, 0.6), (~near, 0.4)):
        count = int((band & there).sum())
        share = float((hidden & band & there).sum()) / count
        assert abs(share - ratio) < 4 * (ratio * (1 - ratio) / count) ** 0.5
    assert torch.equal(shown["count"] > 0, there & ~hidden)
    assert torch.equal(shown["features"][~hidden], voxels["features"][~hidden]) and not shown["features"][hidden].any()
    assert not torch.equal(hidden[0], hidden[1])  # of equal samples
    assert not torch.equal(hidden, masked_voxels.mask(voxels, CONFIG, rng.key(4))[1])
    alike = masked_voxels.mask(voxels, CONFIG, KEY, alike=True)[1]
    assert torch.equal(alike[0], alike[1])


def test_the_encoder_does_not_see_what_is_hidden(batch, weights):
    """Other points in hidden voxels change no bit of what the network makes; in shown ones they do."""

    def logits(points):
        params, state = weights
        changed = replace(batch, points=points)
        outputs, _ = masked_voxels.apply(params, state, changed, config=CONFIG, train=True, key=KEY)
        return outputs

    voxels = voxels_of(batch)
    hidden = masked_voxels.mask(voxels, CONFIG, KEY)[1]
    points = batch.points
    cell = torch.stack([((points[..., a] + offset) / size).floor() for a, (offset, size) in
                        enumerate(((24.0, 0.75), (24.0, 0.75), (5.0, 0.2)))], -1).int()  # fmt: skip
    of_hidden = [{tuple(c) for c in coords[mask].tolist()} for coords, mask in zip(voxels["coords"], hidden)]
    inside = torch.tensor([[tuple(c) in known for c in row.tolist()] for row, known in zip(cell, of_hidden)])
    assert 0.2 < float(inside[batch.points_valid].float().mean()) < 0.9
    before = logits(points)
    for which, same in ((inside, True), (~inside & batch.points_valid, False)):
        brighter = torch.where(which[..., None], points + points.new_tensor([0, 0, 0, 9.0, 0.01]), points)
        after = logits(brighter)
        assert torch.equal(before["logits"], after["logits"]) == same
        assert torch.equal(before["lidar"]["bev"], after["lidar"]["bev"]) == same


def test_target_cells_are_seen_hidden_or_empty(batch, weights):
    """Against a loop over the voxels."""
    params, state = weights
    outputs, _ = masked_voxels.apply(params, state, batch, config=CONFIG, train=True, key=KEY)
    voxels = voxels_of(batch)
    hidden = masked_voxels.mask(voxels, CONFIG, KEY)[1]
    X, Y, Z = CONFIG.cells
    assert (X, Y, Z) == (64, 64, 20) and outputs["logits"].shape == (2, X, Y, Z)
    for b in range(2):
        there, seen = np.zeros((X, Y, Z), bool), np.zeros((X, Y, Z), bool)
        for (x, y, z), count, is_hidden in zip(
            voxels["coords"][b].tolist(), voxels["count"][b].tolist(), hidden[b].tolist()
        ):
            if count:
                there[x, y, z // 2] = True
                seen[x, y, z // 2] |= not is_hidden
        assert np.array_equal(outputs["hidden"][b], there & ~seen) and np.array_equal(outputs["empty"][b], ~there)
        assert (there & ~seen).any() and seen.any()


def test_the_channels_of_a_bev_cell_are_its_own_target_cells():
    X, Y, Z = CONFIG.cells
    split = CONFIG.split
    maps = torch.zeros(1, split * split * Z, X // split, Y // split)
    maps[0, (1 * split + 0) * Z + 5, 7, 9] = 1.0  # the part 1 in x, 0 in y, bin 5
    assert masked_voxels.unfolded(maps, CONFIG).nonzero().tolist() == [[0, 15, 18, 5]]


def test_seen_cells_count_nothing_in_the_loss(batch, weights):
    params, state = weights
    total, (_, metrics) = masked_voxels.loss(params, state, batch, KEY, config=CONFIG)
    outputs, _ = masked_voxels.apply(params, state, batch, config=CONFIG, train=True, key=KEY)
    p, hidden, empty = torch.sigmoid(outputs["logits"].double()), outputs["hidden"], outputs["empty"]
    by_hand = -(0.25 * (1 - p) ** 2 * p.log())[hidden].sum() - (0.75 * p**2 * (1 - p).log())[empty].sum()
    assert float(total) == pytest.approx(float(by_hand) / int(hidden.sum()), rel=1e-4)
    assert float(metrics["num_pos"]) == int(hidden.sum()) > 0


def steps(batch, precision, backend, count=3):
    optimizer = optim.Config(lr=optim.Schedule(1e-4), eps=1.0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return small_steps.run(masked_voxels, CONFIG, batch, optimizer, precision, backend, count)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_compiled_step_equals_eager_in_one_graph(batch, precision):
    ours, ours_state = steps(batch, precision, "eager")
    assert all(m["skipped"] == 0 for m in ours)
    theirs, their_state = steps(batch, precision, "aot_eager")
    assert graph_counts() == {"graphs": 1, "breaks": 0}
    assert theirs == [pytest.approx(m, rel=1e-6, abs=1e-6) for m in ours]
    small_steps.compare_leaves(masked_voxels.init(CONFIG, seed=0)[0], ours_state, their_state, 1e-6, 1e-7)


def test_the_loss_falls_and_every_parameter_learns(batch):
    optimizer = optim.Config(lr=optim.Schedule(1e-2))
    history, after = small_steps.run(masked_voxels, CONFIG, batch, optimizer, "fp32", "eager", 20)
    first, last = (sum(m["loss/total"] for m in part) for part in (history[:3], history[-3:]))
    assert last < 0.6 * first
    before = tree.flatten(masked_voxels.init(CONFIG, seed=0)[0])
    assert [name for name, leaf in tree.flatten(after.params).items() if torch.equal(leaf, before[name])] == []


def test_what_is_predicted_of_a_key_frame_does_not_depend_on_its_batch(batch, weights):
    params, state = weights
    both = masked_voxels.predict(params, state, batch, config=CONFIG)
    one = masked_voxels.predict(
        params, state, replace(batch, points=batch.points[:1], points_valid=batch.points_valid[:1],
                               base_aug=batch.base_aug[:1], undo_base_aug=batch.undo_base_aug[:1]), config=CONFIG,
    )  # fmt: skip
    for name in ("hidden", "empty"):
        assert torch.equal(both[name][0], one[name][0]) and torch.equal(both[name][1], one[name][0])
    assert both["overflow/voxels_l0"].dim() == 0


def test_the_score_is_average_precision_and_iou_of_the_cells():
    rows = {name: np.zeros((2, masked_voxels.BINS)) for name in ("hidden", "empty")}
    rows["hidden"][0, -1], rows["hidden"][1, 3], rows["empty"][1, 10], rows["empty"][0, 0] = 3, 1, 2, 94
    made = masked_voxels.score(rows)
    assert made["AP"] == pytest.approx(0.75 * 1.0 + 0.25 * 4 / 6) and made["chance AP"] == pytest.approx(0.04)
    assert made["IoU"] == pytest.approx(3 / 4) and next(iter(made)) == "AP"
    nothing = masked_voxels.score({name: np.zeros((1, masked_voxels.BINS)) for name in rows})
    assert all(np.isnan(value) for value in nothing.values())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"detector": bevfusion.camera_only()}, "LiDAR branch, which the detector has not"),
        ({"ratios": (0.5,)}, "need one edge less"),
        ({"edges": (50.0, 30.0), "ratios": (0.9, 0.7, 0.5)}, "rising"),
        ({"ratios": (1.0, 0.5)}, "above 0 and below 1"),
        ({"split": 3}, "must divide the 2 voxels"),
    ],
)
def test_a_config_that_means_nothing_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(CONFIG, **change)


def test_a_batch_without_points_is_refused(batch, weights):
    with pytest.raises(ValueError, match="no points"):
        masked_voxels.apply(*weights, replace(batch, points=None), config=CONFIG, train=True, key=KEY)


def test_the_mini_detector_has_a_target():
    config = masked_voxels.Config(bevfusion.mini(bevfusion.lidar_only()))
    assert config.cells == (192, 192, 20)
