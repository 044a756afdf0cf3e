"""TransFusion head: query selection, box coding, targets, losses."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bevfn.heads import transfusion, transfusion_loss

CONFIG = transfusion.Config(
    channels_in=12, channels=16, classes=10, queries=8, ffn_channels=24, head_channels=8, heads=4,
    lower=(-12.0, -12.0), voxel=(0.1, 0.1), stride=8, cells=(30, 30), dropout=0.0,
)  # fmt: skip


def boxes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(1, count, 9, generator=generator)
    scale = torch.tensor([20.0, 20, 2, 4, 2, 2, 2 * math.pi, 6, 6])
    shift = torch.tensor([-10.0, -10, -2, 0.5, 0.5, 0.5, -math.pi, -3, -3])
    return u * scale + shift, torch.randint(0, 10, (1, count), generator=generator)


def predictions_at(box, config=CONFIG):
    code = transfusion_loss.encode_boxes(box, config)
    pred = dict(zip(("center", "height", "dim", "rot", "vel"), code.split([2, 1, 3, 2, 2], -1)))
    return pred | {"heatmap": torch.zeros(*box.shape[:2], config.classes)}


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_decoding_inverts_encoding(seed):
    box, _ = boxes(5, seed)
    torch.testing.assert_close(transfusion.decode_boxes(predictions_at(box), CONFIG), box, atol=1e-4, rtol=1e-4)


def test_queries_are_the_strongest_local_maxima_and_small_classes_need_not_be_maxima():
    logits = torch.full((1, 10, 30, 30), -10.0)
    logits[0, 0, 5, 5], logits[0, 0, 5, 6] = 3.0, 2.0  # the second is suppressed by the first
    logits[0, 8, 9, 9], logits[0, 8, 9, 10] = 1.0, 0.9  # pedestrians are not
    logits[0, 3, 0, 4] = 5.0  # on the border: never a maximum
    query = transfusion.select_queries(logits, CONFIG)
    chosen = list(zip(query["labels"][0, :3].tolist(), query["index"][0, :3].tolist()))
    assert chosen == [(0, 5 * 30 + 5), (8, 9 * 30 + 9), (8, 9 * 30 + 10)]
    assert query["position"][0, 0].tolist() == [5.5, 5.5]


def test_heatmap_target_is_one_at_centres_only_and_ignores_padding():
    box, label = boxes(6)
    valid = torch.tensor([[True] * 4 + [False] * 2])
    heat = transfusion_loss.heatmap_target(box, label, valid, CONFIG)
    cell = ((box[0, :4, :2] + 12) / 0.8).long()
    centres = {(int(k), int(x), int(y)) for k, (x, y) in zip(label[0, :4], cell)}
    assert {tuple(i) for i in torch.nonzero(heat[0] == 1).tolist()} == centres
    assert heat.max() <= 1 and heat.min() >= 0
    torch.testing.assert_close(
        heat, transfusion_loss.heatmap_target(box[:, :4], label[:, :4], valid[:, :4], CONFIG), atol=0, rtol=0
    )


def test_gaussian_radius_is_the_published_formula_not_the_textbook_one():
    radius = transfusion_loss.gaussian_radius(torch.tensor(4.0), torch.tensor(4.0), 0.1)
    b3, c3, a3 = -2 * 0.1 * 8, (0.1 - 1) * 16, 0.4
    assert float(radius) == pytest.approx((b3 + math.sqrt(b3**2 - 4 * a3 * c3)) / 2, rel=1e-6)


def test_perfect_predictions_match_their_own_boxes():
    box, label = boxes(8)
    pred = predictions_at(box)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    pred = {k: v[:, order] for k, v in pred.items()}
    assigned = transfusion_loss.assign(pred, box, label, torch.ones(1, 8, dtype=torch.bool), CONFIG)
    assert assigned["match"][0].tolist() == torch.argsort(order).tolist()
    assert float(assigned["mean_iou"]) == pytest.approx(1.0, abs=1e-3)
    assert assigned["labels"][0].tolist() == label[0, order].tolist()


def run_loss(box, label, valid):
    params, state = transfusion.init(CONFIG, torch.Generator().manual_seed(0))
    x = torch.randn(1, 12, 30, 30, generator=torch.Generator().manual_seed(1))
    outputs, _ = transfusion.apply(params, state, x, config=CONFIG, train=True)
    return transfusion_loss.loss(outputs, box, label, valid, config=CONFIG)


def test_no_boxes_leave_background_losses_only():
    box, label = boxes(4)
    total, terms = run_loss(box, label, torch.zeros(1, 4, dtype=torch.bool))
    assert float(terms["bbox"]) == 0 and float(terms["num_pos"]) == 0 and float(terms["matched_iou"]) == 0
    assert torch.isfinite(total) and float(total) > 0


BAD_BOXES = [(column, value) for column in (3, 4, 5) for value in (0.0, -1.0, float("nan"), float("inf"))] + [
    (column, value) for column in (0, 2, 6, 7) for value in (float("nan"), float("-inf"))
]


@pytest.mark.parametrize("column, value", BAD_BOXES)
def test_a_box_that_is_no_box_is_no_target_and_counted(column, value):
    box, label = boxes(5)
    expected, terms = run_loss(box, label, torch.tensor([[True] * 4 + [False]]))
    box[0, 4, column] = value
    total, others = run_loss(box, label, torch.ones(1, 5, dtype=torch.bool))
    assert torch.equal(total, expected) and torch.isfinite(total)
    assert int(others["bad_boxes"]) == 1 and int(terms["bad_boxes"]) == 0
    for name in ("code", "one_hot", "heatmap"):
        assert torch.equal(others["targets"][name], terms["targets"][name])
    assert torch.isfinite(others["targets"]["cost"]).all()


def test_padding_has_no_logarithm_of_nothing():
    assert torch.isfinite(transfusion_loss.encode_boxes(torch.zeros(1, 2, 9), CONFIG)).all()


def test_more_boxes_than_queries_match_every_query_once():
    box, label = boxes(13)
    _, terms = run_loss(box, label, torch.ones(1, 13, dtype=torch.bool))
    match = terms["targets"]["match"][0]
    assert sorted(match[match >= 0].tolist()) == list(range(8)) and int((match < 0).sum()) == 5


def test_padding_does_not_change_the_loss():
    box, label = boxes(5)
    padded = torch.cat([box, torch.zeros(1, 7, 9)], 1), torch.cat([label, torch.zeros(1, 7, dtype=torch.long)], 1)
    tight, _ = run_loss(box, label, torch.ones(1, 5, dtype=torch.bool))
    loose, _ = run_loss(*padded, torch.arange(12)[None] < 5)
    torch.testing.assert_close(tight, loose)


def test_a_map_of_another_size_is_refused_with_both_sizes():
    params, state = transfusion.init(CONFIG, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"\(20, 30\).*\(30, 30\)"):
        transfusion.apply(params, state, torch.zeros(1, 12, 20, 30), config=CONFIG, train=False)


@pytest.mark.parametrize("layers", [1, 2])
def test_where_a_query_looks_gives_back_what_it_saw(layers):
    """The weights times the values, through the rest of the attention, are the boundary `cross_attn` of the last layer."""
    config = replace(CONFIG, layers=layers)
    generator = torch.Generator().manual_seed(0)
    params, state = transfusion.init(config, generator)
    x = torch.randn(2, 12, 30, 30, generator=generator)
    outputs, _ = transfusion.apply(params, state, x, config=config, train=False)
    weights = transfusion.looked_at(params, state, outputs, config=config)  # B h Q X Y
    assert weights.shape == (2, 4, 8, 30, 30)
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, 4, 8))
    layer, norms = params["decoder"][-1], state["decoder"][-1]
    everywhere = transfusion.cell_centres(config, x.device).expand(2, -1, -1)
    at_cells, _ = transfusion._encode_position(
        layer["cross_position"], norms["cross_position"], everywhere, train=False
    )
    cells = outputs["shared"].flatten(2).transpose(1, 2) + at_cells
    matrix, bias = layer["cross_attn"]["in_proj"]["weight"][-16:], layer["cross_attn"]["in_proj"]["bias"][-16:]
    values = (cells @ matrix.T + bias).unflatten(-1, (4, -1)).transpose(1, 2)
    seen = (weights.flatten(3) @ values).transpose(1, 2).flatten(2)
    out = layer["cross_attn"]["out_proj"]
    query = torch.nn.functional.layer_norm(outputs["self_attn"], (16,), *layer["norms"][0].values())
    torch.testing.assert_close(
        outputs["cross_attn"], query + seen @ out["weight"].T + out["bias"], rtol=1e-4, atol=1e-5
    )
