"""`bevfn export --to autoware`: the plugins' nodes as each version takes them, what they compute, what the node reads, refusals."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import small_exports
import small_runs
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.tape import Tape
from small_exports import SMALL, shown

import bevfn
from bevfn import cli, geometry
from bevfn.backbones import sparse_encoder
from bevfn.export import (
    autoware,
    build,
    manifest,
    node,
    plugin_camera,
    plugin_encoder,
    plugins,
    runtimes,
    tensorrt,
    verify,
)
from bevfn.models import bevfusion
from bevfn.parity import golden
from bevfn.views import camera_grid, lift_splat

ATTRIBUTES = {  # as the creators check them, see bevfn.export.runtimes
    plugins.PAIRS: "algo batch_size dilation is_train ksize out_padding padding spatial_shape stride subm transpose",
    plugins.GEMM: "act_alpha act_beta is_subm is_train output_add_scale output_scale",
}
MODEL_PARAMETERS = (  # required by upstream's schema/ml_package_bevfusion.schema.json
    "class_names voxels_num point_cloud_range voxel_size num_proposals out_size_factor max_points_per_voxel d_bound x_bound y_bound "
    "z_bound num_cameras raw_image_height raw_image_width img_aug_scale_x img_aug_scale_y roi_height roi_width features_height "
    "features_width num_depth_features image_feature_channel use_intensity"
)
OTHERS = (  # declared by upstream's src/bevfusion_node.cpp at 0bbbdec besides, without a default that will do
    "max_camera_lidar_delay plugins_path onnx_path engine_path trt_precision image_backbone_onnx_path image_backbone_engine_path "
    "image_backbone_trt_precision densification_world_frame_id densification_num_past_frames iou_nms_search_distance_2d "
    "iou_nms_threshold allow_remapping_by_area_matrix min_area_matrix max_area_matrix cloud_capacity circle_nms_dist_threshold "
    "yaw_norm_thresholds model_params run_image_undistortion"
)


def export(monkeypatch, *arguments) -> int:
    return small_exports.export(monkeypatch, *arguments, "--to", "autoware")


@pytest.fixture(scope="module")
def exported(trained, frame, tmp_path_factory) -> Path:
    """Of the newest runtime, by the command."""
    out = tmp_path_factory.mktemp("export") / "out"
    with pytest.MonkeyPatch.context() as patch:
        assert export(patch, trained, "--out", out, "--data", frame) == 0
    return out


@pytest.fixture(scope="module")
def older(frame, tmp_path_factory):
    """(graph, its map, eagerly, the model's parameters) of runtime 2.7, of a model that reads Fourier features without
    intensities; not its boxes, since nobody trained it and which of equal scores are the highest is left open."""
    run = small_runs.write(tmp_path_factory.mktemp("run") / "run", "awml-lidar", **SMALL)
    made, batch = shown(bevfn.load(run), frame)
    return *built(made, batch, "2.7"), node.of_model(made, None, batch)


def built(made, batch, runtime: str):
    """(graph, its map, the eager one)."""
    plugins.register()
    eager = build.eager(made, batch)
    file = ir.to_proto(autoware.model(made, batch, eager, runtimes.RUNTIMES[runtime]))
    onnx.checker.check_model(file, full_check=True)
    tensorrt.check(file, frozenset({plugins.DOMAIN}))
    found = autoware.run(file, autoware.voxels(batch, made.task.network), ())
    return file, found[autoware.MAP], eager[autoware.MAP]


def nodes(file: Path | onnx.ModelProto, operator: str) -> list[onnx.NodeProto]:
    model = file if isinstance(file, onnx.ModelProto) else onnx.load(file / build.FILE)
    return [made for made in model.graph.node if made.op_type == operator]


def values(made: onnx.NodeProto) -> dict:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in made.attribute}


def shapes(given) -> dict[str, tuple]:
    """{name: (dtype, dimensions)} of a graph's inputs or outputs."""
    tensors = {value.name: value.type.tensor_type for value in given}
    return {n: (t.elem_type, [d.dim_param or d.dim_value for d in t.shape.dim]) for n, t in tensors.items()}


def yaml(path: Path) -> dict:
    """A file of parameters; values are JSON."""
    head, second, *lines = path.read_text().splitlines()
    assert (head, second) == ("/**:", "  ros__parameters:")
    pairs = (line.removeprefix("    ").partition(": ") for line in lines)
    return {name: json.loads(given) for name, _, given in pairs}


# --- the file


def test_inputs_and_outputs_are_the_nodes_with_a_dynamic_number_of_voxels(exported):
    model = onnx.load(exported / build.FILE)
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 18), (plugins.DOMAIN, 1)}
    assert shapes([*model.graph.input, *model.graph.output]) == {
        "voxels": (TensorProto.FLOAT, ["voxels_num", 10, 5]),
        "coors": (TensorProto.INT32, ["voxels_num", 3]),
        "num_points_per_voxel": (TensorProto.INT32, ["voxels_num"]),
        "bbox_pred": (TensorProto.FLOAT, [10, 100]),
        "score": (TensorProto.FLOAT, [100]),
        "label_pred": (TensorProto.INT64, [100]),
    }


def test_the_newer_plugins_get_one_node_a_table_and_norms_and_relus_inside(exported):
    pairs, gemms = nodes(exported, plugins.PAIRS), nodes(exported, plugins.GEMM)
    assert (len(pairs), len(gemms)) == (6, 10)  # of the mini encoder: three levels of a block; 8 and 21 as published
    assert all(set(values(made)) == {*ATTRIBUTES[plugins.PAIRS].split(), "do_sort"} for made in pairs)
    assert all(set(values(made)) == {*ATTRIBUTES[plugins.GEMM].split(), "act_type"} for made in gemms)
    assert all(len(made.input) == 6 for made in gemms) and {values(made)["do_sort"] for made in pairs} == {0}
    assert Counter(values(made)["act_type"] for made in gemms) == {
        1: 7,
        0: 3,
    }  # a block's second sum has its ReLU behind
    assert len({made.input[0] for made in pairs if values(made)["subm"]}) == 3
    grids = [list(values(made)["spatial_shape"]) for made in pairs if values(made)["subm"]]
    assert grids == [[384, 384, 41], [192, 192, 21], [96, 96, 10]]
    assert not nodes(exported, "BatchNormalization")


def test_the_published_encoder_has_8_pair_nodes_for_21_convolutions():
    """Where AWML writes a pair node for each."""
    config, made = bevfusion.lidar_only(), ir.Graph([], [], nodes=[], opset_imports={"": 18, plugins.DOMAIN: 1})
    params, state = sparse_encoder.init(config.lidar.encoder, torch.Generator().manual_seed(0))
    given = plugin_encoder.inputs(config.voxels.max_points, len(config.lidar.features))
    how = {"config": config.lidar.encoder, "fourier": config.lidar.fourier, "grid": config.sparse_grid}
    to = plugin_encoder.Nodes(Tape(made))
    plugin_encoder.write(to, *given, params, state, **how, runtime=runtimes.RUNTIMES["2.8"], half=False)
    written = Counter(found.op_type for found in made)
    assert (written[plugins.PAIRS], written[plugins.GEMM]) == (8, 21)


def test_the_older_plugins_get_their_eleven_and_six_attributes_and_an_add(older):
    file, bev, eager, _ = older
    pairs, gemms = nodes(file, plugins.PAIRS), nodes(file, plugins.GEMM)
    assert all(set(values(made)) == set(ATTRIBUTES[plugins.PAIRS].split()) for made in pairs)
    assert all(set(values(made)) == set(ATTRIBUTES[plugins.GEMM].split()) for made in gemms)
    assert all(len(made.input) == 5 for made in gemms)
    added = {name for made in nodes(file, "Add") for name in made.input}
    assert {made.output[0] for made in gemms} <= added
    assert 0 < verify.error(bev, eager) < 1e-5
    plugins.check(file, runtimes.RUNTIMES["2.7"])
    with pytest.raises(ValueError, match="the plugins take no GetIndicePairsImplicitGemm of 1 inputs"):
        plugins.check(file, runtimes.RUNTIMES["2.8"])


def test_the_file_is_the_detector_for_any_voxels_in_any_order(exported):
    """Fewer voxels than it was made with; sites are the same set, so the map is the same."""
    file = onnx.load(exported / build.FILE)
    example = np.load(exported / build.EXAMPLE)
    given = {name: example[name] for name in autoware.INPUTS}
    drawn = np.random.default_rng(0).permutation(len(given["coors"]))[:500]
    mixed = autoware.run(file, {name: value[drawn] for name, value in given.items()}, ())
    sorted_ = autoware.run(file, {name: value[np.sort(drawn)] for name, value in given.items()}, ())
    whole = autoware.run(file, given, ())
    assert np.allclose(mixed[autoware.MAP], sorted_[autoware.MAP], atol=1e-5)
    assert not np.allclose(mixed[autoware.MAP], whole[autoware.MAP], atol=1e-3)
    assert all(np.array_equal(whole[name], example[name]) for name in autoware.OUTPUTS)


def test_half_precision_has_its_filters_as_halves_and_the_map_is_near(frame, tmp_path):
    """Of a model that reads points' features as they are, for T4's classes."""
    run = small_runs.write(tmp_path / "run", "awml-lidar-offline", **SMALL)
    made, batch = shown(bevfn.load(run, precision="fp16"), frame)
    file, bev, eager = built(made, batch, "2.8")
    parameters = node.of_model(made, None, batch)
    assert parameters["use_intensity"] is True and len(parameters["class_names"]) == 5
    kinds = {held.name: held.data_type for held in file.graph.initializer if held.name.startswith("lidar.")}
    assert {kind for name, kind in kinds.items() if name.endswith((".filters", ".bias"))} == {TensorProto.FLOAT16}
    assert bev.dtype == np.float16 and 0 < verify.error(bev, eager) < 3e-2


def test_the_voxels_of_the_example_are_the_voxelizers(trained, frame):
    """With more points than a voxel holds, points outside, and more voxels than there is room for."""
    made, batch = shown(bevfn.load(trained), frame)
    drawn = torch.Generator().manual_seed(0)
    points = torch.rand(1, 3000, 5, generator=drawn) ** 3 * torch.tensor([6.0, 6.0, 3.0, 255.0, 0.1])
    points[0, 7] = 1000.0
    network = made.task.network
    network = replace(network, voxels=replace(network.voxels, max_voxels=(400, 400)))
    crowded = replace(batch, points=points, points_valid=torch.rand(1, 3000, generator=drawn) < 0.9)
    found = autoware.voxels(crowded, network)
    expected, overflow = bevfusion.voxelise(crowded.points, crowded.points_valid, network.voxels, train=False)
    assert overflow["voxels_l0"] > 0 and found["num_points_per_voxel"].max() == 10
    assert found["voxels"].shape == (400, 10, 5)
    means = found["voxels"].sum(1) / found["num_points_per_voxel"][:, None]
    assert np.allclose(means, expected["features"][0], rtol=1e-5)
    assert np.array_equal(found["coors"][:, ::-1], expected["coords"][0])


# --- what the node reads


def test_the_parameters_are_those_that_the_node_asks_for(exported, older, trained):
    model, own = yaml(exported / node.MODEL_FILE), yaml(exported / node.NODE_FILE)
    remapper = yaml(exported / node.REMAPPER_FILE)
    network = bevfn.load(trained).task.network
    assert set(model) == set(MODEL_PARAMETERS.split())
    assert {*own, *remapper} == {*OTHERS.split(), "score_threshold"} and not {*own} & {
        *remapper
    }  # one is of older nodes
    assert {len(given) for given in remapper.values()} == {8 * 8}  # square, of the message's labels
    kinds = {name: {type(value) for value in given} for name, given in remapper.items()}  # ROS tells 0 from 0.0
    assert kinds.pop("allow_remapping_by_area_matrix") == {int} and [*kinds.values()] == [{float}, {float}]
    assert not any(remapper["allow_remapping_by_area_matrix"])
    assert model["voxels_num"] == [1, 10_000, 20_000] and model["use_intensity"] is True
    assert model["point_cloud_range"] == [-54.0, -54.0, -5.0, 54.0, 54.0, 3.0] and model["num_proposals"] == 100
    assert model["out_size_factor"] * model["voxel_size"][0] * network.head.cells[0] == pytest.approx(108)
    assert model["class_names"][0] == "CAR" and "MOTORCYCLE" in model["class_names"] and len(model["class_names"]) == 10
    assert own["trt_precision"] == "fp32" and own["onnx_path"].endswith(build.FILE)
    assert own["densification_num_past_frames"] == 1 and len(own["yaw_norm_thresholds"]) == 10
    thresholds = own["model_params"]["detection_score_thresholds"]
    assert set(thresholds["min_confidence_scores"]) == set(model["class_names"])
    assert thresholds["distance_bin_upper_limits"] == [77.0]
    *_, awml = older
    assert awml["use_intensity"] is False and awml["class_names"] == ["CAR", "TRUCK", "BUS", "BICYCLE", "PEDESTRIAN"]


def test_the_farthest_corner_of_the_range_is_within_reach(trained, frame):
    """Whichever it is: the node gives a score of 0 to all that is beyond."""
    assert node.farthest_m((-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)) == 77.0
    assert (
        node.farthest_m((-100.0, -50.0, -5.0, 50.0, 50.0, 3.0)) == 112.0
    )  # 111.8, where the upper corner is 70.7 away
    assert node.farthest_m((0.0, -40.0, -3.0, 70.4, 40.0, 1.0)) == 81.0
    assert node.farthest_m((-90.0, -30.0, -3.0, -10.0, 20.0, 1.0)) == 95.0
    made, batch = shown(bevfn.load(trained), frame)
    model = node.of_model(made, None, batch) | {"point_cloud_range": [-100.0, -50.0, -5.0, 50.0, 50.0, 3.0]}
    own = node.of_node(made, model, build.FILE, "")
    assert own["model_params"]["detection_score_thresholds"]["distance_bin_upper_limits"] == [112.0]


def test_boxes_are_as_the_node_computes_them():
    """By hand, from its kernel's lines."""
    pred = np.zeros((10, 1), np.float32)
    pred[:, 0] = [10.5, 20.0, 1.0, np.log(4.0), np.log(2.0), np.log(1.5), 1.0, 0.0, 3.0, -1.0]
    model = {
        "point_cloud_range": [-54.0, -50.0, -5.0, 54.0, 54.0, 3.0],
        "voxel_size": [0.1, 0.2, 0.2],
        "out_size_factor": 8,
    }
    found = node.detections({"bbox_pred": pred, "score": np.ones(1), "label_pred": np.ones(1)}, model)
    assert np.allclose(found["boxes"][0, 0], [-45.6, -18.0, 0.25, 4.0, 2.0, 1.5, np.pi / 2, 3.0, -1.0], atol=1e-5)


def test_the_manifest_says_what_was_compared(exported):
    said = json.loads((exported / manifest.NAME).read_text())
    assert sorted(path.name for path in exported.iterdir()) == sorted(
        ["example.npz", "manifest.json", "model.onnx", node.MODEL_FILE, node.NODE_FILE, node.REMAPPER_FILE]
    )
    assert [entry["name"] for entry in said["inputs"]] == list(autoware.INPUTS)
    assert all(entry["shape"][0] == "voxels_num" for entry in said["inputs"])
    about = said["autoware"]
    assert about["runtime"] == "2.8" and about["plugins"] == {plugins.PAIRS: 6, plugins.GEMM: 10}
    levels = ["conv_input", "stages.0", "stages.1", "conv_out"]
    assert list(about["sites_of_example"]) == [f"lidar.{level}.coords" for level in levels]
    assert all(0 < count < runtimes.ROOM for count in about["sites_of_example"].values())
    room = said["capacities"]
    assert (room["sites"], room["voxels"]) == (runtimes.ROOM, 20_000) and "points" not in room  # voxels go in
    errors = said["verified"]["boundaries"]
    assert said["verified"]["boxes"]["found"] == 100 and said["verified"]["failed"] == ""
    assert {"voxels.features", "lidar.conv_input.features", "lidar.stages.0.coords", autoware.MAP, "bev.neck"} <= set(
        errors
    )
    assert errors["lidar.stages.0.coords"] == 0 and 0 < max(errors.values()) < 1e-4


# --- cameras: what is written by hand, as bevfn computes it


CAMERAS = 3
VIEW = lift_splat.Config(
    channels_in=8,
    channels_out=5,
    grid=camera_grid.Config(
        image_size=(16, 24),
        stride=8,
        depth_m=(1.0, 9.0, 2.0),
        x_m=(-8.0, 8.0, 4.0),
        y_m=(-6.0, 6.0, 3.0),
        z_m=(-10.0, 10.0, 20.0),
        rows="x",
    ),
)


def alone(write, *names: str, **others: ir.Value) -> onnx.ModelProto:
    """A graph of what `write(to, inputs)` gives, whose inputs are those of these names and others."""
    made = ir.Graph([], [], nodes=[], opset_imports={"": 18, plugins.DOMAIN: plugins.VERSION}, name="part")
    given = plugin_camera.inputs(5, (8, 2, 3)) | others
    end = write(plugin_encoder.Nodes(Tape(made)), given)
    made.inputs.extend(given[name] for name in (*names, *others))
    made.outputs.append(end)
    made.sort()
    file = ir.to_proto(ir.Model(made, ir_version=10))
    plugins.register()
    onnx.checker.check_model(file, full_check=True)
    tensorrt.check(file, frozenset({plugins.DOMAIN}))
    return file


def test_depth_maps_are_bevfns_bit_for_bit_and_the_last_camera_stands_in_for_those_that_are_missing(tmp_path):
    drawn = torch.Generator().manual_seed(0)
    points = (torch.rand(1, 500, 5, generator=drawn) - 0.5) * 40
    image_from_base = torch.eye(4).repeat(1, CAMERAS, 1, 1)
    image_from_base[..., :3, :3] = torch.tensor([[10.0, 0.0, 12.0], [0.0, 10.0, 8.0], [0.0, 0.0, 1.0]])
    image_from_base[..., :3, :] += torch.rand(1, CAMERAS, 3, 4, generator=drawn) / 4
    image_aug = torch.eye(4).repeat(1, CAMERAS, 1, 1)
    image_aug[..., 0, 0] = image_aug[..., 1, 1] = 0.7
    image_aug[..., 1, 3] = -2
    seen = geometry.project(
        points,
        undo_base_aug=torch.eye(3)[None],
        base_aug=torch.eye(4)[None],
        image_from_base=image_from_base,
        image_aug=image_aug,
    )
    expected = geometry.depth_map(seen, torch.ones(1, 500, dtype=torch.bool), VIEW.grid.image_size)[0].numpy()

    def write(to, given):
        matrices = [plugin_camera.every(to, given[name], CAMERAS, name) for name in plugin_camera.MATRICES]
        return plugin_camera.depth_map(to, given["points"], *matrices, VIEW.grid.image_size)

    onnx.save(alone(write, "points", *plugin_camera.MATRICES), tmp_path / build.FILE)

    def found(cameras: int) -> np.ndarray:
        matrices = dict(zip(plugin_camera.MATRICES, (image_from_base[0, :cameras], image_aug[0, :cameras])))
        given = {name: value.numpy() for name, value in matrices.items()} | {"points": points[0].numpy()}
        return verify.run(tmp_path / build.FILE, given)[plugin_camera.DEPTH_MAP]

    assert (expected > 0).sum() > 50 and np.array_equal(found(CAMERAS), expected)
    assert np.array_equal(found(2), expected[[0, 1, 1]])


def test_features_are_pooled_as_bevfn_pools_them():
    """Also where no frustum point is in the grid."""
    (H, W), D, C, (X, Y) = VIEW.grid.feature_size, VIEW.grid.depth_bins, VIEW.channels_out, VIEW.grid.cells
    drawn = torch.Generator().manual_seed(0)
    x = torch.rand(CAMERAS, D + C, H, W, generator=drawn)
    net = plugin_encoder.value(plugin_camera.DEPTH_NET, ir.DataType.FLOAT, (CAMERAS, D + C, H, W))
    names = ("kept", "geom_feats", "ranks", "indices")
    file = alone(lambda to, given: plugin_camera.pooled(to, net, given, VIEW), *names, **{plugin_camera.DEPTH_NET: net})
    evaluator = ReferenceEvaluator(file, new_ops=list(plugins.MEANINGS))
    (pool,) = nodes(file, plugins.POOL)
    assert values(pool) == {"batch_size": 1, "dimension": 1, "height": X, "width": Y} and len(pool.input) == 4
    cells = torch.randint(-1, X * Y, (1, CAMERAS, D, H, W), generator=drawn, dtype=torch.int32)
    for cell in (cells, torch.full_like(cells, -1)):
        expected = camera_grid.pool(x[:, :D].softmax(1), x[:, D:], cell, VIEW.grid).numpy()
        given = plugin_camera.sorted_cells(cell.flatten().numpy(), Y)
        (found,) = evaluator.run(None, {plugin_camera.DEPTH_NET: x.numpy(), **given})
        assert found.shape == expected.shape and np.allclose(found, expected, atol=1e-6)
    assert not expected.any()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_model_with_cameras_is_two_files_that_the_node_binds(precision, frame, monkeypatch, tmp_path):
    run = small_runs.write(tmp_path / "run", "bevfusion-lidar-camera", **SMALL).parent.parent
    out = tmp_path / "out"
    assert export(monkeypatch, run, "--out", out, "--data", frame, "--precision", precision) == 0
    said, own, model = (
        json.loads((out / manifest.NAME).read_text()),
        yaml(out / node.NODE_FILE),
        yaml(out / node.MODEL_FILE),
    )
    assert set(model) == set(MODEL_PARAMETERS.split()) and model["num_cameras"] == 6
    assert (model["raw_image_height"], model["raw_image_width"]) == (90, 160)
    assert (
        own["image_backbone_onnx_path"].endswith(autoware.IMAGES_FILE)
        and own["image_backbone_trt_precision"] == precision
    )
    assert said["autoware"]["plugins"][plugins.POOL] == 1
    backbone, main = onnx.load(out / autoware.IMAGES_FILE), onnx.load(out / build.FILE)
    H, W, rows, columns = (model[f"{part}_{side}"] for part in ("features", "roi") for side in ("height", "width"))
    assert shapes(backbone.graph.input) == {"imgs": (TensorProto.UINT8, ["num_imgs", 3, rows, columns])}
    features = {"image_feats": (TensorProto.FLOAT, ["num_imgs", model["image_feature_channel"], H, W])}
    assert shapes(backbone.graph.output) == features
    assert shapes(main.graph.input) == features | {
        "voxels": (TensorProto.FLOAT, ["voxels_num", 10, 5]),
        "coors": (TensorProto.INT32, ["voxels_num", 3]),
        "num_points_per_voxel": (TensorProto.INT32, ["voxels_num"]),
        "points": (TensorProto.FLOAT, ["num_points", 5]),
        "lidar2image": (TensorProto.FLOAT, ["num_imgs", 4, 4]),
        "img_aug_matrix": (TensorProto.FLOAT, ["num_imgs", 4, 4]),
        "geom_feats": (TensorProto.INT32, ["num_kept", 4]),
        "kept": (TensorProto.BOOL, ["num_geom_feats"]),
        "ranks": (TensorProto.INT64, ["num_kept"]),
        "indices": (TensorProto.INT64, ["num_kept"]),
    }
    assert list(shapes(main.graph.output)) == list(autoware.OUTPUTS)
    fewer = np.load(out / build.EXAMPLE)["imgs"][:4]
    found = verify.run(out / autoware.IMAGES_FILE, {"imgs": fewer})["image_feats"]
    assert np.allclose(
        found, np.load(out / build.EXAMPLE)["image_feats"][:4], atol=1e-2 if precision == "fp16" else 1e-5
    )


def test_cameras_of_several_sizes_are_refused(frame, tmp_path):
    made, batch = shown(bevfn.load(small_runs.write(tmp_path / "run", "bevfusion-lidar-camera", **SMALL)), frame)
    with pytest.raises(ValueError, match="takes images of one size; the cameras of this key frame have several"):
        node.of_model(made, None, batch)


# --- what TensorRT takes


def graph(*made: onnx.NodeProto, opset: int = 18, kind: int = TensorProto.FLOAT, k: int = 5) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, kind, None) for name in ("x", "y"))
    held = [helper.make_tensor("k", TensorProto.INT64, [1], [k])]
    return helper.make_model(
        helper.make_graph(list(made), "g", [x], [y], held), opset_imports=[helper.make_opsetid("", opset)]
    )


ADDED = helper.make_node("ScatterND", ["x", "k", "x"], ["y"], reduction="add")
TOP = helper.make_node("TopK", ["x", "k"], ["y", "i"])
REFUSED = {
    "it has no such operator": graph(helper.make_node("Unique", ["x"], ["y"])),
    "it knows no reduction": graph(ADDED),
    "it takes 3840 at most": graph(TOP, k=4000),
    "its input 1 is no constant": graph(helper.make_node("TopK", ["x", "x"], ["y", "i"])),
    "not of type DOUBLE": graph(helper.make_node("Relu", ["x"], ["y"]), kind=TensorProto.DOUBLE),
    "not of type BOOL": graph(helper.make_node("Equal", ["x", "x"], ["y"]), kind=TensorProto.BOOL),
    "takes opsets 9 to 20, not 21": graph(TOP, opset=21),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_tensorrts_parser_does_not_take_is_named(why):
    with pytest.raises(ValueError, match=why):
        tensorrt.check(REFUSED[why], frozenset())
    tensorrt.check(graph(TOP), frozenset())


# --- refusals: one sentence, nothing left


def refused(monkeypatch, capsys, says: str, *arguments) -> None:
    small_exports.refused(monkeypatch, capsys, says, *arguments, "--to", "autoware")


def test_what_is_wrong_is_one_sentence_and_nothing_is_written(trained, exported, frame, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    given = (trained, "--out", out, "--data", frame)
    refused(monkeypatch, capsys, "exists and is not empty; choose another --out", trained, "--out", exported)
    refused(monkeypatch, capsys, "runtime 2.9 is unknown; choose one of 2.7, 2.8", *given, "--runtime", "2.9")
    refused(monkeypatch, capsys, "--input is of the other kinds", *given, "--input", "voxels")
    for flag, *values in (("--voxel-capacity", 99_999_999_999), ("--site-capacity", 256_001, 15_000, 9_000)):
        says = f"{flag} {values[0]} must be at least 1 and at most 256000, the room of autoware's plugins"
        refused(monkeypatch, capsys, says, *given, flag, *values)
    crowded = small_runs.write(tmp_path / "crowded", small_exports.LIDAR, **SMALL | {"voxel_capacity": 300_000})
    says = "--voxel-capacity 300000 must be at least 1 and at most 256000"  # of the run, without the flag
    refused(monkeypatch, capsys, says, crowded, "--out", out, "--data", frame)
    assert [path.name for path in tmp_path.iterdir()] == ["crowded"]
    monkeypatch.setattr(sys, "argv", ["bevfn", "export", *map(str, given), "--runtime", "2.7"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--runtime is of --to autoware; leave it out" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("bevdepth-1key-ema", "bevdepth-1key-ema has no sparse encoder"),
        ("bevfusion-camera", "bevfusion-camera has no sparse encoder"),
    ],
)
def test_a_model_that_the_node_does_not_run_is_refused(model, says, frame, monkeypatch, capsys, tmp_path):
    run = small_runs.write(tmp_path / "run", model).parent.parent
    refused(monkeypatch, capsys, says, run, "--out", tmp_path / "out", "--data", frame)
    assert not (tmp_path / "out").exists()


def test_more_sites_than_the_plugins_have_room_for_are_refused(monkeypatch):
    monkeypatch.setattr(plugins, "ROOM", 3)
    sites = torch.tensor([[0, x, 0, 0] for x in range(0, 16, 4)], dtype=torch.int32)
    way = plugins.pair_attributes(
        runtimes.RUNTIMES["2.8"],
        grid=(16, 1, 1),
        kernel=(1, 1, 1),
        stride=(2, 1, 1),
        padding=(0, 0, 0),
        submanifold=False,
    )
    with pytest.raises(ValueError, match="4 sites of a level are beyond the 3"):
        plugins.pairs(sites, way)


def test_sites_that_the_detector_drops_and_the_plugins_keep_are_refused(trained, frame, monkeypatch, capsys, tmp_path):
    says = "sites of the verified key frame do not fit --site-capacity 500 400 300, and the graph"
    given = (trained, "--out", tmp_path / "out", "--data", frame, "--site-capacity", 500, 400, 300)
    refused(monkeypatch, capsys, says, *given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "factor", "says"),
    [
        ([0, 1, 2, 4, 3, 5, 6, 7, 8, 9], 1, "in size by"),  # length and width
        ([0, 1, 2, 3, 4, 5, 7, 6, 8, 9], 1, "in yaw by"),  # sine and cosine
        ([0, 1, 2, 3, 4, 5, 6, 7, 9, 8], 1, "in velocity by"),
        ([*range(10)], 0.01, "in score by"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_outputs_that_the_node_would_read_otherwise_are_refused(rows, factor, says, precision, exported):
    """They are no boundary: what guards them are the boxes that the node makes of them."""
    example, model = np.load(exported / build.EXAMPLE), yaml(exported / node.MODEL_FILE)
    right = {name: example[name] for name in autoware.OUTPUTS}
    wrong = right | {"bbox_pred": right["bbox_pred"][rows], "score": right["score"] * np.float32(factor)}
    ours, eager = (node.detections(given, model) for given in (wrong, right))
    assert verify.compare(eager, eager, eager, autoware.FOUND, precision).failed == ""
    assert says in verify.compare(ours, eager, eager, autoware.FOUND, precision).failed


def test_a_file_that_differs_is_not_left(trained, frame, monkeypatch, capsys, tmp_path):
    """Plugins that leave out a ReLU."""
    honest = plugins.gemm
    monkeypatch.setattr(plugins, "gemm", lambda *given, relu: honest(*given, relu=False))
    assert export(monkeypatch, trained, "--out", tmp_path / "out", "--data", frame) == 1
    assert "refused, nothing is written: lidar.conv_input.features differs by" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# --- published sizes


@pytest.mark.slow
@pytest.mark.parametrize("runtime", runtimes.RUNTIMES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "case", ["bevfusion_lidar", "awml_bevfusion_l_offline", "bevfusion_lidar_cam", "awml_bevfusion_cl"]
)
def test_a_published_model_is_exported_with_golden_weights(case, precision, runtime, monkeypatch, tmp_path):
    folder = Path(__file__).parents[2] / "shared" / "goldens" / case
    if not folder.is_dir():
        pytest.skip("golden weights are made from ../shared/goldens, which is not here")
    torch.save(golden.fill_case(folder), tmp_path / "golden.pth")
    out = tmp_path / "out"
    how = ("--runtime", runtime, "--precision", precision)
    assert export(monkeypatch, tmp_path / "golden.pth", "--out", out, *how) == 0
    said = json.loads((out / manifest.NAME).read_text())
    pool = {plugins.POOL: 1} if said["cameras"] else {}
    assert said["autoware"]["plugins"] == {plugins.PAIRS: 8, plugins.GEMM: 21, **pool}
    if precision == "fp32":
        assert said["verified"]["boxes"]["largest_m"] < 0.05
