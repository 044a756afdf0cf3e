"""View transform: pooling against a plain outer product, gradients, both depth nets, and the golden camera branch."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree
from safetensors.torch import load_file
from torch import Tensor

from bevfn import upstream
from bevfn.backbones import swin
from bevfn.data import batch as batches
from bevfn.data.batch import Base, Batch
from bevfn.necks import lss_fpn
from bevfn.parity import golden
from bevfn.views import camera_grid, lift_splat

CASE = Path(__file__).parents[1].parent / "shared" / "goldens" / "bevfusion_lidar_cam"
GRID = camera_grid.Config(
    image_size=(32, 48),
    stride=8,
    depth_m=(1.0, 13.0, 1.0),
    x_m=(-16.0, 16.0, 1.0),
    y_m=(-16.0, 16.0, 1.0),
    z_m=(-8.0, 8.0, 16.0),
    rows="x",
)
CONFIG = lift_splat.Config(channels_in=6, channels_out=4, grid=GRID)
CAMERA_ONLY = replace(CONFIG, lidar_depth=False)


def make_batch(B: int = 2, N: int = 2, P: int = 60, image: tuple[int, int] = (32, 48)) -> Batch:
    """Cameras that look forward and back over random points."""
    generator = torch.Generator().manual_seed(0)
    forward = torch.tensor([[0.0, 0, 1, 0.2], [-1, 0, 0, 0], [0, -1, 0, 1.0], [0, 0, 0, 1]])
    back = torch.diag(torch.tensor([-1.0, -1, 1, 1])) @ forward
    base_from_camera = torch.stack([forward, back])[:N].expand(B, N, 4, 4).clone()
    intrinsics = torch.tensor([[50.0, 0, 48, 0], [0, 50, 32, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).expand(B, N, 4, 4).clone()
    image_aug = torch.diag(torch.tensor([0.5, 0.5, 1, 1])).expand(B, N, 4, 4).clone()
    base_aug = torch.diag(torch.tensor([1.05, 1.05, 1.05, 1])).expand(B, 4, 4).clone()
    points = 20 * torch.rand(B, P, 5, generator=generator) - 10
    valid = torch.rand(B, P, generator=generator) > 0.2
    return batches.make(
        base=Base.LIDAR,
        points=points * valid[..., None],
        points_valid=valid,
        boxes=torch.zeros(B, 3, 9),
        labels=torch.zeros(B, 3, dtype=torch.int64),
        boxes_valid=torch.zeros(B, 3, dtype=torch.bool),
        base_aug=base_aug,
        images=torch.zeros(B, 1, N, *image, 3, dtype=torch.uint8),
        image_from_base=(intrinsics @ torch.linalg.inv(base_from_camera))[:, None],
        base_from_camera=base_from_camera[:, None],
        intrinsics=intrinsics[:, None],
        image_aug=image_aug[:, None],
    )


def make(config: lift_splat.Config) -> tuple[dict, dict, Tensor, Batch]:
    params, state = lift_splat.init(config, torch.Generator().manual_seed(0))
    feature = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(1)).permute(0, 3, 1, 2)
    return params, state, feature, make_batch()


@pytest.mark.parametrize("config", [CONFIG, CAMERA_ONLY])
def test_pooling_is_the_sum_of_depth_times_context_over_the_points_of_a_cell(config):
    params, state, feature, batch = make(config)
    outputs, _ = lift_splat.apply(params, state, feature, batch, config=config, train=False)
    depth = outputs["depth_net"][:, :12].double().softmax(1)  # BN D H W
    context = outputs["depth_net"][:, 12:].double()  # BN C H W
    product = (depth[:, :, None] * context[:, None]).view(2, 2, 12, 4, 4, 6)  # B N D C H W
    expected = torch.zeros(2, 4, 32, 32, dtype=torch.float64)
    place = ((outputs["geometry"] - torch.tensor([-16.0, -16.0, -8.0])) / torch.tensor([1.0, 1.0, 16.0])).trunc()
    inside = ((place > -1) & (place < torch.tensor([32, 32, 1]))).all(-1)
    for b, n, d, h, w in inside.nonzero().tolist():
        x, y, _ = place[b, n, d, h, w].int().tolist()
        expected[b, :, x, y] += product[b, n, d, :, h, w]
    assert (outputs["bev_pool"] - expected).norm() <= 1e-6 * expected.norm()
    assert 0 < int(inside.sum()) < inside.numel()
    assert outputs["bev"].shape == (2, 4, 16, 16)


def test_every_boundary_is_there_and_the_lidar_depth_is_used():
    params, state, feature, batch = make(CONFIG)
    outputs, new = lift_splat.apply(params, state, feature, batch, config=CONFIG, train=True)
    assert set(outputs) == {"depth_map", "depth_transform", "depth_net", "geometry", "bev_pool", "bev"}
    assert outputs["depth_map"].shape == (4, 32, 48) and outputs["depth_transform"].shape == (4, 64, 4, 6)
    assert pytree.tree_structure(new) == pytree.tree_structure(state)
    without = Batch(**{**vars(batch), "points_valid": torch.zeros_like(batch.points_valid)})
    blind, _ = lift_splat.apply(params, state, feature, without, config=CONFIG, train=True)
    assert float(blind["depth_map"].abs().max()) == 0.0
    assert not torch.equal(blind["depth_net"], outputs["depth_net"])


def test_the_camera_only_depth_net_is_one_convolution_and_reads_no_points():
    params, state, feature, batch = make(CAMERA_ONLY)
    assert set(params) == {"depth_net", "downsample"} and set(state) == {"downsample"}
    outputs, new = lift_splat.apply(params, state, feature, batch, config=CAMERA_ONLY, train=True)
    assert set(outputs) == {"depth_net", "geometry", "bev_pool", "bev"} and set(new) == {"downsample"}
    expected = torch.nn.functional.conv2d(feature, *params["depth_net"][0]["conv"].values())
    assert torch.allclose(outputs["depth_net"], expected, atol=1e-5)


def test_samples_of_a_batch_do_not_mix():
    params, state, feature, batch = make(CONFIG)
    together, _ = lift_splat.apply(params, state, feature, batch, config=CONFIG, train=False)
    second = pytree.tree_map(lambda x: x[1:], batch)
    alone, _ = lift_splat.apply(params, state, feature[2:], second, config=CONFIG, train=False)
    assert torch.allclose(together["bev"][1:], alone["bev"], atol=1e-5)


@pytest.mark.parametrize("name", ["feature", "weight"])
def test_gradients_agree_with_finite_differences(name):
    params, state, feature, batch = make(CAMERA_ONLY)  # smooth up to bev_pool: no ReLU, no statistics
    probe = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    weight = params["depth_net"][0]["conv"]["weight"]

    def loss(x: Tensor) -> Tensor:
        x, w = (x, weight) if name == "feature" else (feature, x)
        changed = {**params, "depth_net": [{"conv": {**params["depth_net"][0]["conv"], "weight": w}}]}
        outputs, _ = lift_splat.apply(changed, state, x, batch, config=CAMERA_ONLY, train=False)
        return (outputs["bev_pool"] * probe).sum()

    x = feature if name == "feature" else weight
    gradient = torch.func.grad(loss)(x)
    # Some of the gradient's own direction, so that the slope is no small difference of large numbers.
    direction = gradient / gradient.std() + torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    slope = (gradient * direction).sum()
    step = 1e-2  # float32: a smaller step drowns in rounding, a larger one in curvature
    difference = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert abs(slope - difference) < 2e-3 * abs(slope)


def test_half_precision_features_are_widened():
    params, state, feature, batch = make(CONFIG)
    outputs, _ = lift_splat.apply(params, state, feature.bfloat16(), batch, config=CONFIG, train=True)
    assert {x.dtype for x in outputs.values()} == {torch.float32}


def test_the_train_step_traces_as_one_graph_and_agrees_with_eager():
    params, state, feature, batch = make(CONFIG)

    def step(params, feature, batch):
        def loss(params):
            outputs, new = lift_splat.apply(params, state, feature, batch, config=CONFIG, train=True)
            return outputs["bev"].square().mean(), new

        return torch.func.grad_and_value(loss, has_aux=True)(params)

    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")(params, feature, batch)
    for a, b in zip(pytree.tree_leaves(compiled), pytree.tree_leaves(step(params, feature, batch)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_wrong_inputs_are_refused_with_the_remedy():
    params, state, feature, batch = make(CONFIG)
    blind = Batch(**{**vars(batch), "image_aug": None})
    with pytest.raises(ValueError, match="the batch has no image_aug"):
        lift_splat.apply(params, state, feature, blind, config=CONFIG, train=False)
    with pytest.raises(ValueError, match=r"feature of \(4, 5\) does not fit image_size \(32, 48\): expected \(4, 6\)"):
        lift_splat.apply(params, state, feature[..., :5], batch, config=CONFIG, train=False)
    with pytest.raises(ValueError, match=r"at stride 8, grid\.stride is 16"):
        lift_splat.Config(grid=replace(GRID, stride=16))
    with pytest.raises(ValueError, match=r"\(31, 32\) cells are halved"):
        lift_splat.Config(grid=replace(GRID, x_m=(-16.0, 15.0, 1.0)))


@pytest.mark.slow
def test_the_camera_branch_reproduces_the_golden_case():
    if not CASE.is_dir():
        pytest.skip(f"needs the golden case {CASE}")
    inputs, stored = load_file(CASE / "inputs.safetensors"), load_file(CASE / "outputs.safetensors")
    stats = json.loads((CASE / "stats.json").read_text())
    params, state, _ = upstream.import_state(golden.fill_case(CASE), "bevfusion-lidar-camera")
    params, state = params["camera"], state["camera"]
    batch = batches.make(
        base=Base.LIDAR,
        points=inputs["points"][None],
        points_valid=torch.ones(1, len(inputs["points"]), dtype=torch.bool),
        boxes=torch.zeros(1, 1, 9),
        labels=torch.zeros(1, 1, dtype=torch.int64),
        boxes_valid=torch.zeros(1, 1, dtype=torch.bool),
        base_aug=inputs["lidar_aug_matrix"][None],
        images=inputs["imgs"][None, None],
        image_from_base=inputs["lidar2img"][None, None],
        base_from_camera=inputs["cam2lidar"][None, None],
        intrinsics=inputs["cam2img"][None, None],
        image_aug=inputs["img_aug_matrix"][None, None],
    )
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    images = ((inputs["imgs"].float() - mean) / std).permute(0, 3, 1, 2)
    config = lift_splat.Config()
    with torch.no_grad():
        levels = swin.apply(params["backbone"], images, config=swin.Config(), train=False)
        neck, _ = lss_fpn.apply(params["neck"], state["neck"], levels, train=False)
        view, _ = lift_splat.apply(params["view"], state["view"], neck[0], batch, config=config, train=False)
    found = {f"eval/swin/{k}": y for k, y in enumerate(levels)} | {f"eval/lssfpn/{k}": y for k, y in enumerate(neck)}
    found |= {f"eval/vt/{k}": y for k, y in view.items() if k != "depth_map"}
    for name, y in found.items():
        begins = [part.strip().removeprefix("::") for part in stats[name]["slicing"].strip("[]").split(",")]
        y = y[tuple(slice(None, None, int(step) if step != ":" else 1) for step in begins)]
        assert (y - stored[name]).norm() <= 2e-5 * stored[name].norm(), name  # measured: at most 1.5e-6
    assert torch.equal(view["geometry"][:, :, ::8, ::4, ::8], stored["eval/vt/geometry"])


def test_depths_are_the_probabilities_that_the_context_is_weighted_by():
    params, state, feature, batch = make(CONFIG)
    outputs, _ = lift_splat.apply(params, state, feature, batch, config=CONFIG, train=False)
    found = lift_splat.depths(outputs, CONFIG)
    assert found.shape == (4, 12, 4, 6)
    torch.testing.assert_close(found.sum(1), torch.ones(4, 4, 6))
    context = outputs["depth_net"][:, 12:]
    cell = camera_grid.cells(batch, 0, GRID)
    torch.testing.assert_close(camera_grid.pool(found, context, cell, GRID), outputs["bev_pool"])
