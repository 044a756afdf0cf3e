"""Perspective refinement: where the anchors appear, against plain geometry and the golden cases, and what cells look up."""

import math
from dataclasses import replace

import bevnext_case
import pytest
import small_cameras
import torch
from safetensors.torch import load_file

from bevfn import tree
from bevfn.heads import perspective
from bevfn.layers import conv_norm, layer_norm, linear

CONFIG = perspective.Config(
    channels_in=6,
    channels=8,
    heads=2,
    x_m=(-12.0, 12.0, 2.0),
    y_m=(-8.0, 8.0, 2.0),
    heights_m=(-2.0, 2.0, 1.0),
)
SIZE = (32, 96)
Y, X = CONFIG.cells
needs_goldens = pytest.mark.skipif(not bevnext_case.FOLDERS[0].is_dir(), reason=bevnext_case.MISSING)


def augmented():
    """A batch of two samples under a mirrored, turned and scaled 3D augmentation."""
    base_aug = 1.1 * torch.diag(torch.tensor([-1.0, 1, 1, 1])) @ small_cameras.yaw(0.4)
    base_aug[3, 3] = 1.0
    return small_cameras.make(size=SIZE, base_aug=base_aug)


def inputs(batch, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 6, Y, X, generator=generator), torch.randn(4, 8, 4, 12, generator=generator), batch


def run(params, state, bev, features, batch, *, train=False, config=CONFIG):
    return perspective.apply(params, state, bev, features, batch, config=config, image_size=SIZE, train=train)


def test_anchors_are_the_projections_of_the_points_above_the_cells():
    batch = augmented()
    reference, mask = perspective.anchors(batch, CONFIG, SIZE)
    assert reference.shape == (2, 2, Y * X, 4, 2) and mask.shape == (2, 2, Y * X, 4)
    images, poses = batch.image_aug[0, 0].double(), batch.base_from_camera[0, 0].double()
    checked = 0
    for n in range(2):
        for q in range(0, Y * X, 5):
            for p in range(4):
                x, y, z = -12 + 2 * (q % X + 0.5), -8 + 2 * (q // X + 0.5), -2 + p + 0.5
                point = torch.tensor([x, y, z, 1.0], dtype=torch.float64)
                seen = torch.linalg.inv(poses[n]) @ torch.linalg.inv(batch.base_aug[0].double()) @ point
                if seen[2] < 0.1:
                    assert not mask[0, n, q, p]
                    continue
                pixel = batch.intrinsics[0, 0, n, :3, :3].double() @ seen[:3]
                u, v, _ = images[n, :3, :3] @ (pixel / pixel[2]) + images[n, :3, 3]
                wanted = torch.stack([u / SIZE[1], v / SIZE[0]])
                torch.testing.assert_close(reference[0, n, q, p].double(), wanted, atol=1e-5, rtol=1e-5)
                assert bool(mask[0, n, q, p]) == bool(((wanted > 0) & (wanted < 1)).all())
                checked += int(mask[0, n, q, p])
    assert checked > 10


@needs_goldens
@pytest.mark.parametrize("folder", bevnext_case.FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("phase", ["eval", "train"])
def test_anchors_are_those_of_the_golden_case(folder, phase):
    samples = (0,) if phase == "eval" else (0, 1) if folder.name.endswith("1") else (1,)
    batch = bevnext_case.key_frame(folder, samples)
    found = dict(zip(("reference_points_cam", "mask"), perspective.anchors(batch, perspective.Config(), (256, 704))))
    golden = load_file(folder / "outputs.safetensors")
    ours, theirs = {}, {}
    for name, whole in found.items():
        name = f"{phase}/perspective/{name}"
        key = name.rpartition("/")[2]
        ours[key], theirs[key] = bevnext_case.stored(folder, name, whole.transpose(0, 1)), golden[name]
    assert torch.equal(ours["mask"], theirs["mask"].bool())
    near = (theirs["reference_points_cam"].abs() < 2).all(-1)  # behind a camera rounding is all there is
    error = (ours["reference_points_cam"] - theirs["reference_points_cam"])[near].abs().max()
    assert int(near.sum()) > 700 and float(error) < 2e-6  # measured 7e-7


@needs_goldens
def test_positions_and_the_layer_behind_the_attention_are_those_of_the_golden_case():
    folder, config = bevnext_case.FOLDERS[0], perspective.Config()
    golden, key = load_file(folder / "outputs.safetensors"), "transformer_neck."
    rows, columns = (bevnext_case.weight(folder, f"{key}positional_encoding.{n}_embed.weight") for n in ("row", "col"))
    position = perspective.position({"rows": rows, "columns": columns})
    name = "eval/perspective/bev_pos"
    assert torch.equal(bevnext_case.stored(folder, name, position), golden[name])

    def layer(name):
        return {
            part: bevnext_case.weight(folder, f"{key}decoder.layers.0.{name}.{part}") for part in ("weight", "bias")
        }

    params = {
        "norms": [layer("norms.0"), layer("norms.1")],
        "ffn": {"fc1": layer("ffns.0.layers.0.0"), "fc2": layer("ffns.0.layers.1")},
    }
    found = perspective.settle(params, golden["eval/perspective/cross_attn"])
    for part in ("norm0", "ffn"):
        torch.testing.assert_close(found[part], golden[f"eval/perspective/{part}"], atol=1e-5, rtol=1e-5)
    both = range(0, math.prod(config.cells), 264 * 231 // 33)  # the cells of which input and result are stored
    ours = found["out"][:, [q // 264 for q in both]]
    torch.testing.assert_close(ours, golden["eval/perspective/out"][:, [q // 231 for q in both]], atol=1e-5, rtol=1e-5)


def test_a_cell_that_no_camera_sees_keeps_its_query_and_the_projections_bias():
    params, state = perspective.init(CONFIG, torch.Generator().manual_seed(0))
    params["attention"]["out"]["bias"] = torch.linspace(-1, 1, 8)
    bev, features, batch = inputs(augmented())
    outputs, _ = run(params, state, bev, features, batch)
    blind = ~outputs["mask"].any(-1).any(1)  # B Q
    assert bool(blind.any()) and bool((~blind).any())
    expected = outputs["query"] + params["attention"]["out"]["bias"]
    assert torch.equal(outputs["attention"][blind], expected[blind])
    other, _ = run(params, state, bev, features + 1, batch)
    changed = (other["attention"] != outputs["attention"]).any(-1)
    assert torch.equal(changed, ~blind)


def test_queries_are_cells_row_by_row_and_the_map_is_the_layers_output():
    params, state = perspective.init(CONFIG, torch.Generator().manual_seed(0))
    bev, features, batch = inputs(augmented())
    outputs, new = run(params, state, bev, features, batch, train=True)
    shared, seen = conv_norm.apply(params["shared"], state["shared"], bev, train=True)
    row, column = 3, 5
    q = row * X + column
    torch.testing.assert_close(outputs["query"][1, q], params["embedding"][q] + shared[1, :, row, column])
    torch.testing.assert_close(outputs["position"][0, q], torch.cat([params["columns"][column], params["rows"][row]]))
    assert torch.equal(outputs["map"][1, :, row, column], outputs["out"][1, q])
    norm0 = layer_norm.apply(params["norms"][0], outputs["attention"])
    inner = torch.relu(linear.apply(params["ffn"]["fc1"], norm0))
    torch.testing.assert_close(outputs["ffn"], norm0 + linear.apply(params["ffn"]["fc2"], inner))
    assert tree.diff(new, state) == [] and torch.equal(new["shared"]["norm"]["mean"], seen["norm"]["mean"])


def test_initial_matrices_and_embeddings_are_xavier_uniform():
    config = replace(CONFIG, channels=32, heads=4)
    params, _ = perspective.init(config, torch.Generator().manual_seed(0))
    for leaf, fans in (
        (params["embedding"], X * Y + 32),
        (params["shared"]["conv"]["weight"], 9 * (32 + 6)),
        (params["ffn"]["fc1"]["weight"], 32 + 128),
        (params["rows"], Y + 16),
    ):
        bound = (6 / fans) ** 0.5
        assert bound * 0.97 < float(leaf.abs().max()) <= bound
    assert float(params["ffn"]["fc1"]["bias"].abs().max()) > 0  # torch's default


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(dtype):
    params, state = perspective.init(CONFIG, torch.Generator().manual_seed(0))
    bev, features, batch = inputs(augmented())
    exact, _ = run(params, state, bev, features, batch, train=True)
    half, _ = run(params, state, bev.to(dtype), features.to(dtype), batch, train=True)
    assert half["reference"].dtype == torch.float32 and torch.equal(half["reference"], exact["reference"])
    for name in ("query", "attention", "norm0", "out"):
        assert half[name].dtype == dtype
        limit = 0.01 if dtype == torch.float16 else 0.05
        assert float((half[name].float() - exact[name]).norm() / exact[name].norm()) < limit, name


def test_what_does_not_fit_is_named():
    params, state = perspective.init(CONFIG, torch.Generator().manual_seed(0))
    bev, features, batch = inputs(augmented())
    with pytest.raises(ValueError, match=r"BEV map is \(4, 4\) cells, x_m and y_m of the refinement hold \(8, 12\)"):
        run(params, state, bev[..., :4, :4], features, batch)
    with pytest.raises(ValueError, match="channels 12 must be a multiple of twice the 8 heads"):
        perspective.Config(channels=12)
    with pytest.raises(ValueError, match="must hold an even number of steps, not 7"):
        perspective.Config(heights_m=(-4.0, 3.0, 1.0))
    with pytest.raises(ValueError, match="the batch has no image_from_base"):
        run(params, state, bev, features, replace(batch, image_from_base=None))
