"""Geometry: golden bits, upstream's formula, frames, and what a depth image holds."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bevfn import geometry

CASE = Path(__file__).parents[1].parent / "shared" / "goldens" / "bevfusion_lidar_cam"
IMAGE, FEATURE, DEPTH = (256, 704), (32, 88), (1.0, 60.0, 0.5)
BOUNDS = ((-54.0, 54.0, 0.3), (-54.0, 54.0, 0.3), (-10.0, 10.0, 20.0))


@pytest.fixture(scope="module")
def golden():
    if not CASE.is_dir():
        pytest.skip(f"needs the golden case {CASE}")
    return load_file(CASE / "inputs.safetensors"), load_file(CASE / "outputs.safetensors")


def matrices(inputs: dict, which: str) -> dict:
    prefix = "" if which == "eval" else "aug/"
    image_aug, base_aug = inputs[f"{prefix}img_aug_matrix"][None], inputs[f"{prefix}lidar_aug_matrix"][None]
    return {
        "image_aug": image_aug,
        "undo_image_aug": geometry.invert(image_aug[..., :3, :3]),
        "base_from_camera": inputs["cam2lidar"][None],
        "base_aug": base_aug,
        "base_from_pixel": geometry.unprojection(inputs["cam2lidar"][None], inputs["cam2img"][None]),
    }


def frustum_points(fields: dict) -> geometry.Planes:
    return geometry.frustum_in_base(geometry.frustum(IMAGE, FEATURE, DEPTH, torch.device("cpu")), **fields)


def upstream_points(fields: dict) -> torch.Tensor:
    """The frustum in the augmented LiDAR frame by batched matrix products on [B N D H W 3 1], as upstream has it."""
    x, y, depth = geometry.frustum(IMAGE, FEATURE, DEPTH, torch.device("cpu"))
    point = torch.stack(torch.broadcast_tensors(x, y, depth), -1) - fields["image_aug"][:, :, None, None, None, :3, 3]
    point = fields["undo_image_aug"][:, :, None, None, None] @ point[..., None]
    point = torch.cat([point[..., :2, :] * point[..., 2:, :], point[..., 2:, :]], -2)
    point = (fields["base_from_pixel"][:, :, None, None, None] @ point)[..., 0]
    point = point + fields["base_from_camera"][:, :, None, None, None, :3, 3]
    turn = fields["base_aug"][:, None, None, None, None]
    turned = turn[..., :3, :3].expand(*point.shape[:-1], 3, 3) @ point[..., None]
    return turned[..., 0] + turn[..., :3, 3]


@pytest.mark.parametrize("which", ["eval", "aug"])
def test_frustum_points_and_cells_have_upstreams_bits(golden, which):
    inputs, outputs = golden
    fields = matrices(inputs, which)
    planes = frustum_points(fields)
    ours, theirs = torch.stack(planes, -1), upstream_points(fields)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours[:, :, ::8, ::4, ::8], outputs[f"{which}/vt/geometry"])
    low, step = torch.tensor([-54.0, -54.0, -10.0]), torch.tensor([0.3, 0.3, 20.0])
    place = ((theirs - low) / step).long()
    inside = ((place >= 0) & (place < torch.tensor([360, 360, 1]))).all(-1)
    expected = torch.where(inside, place[..., 0] * 360 + place[..., 1], -1)
    cells = geometry.bev_cells(planes, BOUNDS, truncate_toward_zero=True)
    assert cells.dtype == torch.int32 and torch.equal(cells.long(), expected)
    if which == "eval":
        assert int((cells >= 0).sum()) == 1_835_478  # the golden case's README


@pytest.mark.parametrize("which", ["eval", "aug"])
@pytest.mark.parametrize("padding", [0, 500])
def test_depth_map_has_the_golden_bits_whatever_the_padding(golden, which, padding):
    inputs, outputs = golden
    fields = matrices(inputs, which)
    points = inputs["points" if which == "eval" else "aug/points"]
    points = torch.cat([points, torch.full((padding, 5), 7.0)])[None]
    valid = (torch.arange(points.shape[1]) < points.shape[1] - padding)[None]
    pixel_depth = geometry.project(
        points,
        undo_base_aug=geometry.invert(fields["base_aug"][:, :3, :3]),
        base_aug=fields["base_aug"],
        image_from_base=inputs["lidar2img"][None],
        image_aug=fields["image_aug"],
    )
    index = outputs[f"{which}/vt/depth_index"].long().unbind(1)
    expected = torch.zeros(6, *IMAGE).index_put(index, outputs[f"{which}/vt/depth_value"])
    assert torch.equal(geometry.depth_map(pixel_depth, valid, IMAGE)[0], expected)


def test_floor_moves_points_below_the_lower_bound_out_and_no_others():
    place = torch.tensor([-1.01, -0.99, -0.01, 0.0, 0.99, 1.0, 7.99, 8.0, float("nan")])
    planes = (place * 2.0 - 8.0, torch.zeros(9), torch.zeros(9))
    bounds = ((-8.0, 8.0, 2.0), (-1.0, 1.0, 2.0), (-1.0, 1.0, 2.0))
    cells = [geometry.bev_cells(planes, bounds, truncate_toward_zero=rule) for rule in (True, False)]
    # The leading axis is the batch: sample b starts at row 8 b.
    offset = 8 * torch.arange(9)
    expected = torch.tensor([-1, 0, 0, 0, 0, 1, 7, -1, -1])
    assert torch.equal(cells[0].long(), torch.where(expected < 0, -1, expected + offset))
    expected = torch.tensor([-1, -1, -1, 0, 0, 1, 7, -1, -1])
    assert torch.equal(cells[1].long(), torch.where(expected < 0, -1, expected + offset))


def scene(seed: int) -> dict:
    """A camera, an image and a LiDAR augmentation, all random: [1 1 4 4] each (LiDAR [1 4 4])."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def turn(angle: float, axes: tuple[int, int]) -> torch.Tensor:
        m, (i, j) = torch.eye(4), axes
        m[i, i] = m[j, j] = math.cos(angle)
        m[i, j], m[j, i] = -math.sin(angle), math.sin(angle)
        return m

    base_from_camera = turn(number(-3, 3), (0, 1)) @ turn(number(-3, 3), (1, 2))
    base_from_camera[:3, 3] = torch.tensor([number(-2, 2) for _ in range(3)])
    intrinsics = torch.eye(4)
    intrinsics[0, 0] = intrinsics[1, 1] = number(300, 900)
    intrinsics[0, 2], intrinsics[1, 2] = number(300, 500), number(100, 300)
    image_aug = turn(number(-0.1, 0.1), (0, 1))
    image_aug[:2, :2] *= number(0.4, 0.6)
    image_aug[:2, 3] = torch.tensor([number(-50, 50), number(-50, 50)])
    base_aug = turn(number(-0.8, 0.8), (0, 1))
    base_aug[:3, :3] *= number(0.9, 1.1)
    base_aug[:3, 3] = torch.tensor([number(-0.5, 0.5) for _ in range(3)])
    image_from_base = (intrinsics.double() @ torch.linalg.inv(base_from_camera.double())).float()
    return {
        "base_from_camera": base_from_camera[None, None],
        "intrinsics": intrinsics[None, None],
        "image_aug": image_aug[None, None],
        "base_aug": base_aug[None],
        "image_from_base": image_from_base[None, None],
    }


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_projecting_frustum_points_gives_back_their_pixels_and_depths(seed):
    m = scene(seed)
    grid = geometry.frustum((64, 96), (8, 12), (2.0, 40.0, 2.0), torch.device("cpu"))
    planes = geometry.frustum_in_base(
        grid,
        image_aug=m["image_aug"],
        undo_image_aug=geometry.invert(m["image_aug"][..., :3, :3]),
        base_from_pixel=geometry.unprojection(m["base_from_camera"], m["intrinsics"]),
        base_from_camera=m["base_from_camera"],
        base_aug=m["base_aug"],
    )
    points = torch.stack(planes, -1).reshape(1, -1, 3)
    back = geometry.project(
        points,
        undo_base_aug=geometry.invert(m["base_aug"][:, :3, :3]),
        base_aug=m["base_aug"],
        image_from_base=m["image_from_base"],
        image_aug=m["image_aug"],
    )
    for found, expected, tolerance in zip(back, torch.broadcast_tensors(*grid), (2e-2, 2e-2, 1e-3)):  # pixels, m
        assert torch.allclose(found.flatten(), expected.flatten(), atol=tolerance, rtol=1e-4)


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_invert_agrees_with_float64_and_needs_no_nonzero_diagonal(seed):
    matrix = scene(seed)["base_from_camera"][0, 0, :3, :3]
    matrix = torch.stack([matrix, matrix[[1, 2, 0]], torch.eye(3)[[2, 0, 1]], torch.eye(3)[[0, 2, 1]]])
    assert torch.allclose(geometry.invert(matrix).double(), torch.linalg.inv(matrix.double()), atol=2e-6)


def test_the_last_valid_point_of_a_pixel_counts():
    u = torch.tensor([2.9, 2.1, 2.0, 2.5, -0.1, 4.0, 0.0])
    v = torch.tensor([1.0, 1.9, 1.5, 1.2, 0.0, 0.0, 2.999])
    depth = torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0])
    valid = torch.tensor([[True, True, True, False, True, True, True]])
    planes = tuple(p.expand(1, 2, -1) for p in (u, v, depth))
    expected = torch.zeros(3, 4)
    expected[1, 2], expected[2, 0] = 7.0, 11.0
    found = geometry.depth_map(planes, valid, (3, 4))
    assert found.shape == (1, 2, 3, 4) and all(torch.equal(image, expected) for image in found[0])
    assert torch.equal(geometry.depth_map_on_host(planes, valid, (3, 4)), found)


def test_depth_maps_on_the_host_have_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.rand(2, 3, 4000, generator=generator) * 60 - 10 for _ in range(2))  # many in a pixel, many outside
    depth, valid = torch.rand(2, 3, 4000, generator=generator) * 60, torch.rand(2, 4000, generator=generator) < 0.8
    u[0, 0, :5] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 40.0])
    made = geometry.depth_map((u, v, depth), valid, (40, 40))
    assert torch.equal(geometry.depth_map_on_host((u, v, depth), valid, (40, 40)), made) and (made > 0).sum() > 3000


def test_points_behind_a_camera_stay_out_of_its_image():
    eye = torch.eye(4)[None, None]
    intrinsics = torch.tensor([[50.0, 0, 8, 0], [0, 50.0, 8, 0], [0, 0, 1, 0], [0, 0, 0, 1]])[None, None]
    points = torch.tensor([[[0.1, 0.1, -5.0], [0.1, 0.1, 5.0]]])
    planes = geometry.project(
        points, undo_base_aug=eye[0, :, :3, :3], base_aug=eye[0], image_from_base=intrinsics, image_aug=eye
    )
    image = geometry.depth_map(planes, torch.ones(1, 2, dtype=torch.bool), (16, 16))
    assert int((image != 0).sum()) == 1 and float(image.max()) == 5.0


@pytest.mark.parametrize(("size", "count"), [(704, 88), (256, 32), (96, 12), (800, 100), (8, 1)])
def test_frustum_pixels_are_linspace_bit_for_bit(size, count):
    x, y, depth = geometry.frustum((size, size), (count, count), (1.0, 60.0, 0.5), torch.device("cpu"))
    assert torch.equal(x.flatten(), torch.linspace(0, size - 1, count)) and torch.equal(x.flatten(), y.flatten())
    assert depth.flatten()[[0, -1]].tolist() == [1.0, 59.5]


@pytest.mark.parametrize("bounds", [(-51.2, 51.2, 0.8), (-5.0, 3.0, 1.0), (-54.0, 54.0, 0.3)])
def test_the_centre_of_a_cell_is_in_its_middle(bounds):
    centres = geometry.cell_centres(bounds, torch.device("cpu"))
    place = geometry.in_cells(centres, bounds)
    torch.testing.assert_close(place, torch.arange(geometry.num_cells(bounds)) + 0.5, atol=1e-4, rtol=0)
