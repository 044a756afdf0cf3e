"""AWML's BEVFusion: configurations as published, Fourier features, and a step of a small one with all that is its own."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import small_steps
import test_bevfusion
import torch
from test_bevfusion import folder  # noqa: F401  a fixture

from bevfn import tree
from bevfn.layers import fourier_features
from bevfn.models import awml, bevfusion
from bevfn.training import optim

CONFIGS = Path(__file__).parents[1].parent / "shared" / "goldens" / "recipe_bevnext_awml" / "awml_configs.json"
MODELS = {
    "BEVFusion-L/bevfusion_lidar_voxel_second_secfpn_50e_8xb8_base_120m": awml.lidar,
    "BEVFusion-L/bevfusion_lidar_voxel_second_secfpn_30e_8xb8_j6gen2_base_120m": functools.partial(
        awml.lidar, intensity=True
    ),
    "BEVFusion-L-offline/bevfusion_offline_lidar_voxel_second_secfpn_30e_8xb8_j6gen2_base_120m": awml.lidar_offline,
    "BEVFusion-CL/bevfusion_camera_lidar_voxel_second_secfpn_20e_8xb8_j6gen2_base_120m": awml.camera_lidar,
    "BEVFusion-C/bevfusion_camera_swin_fpn_30e_8xb8_j6gen2_base_120m": awml.camera,
}


# ---------------------------------------------------------------------------------------------------- configurations


@functools.cache
def published(name):
    """A config file's settings, with what it takes over from its family's first."""
    if not CONFIGS.is_file():
        pytest.skip(f"{CONFIGS} is not here")
    configs = json.loads(CONFIGS.read_text())["configs"]

    def merged(base, changes):
        both = dict(base)
        for key, value in changes.items():
            nested = isinstance(value, dict) and isinstance(both.get(key), dict)
            both[key] = merged(both[key], value) if nested else value
        return both

    config = configs[f"t4dataset/{name}.py"]
    return merged(configs[config["same_as"]], config["except_for"]) if "same_as" in config else config


@pytest.mark.parametrize("name", MODELS)
def test_ranges_and_head_are_the_published_ones(name):
    config, theirs = MODELS[name](), published(name)
    head, model = config.head, theirs["model"]["bbox_head"]
    assert [*config.voxels.lower, *config.voxels.upper] == theirs["point_cloud_range"]
    assert list(config.voxels.size) == theirs["voxel_size"]
    assert list(config.sparse_grid) == theirs["grid_size"]
    assert list(awml.CLASSES) == theirs["class_names"] and head.classes == len(theirs["class_names"])
    pooled = {theirs["class_names"].index(name) for name in model["dense_heatmap_pooling_classes"]}
    assert set(head.small_classes) == set(range(head.classes)) - pooled
    assert (head.queries, head.channels, head.channels_in) == (
        model["num_proposals"], model["hidden_channel"], model["in_channels"],
    )  # fmt: skip
    decoder, coder = model["decoder_layer"], model["bbox_coder"]
    assert (head.layers, head.heads) == (model["num_decoder_layers"], decoder["cross_attn_cfg"]["num_heads"])
    assert (head.ffn_channels, head.dropout) == (
        decoder["ffn_cfg"]["feedforward_channels"], decoder["cross_attn_cfg"]["dropout"],
    )  # fmt: skip
    assert list(head.post_center_range) == coder["post_center_range"] and not coder["score_threshold"]
    assert (list(head.lower), list(head.voxel), head.stride) == (
        coder["pc_range"], coder["voxel_size"], coder["out_size_factor"],
    )  # fmt: skip
    costs, train = model["train_cfg"]["assigner"], model["train_cfg"]
    assert [head.matching.classification, head.matching.center, head.matching.iou] == [
        costs[name]["weight"] for name in ("cls_cost", "reg_cost", "iou_cost")
    ]
    assert list(head.code_weights) == train["code_weights"]
    assert (head.gaussian_overlap, head.min_radius) == (train["gaussian_overlap"], train["min_radius"])
    assert head.bbox_weight == model["loss_bbox"]["loss_weight"]


@pytest.mark.parametrize("name", MODELS)
def test_sensors_are_the_published_ones(name):
    config, theirs = MODELS[name](), published(name)["model"]
    encoder = theirs["pts_middle_encoder"]
    if encoder is None:
        assert config.lidar is None and theirs["pts_backbone"] is None and theirs["pts_neck"] is None
        assert config.backbone is None and config.neck is None and config.fuser_kernel is None
    else:
        voxels, lidar = published(name)["voxelization"], config.lidar
        assert [config.voxels.max_points, *config.voxels.max_voxels] == [
            voxels["max_num_points"],
            *voxels["max_voxels"],
        ]
        used = published(name)["lidar_sweep_dims"]  # of x, y, z, intensity, time lag
        assert list(lidar.features) == used and len(used) == encoder["in_channels"]
        waves = lidar.fourier or fourier_features.Config((), (), 0)
        assert (list(waves.lower), list(waves.upper), waves.frequencies) == (
            encoder["aug_features_min_values"], encoder["aug_features_max_values"], encoder["num_aug_features"],
        )  # fmt: skip
        assert (lidar.encoder.norm_eps, lidar.encoder.norm_momentum) == (
            encoder["norm_cfg"]["eps"], encoder["norm_cfg"]["momentum"],
        )  # fmt: skip
        assert list(config.neck.channels) == theirs["pts_neck"]["out_channels"]
    if "view_transform" not in theirs:
        assert config.camera is None
        return
    view, grid = theirs["view_transform"], config.camera.view.grid
    assert [list(bounds) for bounds in (grid.x_m, grid.y_m, grid.z_m, grid.depth_m)] == [
        view[bound] for bound in ("xbound", "ybound", "zbound", "dbound")
    ]
    assert (list(grid.image_size), list(grid.feature_size)) == (view["image_size"], view["feature_size"])
    assert config.camera.view.channels_out == view["out_channels"] and config.camera.view.lidar_depth
    assert (grid.depth_bins, grid.cells) == (129, (360, 360))
    if config.lidar is not None:
        fuser = theirs["fusion_layer"]
        assert (config.fuser_kernel, config.fused_channels) == (fuser["kernel_size"], fuser["out_channels"])
        assert fuser["kernel_size"] // 2 == fuser["padding"]


def test_on_nuscenes_the_model_is_mmdetection3ds():
    assert awml.nuscenes_lidar() == bevfusion.lidar_only()


@pytest.mark.parametrize("make", [*MODELS.values(), awml.nuscenes_lidar])
def test_a_mini_model_keeps_the_rules_of_its_model(make):
    model = make()
    mini = bevfusion.mini(model)
    assert (mini.voxels.lower, mini.voxels.upper) == (model.voxels.lower, model.voxels.upper)
    for kept in ("classes", "small_classes", "lower", "post_center_range", "code_weights"):
        assert getattr(mini.head, kept) == getattr(model.head, kept), kept
    side = [cells * mini.head.stride * size for cells, size in zip(mini.head.cells, mini.head.voxel)]
    assert side == pytest.approx([model.voxels.upper[a] - model.voxels.lower[a] for a in (0, 1)])
    assert mini.fuser_kernel == model.fuser_kernel
    assert [part is None for part in (mini.lidar, mini.camera, mini.backbone, mini.neck)] == [
        part is None for part in (model.lidar, model.camera, model.backbone, model.neck)
    ]
    if model.lidar is not None:
        assert (mini.lidar.features, mini.lidar.fourier) == (model.lidar.features, model.lidar.fourier)
    if model.camera is not None:
        ours, theirs = mini.camera.view, model.camera.view
        assert (ours.bias, ours.wide_depth_net, ours.lidar_depth) == (theirs.bias, theirs.wide_depth_net, True)
        assert ours.grid.image_size == (96, 192)
        assert (ours.grid.depth_m[0], ours.grid.depth_bins) == (theirs.grid.depth_m[0], theirs.grid.depth_bins // 2 + 1)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"fuser_kernel": None}, "the maps of two sensors need a fuser: give fuser_kernel"),
        ({"backbone": None}, "backbone and neck of the BEV map come together"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(change, what):
    with pytest.raises(ValueError, match=what):
        replace(awml.camera_lidar(), **change)


def test_an_encoder_of_other_features_is_refused():
    lidar = awml.lidar().lidar
    with pytest.raises(ValueError, match=r"the voxels have 32 features, encoder\.channels_in is 5"):
        replace(lidar, encoder=replace(lidar.encoder, channels_in=5))
    with pytest.raises(ValueError, match="fourier is of 4 features, features names 5"):
        replace(lidar, features=bevfusion.POINT_FEATURES)
    with pytest.raises(ValueError, match="no hidden layers: leave wide_depth_net off"):
        replace(awml.camera().camera.view, lidar_depth=False)


# ------------------------------------------------------------------------------------------------- Fourier features


def test_fourier_features_are_cosines_then_sines_of_doubling_frequency():
    config = fourier_features.Config(lower=(-2.0, 0.0), upper=(2.0, 10.0), frequencies=3)
    x = torch.tensor([[-2.0, 2.5], [1.0, 10.0]])
    y = fourier_features.apply(x, config)
    assert y.shape == (2, config.channels) == (2, 12)
    for row, share in zip(y, [(0.0, 0.25), (0.75, 1.0)]):
        angles = [math.pi * s * 2**k for s in share for k in range(3)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected), atol=1e-6, rtol=0)


def test_fourier_features_are_computed_in_float32():
    config = fourier_features.Config((-122.4,), (122.4,), 5)
    half = torch.linspace(-122, 122, 50).half()[:, None]
    assert torch.equal(fourier_features.apply(half, config), fourier_features.apply(half.float(), config))


@pytest.mark.parametrize(("lower", "upper"), [((0.0,), (0.0,)), ((0.0, 1.0), (2.0,))])
def test_fourier_features_of_no_range_are_refused(lower, upper):
    with pytest.raises(ValueError, match="lower < upper for every feature"):
        fourier_features.Config(lower, upper, 2)


# ------------------------------------------------------------------------------------------------------------ models


def tiny(model):
    """BEVFusion's tiny network with all that is AWML's: features, view transform, fuser, classes, attention in pieces."""
    small = test_bevfusion.tiny(
        "camera" if model.lidar is None else "lidar" if model.camera is None else "lidar-camera"
    )
    lidar, camera = small.lidar, small.camera
    if lidar is not None:
        lidar = replace(model.lidar, encoder=replace(lidar.encoder, channels_in=model.lidar.encoder.channels_in))
    if camera is not None:
        camera = replace(camera, view=replace(camera.view, lidar_depth=True, bias=False, wide_depth_net=True))
    whole = 2 * small.head.cells[0] * small.head.cells[1] * small.head.queries  # of the two heads, one at a time
    head = replace(
        small.head, classes=5, small_classes=model.head.small_classes, whole_attention=whole - 1,
        channels_in=small.head.channels_in if model.backbone else camera.view.channels_out,
    )  # fmt: skip
    return replace(
        small, lidar=lidar, camera=camera, head=head, fuser_kernel=model.fuser_kernel,
        backbone=model.backbone and small.backbone, neck=model.neck and small.neck,
    )  # fmt: skip


def batch_for(folder, model):  # noqa: F811
    batch = test_bevfusion.make_batch(folder, model)
    return replace(batch, labels=batch.labels % 5)


@functools.cache
def ran(folder, name, precision, backend):  # noqa: F811
    model = tiny(getattr(awml, name)())
    optimizer = optim.Config(lr=optim.Schedule(1e-4), eps=1.0, clip_norm=35.0)
    torch._dynamo.reset()
    return small_steps.run(bevfusion, model, batch_for(folder, model), optimizer, precision, backend, 2)


@pytest.mark.parametrize("name", ["lidar", "camera"])
def test_a_step_learns(name, folder):  # noqa: F811
    history, _ = ran(folder, name, "fp32", "eager")
    assert history[0]["num_pos"] > 0 and history[1]["loss/total"] < history[0]["loss/total"]


# In float32 the network of mmdetection3d is compiled (tests/test_bevfusion.py); here are also attention in pieces and the rest.
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "fp16"])
def test_a_compiled_step_is_the_eager_one(precision, folder):  # noqa: F811
    eager, eager_state = ran(folder, "camera_lidar", precision, "eager")
    compiled, state = ran(folder, "camera_lidar", precision, "aot_eager")
    assert eager[0]["num_pos"] > 0 and not eager[1]["skipped"]
    test_bevfusion.compare_metrics(eager, compiled, 1e-6)
    start = bevfusion.init(tiny(awml.camera_lidar()), seed=0)[0]
    small_steps.compare_leaves(start, eager_state, state, 1e-6, 1e-7)


def test_a_step_in_half_precision_is_near_the_one_in_float32(folder):  # noqa: F811
    full, half = (ran(folder, "camera_lidar", precision, "eager")[0][0] for precision in ("fp32", "fp16"))
    for name in ("loss/total", "loss/heatmap", "loss/cls", "loss/bbox"):  # the last: another query may be chosen
        assert half[name] == pytest.approx(full[name], rel=0.05 if name == "loss/bbox" else 0.02), name


def test_the_camera_models_head_reads_the_view_transform(folder):  # noqa: F811
    model = tiny(awml.camera())
    params, state = bevfusion.init(model, seed=0)
    assert params.keys() == {"camera", "head"} == state.keys()
    outputs, new = bevfusion.apply(params, state, batch_for(folder, model), config=model, train=True)
    assert outputs.keys() == {"camera", "head", "overflow"} and tree.flatten(new).keys() == tree.flatten(state).keys()
    shared = torch.nn.functional.conv2d(
        outputs["camera"]["view"]["bev"],
        params["head"]["shared"]["weight"],
        params["head"]["shared"]["bias"],
        padding=1,
    )
    torch.testing.assert_close(outputs["head"]["shared"], shared)


def test_the_encoder_reads_the_features_that_the_config_names(folder):  # noqa: F811
    model = tiny(awml.lidar())
    batch = batch_for(folder, model)
    params, state = bevfusion.init(model, seed=0)
    outputs, _ = bevfusion.apply(params, state, batch, config=model, train=False)
    other = replace(batch, points=batch.points * torch.tensor([1.0, 1.0, 1.0, 7.0, 1.0]))
    same, _ = bevfusion.apply(params, state, other, config=model, train=False)
    assert torch.equal(outputs["head"]["dense_heatmap"], same["head"]["dense_heatmap"])  # no intensity
    later = replace(batch, points=batch.points + torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1]))
    changed, _ = bevfusion.apply(params, state, later, config=model, train=False)
    assert not torch.equal(outputs["head"]["dense_heatmap"], changed["head"]["dense_heatmap"])
