"""MatrixVT's view transform against its definition written as loops."""

import small_cameras
import torch

from bevfn.views import camera_grid, matrixvt

GRID = camera_grid.Config(image_size=(32, 96), depth_m=(2.0, 34.0, 4.0), x_m=(-16.0, 16.0, 1.0), y_m=(-16.0, 16.0, 1.0))
CONFIG = matrixvt.Config(context=3, channels=4)


def placed():
    batch = small_cameras.make()
    cell = matrixvt.ray_cells(batch, 0, GRID)
    return batch, cell, matrixvt.matrices(cell, GRID)


def test_a_rays_point_is_the_mean_over_its_image_column():
    batch, cell, _ = placed()
    x, y, _ = camera_grid.frustum_points(batch, 0, GRID)  # B N D H W
    planes = matrixvt.ray_points(batch, 0, GRID)
    ray, d = 6 + 4, 3  # camera 1, column 4
    torch.testing.assert_close(planes[0][1, ray, d], x[1, 1, d, :, 4].mean() + 16.0)
    torch.testing.assert_close(planes[1][1, ray, d], y[1, 1, d, :, 4].mean() + 16.0)
    assert cell.shape == (2, 12, 8)


def test_matrices_mark_the_cells_of_rays_and_of_bins_and_lose_the_middle_one():
    _, cell, (ring, ray) = placed()
    lost = 16 * 32 + 16
    assert int((cell == lost).sum()) > 0  # points outside were sent there
    for b in range(2):
        for name, matrix, sets in (("ray", ray, cell[b]), ("ring", ring, cell[b].T)):
            for i, hits in enumerate(sets):
                wanted = set(hits.tolist()) - {lost}
                assert set(matrix[b, i].nonzero()[:, 0].tolist()) == wanted, name
    assert set(ring.unique().tolist()) <= {0.0, 1.0}


def test_the_bev_map_is_the_sum_over_rays_and_all_their_bins():
    _, _, (ring, ray) = placed()
    params, state = matrixvt.init(CONFIG, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    depth = torch.softmax(torch.randn(4, 8, 2, 6, generator=generator), 1)
    context = torch.randn(4, 3, 2, 6, generator=generator)
    out, new = matrixvt.apply(params, state, depth, context, (ring, ray), grid=GRID, train=True)
    torch.testing.assert_close(out["depth_reduced"].sum(1), torch.ones(4, 6))  # rows' weights sum to 1
    expected = torch.zeros(2, 3, 32 * 32)
    for b in range(2):
        for r in range(12):
            image, w = 2 * b + r // 6, r % 6
            mass = out["depth_reduced"][image, :, w] @ ring[b]  # S: every bin whose ring meets the cell
            expected[b] += out["feature"][image, :, w, None] * ray[b, r] * mass
    torch.testing.assert_close(out["bev"], expected.view(2, 3, 32, 32), atol=1e-5, rtol=1e-5)
    assert set(new) == set(state)


def test_no_gradient_flows_into_the_calibration_and_all_into_the_parameters():
    _, _, places = placed()
    params, state = matrixvt.init(CONFIG, torch.Generator().manual_seed(0))
    depth, context = torch.rand(4, 8, 2, 6), torch.randn(4, 3, 2, 6)

    def total(params):
        out, _ = matrixvt.apply(params, state, depth, context, places, grid=GRID, train=False)
        return out["bev"].square().sum()

    gradient = torch.func.grad(total)(params)
    assert all(float(g.abs().sum()) > 0 for g in (gradient["out"]["conv"]["weight"], gradient["merge"][0]["weight"],
                                                  gradient["rows"]["out"]["weight"]))  # fmt: skip
