"""The camera branch of autoware's BEVFusion node, as far as its shapes are dynamic there: written by hand, like the encoder.

Of every input the node fixes the first dimension to -1 (TrtCommon::validateNetworkIO refuses an engine of other shapes) and
builds for 1 to `num_cameras` images. What is traced has all its cameras: behind the inputs the last image, and its matrices,
stand in for those that are missing, so that one graph is right for every number of them; the node gives all.

What follows from the calibration alone the node computes once, on the host: which frustum points are in the grid (`kept`), the
order of their cells (`indices`: among those kept), the cells in that order (`geom_feats`: x, y, z, batch; `ranks`). Of several
LiDAR points on one pixel of a depth map TensorRT takes any; onnxruntime, as bevfn, the last.

Source: autoware_universe perception/autoware_bevfusion, lib/bevfusion_trt.cpp at 08375e6 and lib/preprocess/precomputed_features.cpp
at 730c2be; perception/autoware_tensorrt_common/src/tensorrt_common.cpp at 08d2765; AWML projects/BEVFusion/bevfusion/depth_lss.py and
ops/bev_pool/bev_pool.py at 7a6ec07; ours: `views.lift_splat`, `geometry.project`.
"""

import numpy as np
import onnx_ir as ir

from bevfn.data.batch import Batch
from bevfn.export import plugins
from bevfn.export.plugin_encoder import FLOAT, HALF, INT32, INT64, Dims, Nodes, dims, value
from bevfn.models import bevfusion
from bevfn.views import camera_grid, lift_splat

BOOL, UINT8 = ir.DataType.BOOL, ir.DataType.UINT8
IMAGES, FEATURES = "imgs", "image_feats"
DEPTH_MAP, DEPTH_NET, POOLED = "camera.view.depth_map", "camera.view.depth_net", "camera.view.bev_pool"
ROWS = {
    "points": "num_points",
    "lidar2image": "num_imgs",
    "img_aug_matrix": "num_imgs",
    "geom_feats": "num_kept",
    "kept": "num_geom_feats",
    "ranks": "num_kept",
    "indices": "num_kept",
    FEATURES: "num_imgs",
}
"""{input of the main graph: its first dimension}"""
KEPT = ROWS["indices"]
MATRICES = ("lidar2image", "img_aug_matrix")
FAR = (1e-5, 1e5)  # m, between which `geometry.project` clamps a depth


def inputs(columns: int, features: Dims) -> dict[str, ir.Value]:
    """Inputs of the main graph beside the voxels, by name; columns: of a point; features: of a feature map [C H W]."""
    kinds = {"geom_feats": INT32, "kept": BOOL, "ranks": INT64, "indices": INT64}
    rest: dict[str, Dims] = {"points": (columns,), "geom_feats": (4,), FEATURES: features}
    rest |= dict.fromkeys(MATRICES, (4, 4))
    return {name: value(name, kinds.get(name, FLOAT), (count, *rest.get(name, ()))) for name, count in ROWS.items()}


def write(
    to: Nodes,
    given: dict[str, ir.Value],
    depth_net: ir.Value,
    *,
    config: lift_splat.Config,
    features: str,
    half: bool,
) -> dict[str, ir.Value]:
    """Writes what of the branch is not traced.

    Args:
        given: `inputs`, and others.
        depth_net: [N D+C H W] float32, logits and context, of `lift_splat.apply`: traced, from the first two of the results.
        features: name of the boundary that the cameras' features are.
        half: that is in float16.

    Returns the boundaries where the traced part begins again: features [N C H W], DEPTH_MAP, POOLED.
    """
    N = dims(depth_net)[0]
    assert isinstance(N, int)
    maps, image_from_base, image_aug = (every(to, given[name], N, name) for name in (FEATURES, *MATRICES))
    return {
        features: to("Cast", maps, like=(HALF, dims(maps)), to=HALF) if half else maps,
        DEPTH_MAP: depth_map(to, given["points"], image_from_base, image_aug, config.grid.image_size),
        POOLED: pooled(to, depth_net, given, config),
    }


def images(to: Nodes, imgs: ir.Value, cameras: int) -> tuple[ir.Value, ir.Value]:
    """imgs [num_imgs 3 H W] uint8, RGB -> (a batch's images [1 1 N H W 3], float32; how many there are [1] int64)."""
    _, _, H, W = dims(imgs)
    pixels = to("Cast", imgs, like=(FLOAT, dims(imgs)), to=FLOAT)  # all that TensorRT does with bytes
    x = to("Transpose", every(to, pixels, cameras, IMAGES), like=(FLOAT, (cameras, H, W, 3)), perm=[0, 2, 3, 1])
    return to.reshaped(x, (1, 1, cameras, H, W, 3), f"{IMAGES}.batch"), _count(to, pixels, FEATURES)


def as_many(to: Nodes, features: ir.Value, count: ir.Value) -> ir.Value:
    """Features [N C H W] of all cameras -> "image_feats", those of the images that there are."""
    first, axis = (to.integers(0, name=f"{FEATURES}.{name}") for name in ("first", "axis"))
    like = (FLOAT, (ROWS[FEATURES], *dims(features)[1:]))
    return to("Slice", features, first, count, axis, like=like, name=FEATURES)


def points_of(batch: Batch) -> np.ndarray:
    """The one sample's points [P 5] float32, without padding and what is not finite."""
    assert batch.points is not None and batch.points_valid is not None
    points = batch.points[0][batch.points_valid[0]].numpy()
    return points[np.isfinite(points).all(1)]


def every(to: Nodes, x: ir.Value, cameras: int, at: str) -> ir.Value:
    """[num_imgs ...] -> [cameras ...], the last one in the place of those that are missing."""
    last = to("Sub", _count(to, x, at), to.integers(1, name=f"{at}.one"), like=(INT64, (1,)))
    place = to("Min", to.integers(*range(cameras), name=f"{at}.places"), last, like=(INT64, (cameras,)))
    assert x.dtype is not None
    return to("Gather", x, place, like=(x.dtype, (cameras, *dims(x)[1:])), axis=0)


def _count(to: Nodes, x: ir.Value, at: str) -> ir.Value:
    """The first dimension [1] int64."""
    shape = to("Shape", x, like=(INT64, (len(dims(x)),)))
    return to("Gather", shape, to.integers(0, name=f"{at}.count"), like=(INT64, (1,)), axis=0)


def depth_map(
    to: Nodes, points: ir.Value, image_from_base: ir.Value, image_aug: ir.Value, size: tuple[int, int]
) -> ir.Value:
    """The points [num_points F] in all images, as `geometry.project` and `geometry.depth_map`: [N *size] m, 0 where none falls.

    image_from_base, image_aug: [N 4 4] float32.
    """
    N, (P, F), (rows, columns) = dims(image_from_base)[0], dims(points), size
    assert isinstance(N, int)
    pixels, like = N * rows * columns, (FLOAT, (N, P))
    turned = to("Transpose", points, like=(FLOAT, (F, P)), perm=[1, 0])
    xyz = [to("Gather", turned, to.integers(i, name=f"points.{i}"), like=(FLOAT, (1, P)), axis=0) for i in range(3)]
    x, y, z = _moved(to, image_from_base, xyz, "lidar2image")
    near, far, zero, width, height = (
        to.constant(number, np.float32, f"depth_map.{name}")
        for name, number in zip(("near", "far", "zero", "width", "height"), (*FAR, 0, columns, rows))
    )
    depth = to("Min", to("Max", z, near, like=like), far, like=like)
    seen = [to("Div", x, depth, like=like), to("Div", y, depth, like=like), depth]
    u, v = _moved(to, image_aug, seen, "img_aug_matrix", rows=2)
    tests = [("GreaterOrEqual", u, zero), ("GreaterOrEqual", v, zero), ("Less", u, width), ("Less", v, height)]
    inside, *others = (to(test, axis, bound, like=(BOOL, (N, P))) for test, axis, bound in tests)
    for other in others:
        inside = to("And", inside, other, like=(BOOL, (N, P)))
    like = (INT64, (N, P))
    column, row = (
        to("Cast", to("Where", inside, axis, zero, like=(FLOAT, (N, P))), like=like, to=INT64) for axis in (u, v)
    )
    images_begin = to.constant(np.arange(N)[:, None] * (rows * columns), np.int64, "depth_map.images")
    row = to("Mul", row, to.integers(columns, name="depth_map.columns"), like=like)
    place = to("Add", to("Add", row, column, like=like), images_begin, like=like)
    place = to("Where", inside, place, to.integers(pixels, name="depth_map.outside"), like=like)
    empty = to("ConstantOfShape", to.integers(pixels + 1, name="depth_map.size"), like=(FLOAT, (pixels + 1,)))
    flat = [to.reshaped(part, (-1,), f"depth_map.{i}", ("num_pixels",)) for i, part in enumerate((place, depth))]
    made = to("ScatterElements", empty, *flat, like=(FLOAT, (pixels + 1,)), axis=0)
    cut = [to.integers(number, name=f"depth_map.cut.{i}") for i, number in enumerate((0, pixels, 0))]
    made = to("Slice", made, *cut, like=(FLOAT, (pixels,)))
    return to.reshaped(made, (N, rows, columns), DEPTH_MAP)


def _moved(to: Nodes, matrix: ir.Value, point: list[ir.Value], at: str, rows: int = 3) -> list[ir.Value]:
    """The first rows of matrix [N 4 4] times a point's planes [.. P], as `geometry.rotate` and `geometry.translate` add up."""
    N, P = dims(matrix)[0], dims(point[0])[1]
    flat = to.reshaped(matrix, (N, 16), f"{at}.flat")
    like = (FLOAT, (N, P))

    def entry(k: int) -> ir.Value:
        return to("Gather", flat, to.integers(k, name=f"{at}.{k}"), like=(FLOAT, (N, 1)), axis=1)

    made = []
    for i in range(rows):
        a, b, c = (to("Mul", entry(4 * i + j), plane, like=like) for j, plane in enumerate(point))
        total = to("Add", to("Add", a, b, like=like), c, like=like)
        made.append(to("Add", total, entry(4 * i + 3), like=like))
    return made


def pooled(to: Nodes, depth_net: ir.Value, given: dict[str, ir.Value], view: lift_splat.Config) -> ir.Value:
    """Sums of depth x context of the kept frustum points, cell by cell: [1 C X Y] float32, as `camera_grid.pool`.

    depth_net: [N D+C H W] float32, logits and context, of `lift_splat.apply`; given: the main graph's inputs by name.
    """
    N, (H, W), D, C = dims(depth_net)[0], view.grid.feature_size, view.grid.depth_bins, view.channels_out
    X, Y = view.grid.cells
    assert isinstance(N, int)
    parts = []
    for name, begin, end in (("logits", 0, D), ("context", D, D + C)):
        cut = [to.integers(number, name=f"pool.{name}.{i}") for i, number in enumerate((begin, end, 1))]
        parts.append(to("Slice", depth_net, *cut, like=(FLOAT, (N, end - begin, H, W))))
    depth = to("Softmax", parts[0], like=(FLOAT, (N, D, H, W)), axis=1)
    context = to("Transpose", parts[1], like=(FLOAT, (N, H, W, C)), perm=[0, 2, 3, 1])
    point = _kept(to, given)  # of N D H W
    like = (INT64, dims(point))
    image = to("Div", point, to.integers(D * H * W, name="pool.image"), like=like)
    area = to.integers(H * W, name="pool.area")
    rest = to("Sub", point, to("Mul", to("Div", point, area, like=like), area, like=like), like=like)
    pixel = to("Add", to("Mul", image, area, like=like), rest, like=like)  # of N H W
    weight = to(
        "Gather", to.reshaped(depth, (N * D * H * W, 1), "pool.weights"), point, like=(FLOAT, (KEPT, 1)), axis=0
    )
    seen = to("Gather", to.reshaped(context, (N * H * W, C), "pool.contexts"), pixel, like=(FLOAT, (KEPT, C)), axis=0)
    rows = to("Mul", seen, weight, like=(FLOAT, (KEPT, C)), name="pool.rows")
    made = to.tape.op(
        plugins.POOL,
        [rows, given["geom_feats"], *_intervals(to, given["ranks"])],
        plugins.pool_attributes((X, Y)),
        domain=plugins.DOMAIN,
        output=value("pool.cells", FLOAT, (1, 1, X, Y, C)),
        name=f"pool.{plugins.POOL}",
    )
    made = to.reshaped(made, (1, X, Y, C), "pool.map")
    return to("Transpose", made, like=(FLOAT, (1, C, X, Y)), perm=[0, 3, 1, 2], name=POOLED)


def _kept(to: Nodes, given: dict[str, ir.Value]) -> ir.Value:
    """Places of the kept frustum points, in the order of their cells: [num_kept]."""
    there = to("Cast", given["kept"], like=(FLOAT, dims(given["kept"])), to=FLOAT)
    places = to.reshaped(to("NonZero", there, like=(INT64, (1, KEPT))), (-1,), "pool.places", (KEPT,))
    return to("Gather", places, given["indices"], like=(INT64, (KEPT,)), axis=0)


def _intervals(to: Nodes, ranks: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Lengths and starts [cells] int32 of equal ranks, which are sorted; of none there are none."""
    before, one, end, axis = (
        to.integers(number, name=f"pool.{name}")
        for name, number in zip(("before", "one", "end", "axis"), (-1, 1, 2**31 - 1, 0))
    )
    longer = to("Concat", before, ranks, like=(INT64, ("num_kept_1",)), axis=0)
    last = to("Slice", longer, to.integers(0, name="pool.first"), before, axis, like=(INT64, (KEPT,)))
    same = to("Equal", ranks, last, like=(BOOL, (KEPT,)))
    other = to("Cast", to("Not", same, like=(BOOL, (KEPT,))), like=(FLOAT, (KEPT,)), to=FLOAT)
    cells: Dims = ("num_cells",)
    starts = to.reshaped(to("NonZero", other, like=(INT64, (1, *cells))), (-1,), "pool.starts", cells)
    ends = to("Concat", starts, _count(to, ranks, "pool"), like=(INT64, ("num_cells_1",)), axis=0)
    ends = to("Slice", ends, one, end, axis, like=(INT64, cells))
    lengths = to("Sub", ends, starts, like=(INT64, cells))
    made = [to("Cast", part, like=(INT32, cells), to=INT32) for part in (lengths, starts)]
    return made[0], made[1]


def as_given(batch: Batch, network: bevfusion.Config) -> dict[str, np.ndarray]:
    """What the node itself makes of a batch of one sample: inputs of the main graph beside the voxels, but for the features, and
    "imgs"."""
    assert network.camera is not None and network.lidar is not None
    assert batch.images is not None and batch.image_from_base is not None and batch.image_aug is not None
    grid = network.camera.view.grid
    return {
        "points": points_of(batch)[:, network.lidar.features],
        "lidar2image": batch.image_from_base[0, 0].numpy(),
        "img_aug_matrix": batch.image_aug[0, 0].numpy(),
        **sorted_cells(camera_grid.cells(batch, 0, grid).flatten().numpy(), grid.cells[1]),
        IMAGES: np.ascontiguousarray(batch.images[0, 0].permute(0, 3, 1, 2).numpy()),
    }


def sorted_cells(cell: np.ndarray, columns: int) -> dict[str, np.ndarray]:
    """Of the cells [points] of all frustum points (`camera_grid.locate`): "geom_feats", "kept", "ranks", "indices"."""
    kept = cell >= 0
    order = np.argsort(cell[kept], kind="stable")
    ranks = cell[kept][order].astype(np.int64)
    x, y = np.divmod(ranks, columns)
    cells = np.stack([x, y, np.zeros_like(x), np.zeros_like(x)], axis=1).astype(np.int32)
    return {"geom_feats": cells, "kept": kept, "ranks": ranks, "indices": order.astype(np.int64)}
