"""Published checkpoints: every key accounted for, exact round trips, refusals in one clear sentence."""

import os
import pickle
import random
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from small_weights import shrunk, small, upstream_state
from torch import Tensor

from bevfn import catalogue, tree, upstream
from bevfn.commands import checkpoint
from bevfn.models import awml, bevdepth, bevfusion, bevnext
from bevfn.parity import golden
from bevfn.training import pretrained
from bevfn.upstream import checkpoints, names_awml, recognise, storage
from bevfn.upstream.entries import Naming

CASES = Path(__file__).parents[1].parent / "shared" / "goldens"


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert sorted(a) == sorted(b)
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def case(name: str) -> Path:
    if not (CASES / name).is_dir():
        pytest.skip(f"{CASES / name} is not here")
    return CASES / name


# --- names and round trips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", upstream.CHECKPOINTS)
def test_export_inverts_import_bit_for_bit(model):
    source = upstream_state(model)
    params, state, report = upstream.import_state(source, model, config=small(model))
    back = upstream.export_state(params, state, model, report.carried, config=small(model), prefix=report.prefix)
    assert list(back) == list(source)  # upstream's order too
    assert_same(back, source)
    keys = {key.removeprefix(report.prefix) for key in source}
    assert set(report.used) | set(report.unused) == keys and not set(report.used) & set(report.unused)
    assert not (report.missing or report.initial or report.mismatched or report.unknown or report.warnings)


@pytest.mark.parametrize("model", ["bevfusion-lidar", "bevfusion-lidar-camera"])
def test_published_manifests_are_accounted_for_and_round_trip(model):
    folder = case(catalogue.MODELS[model].case)
    source = golden.fill_case(folder)
    assert len(source) == {"bevfusion-lidar": 306, "bevfusion-lidar-camera": 566 + 16}[model]
    params, state, report = upstream.import_state(source, model)
    assert set(report.used) | set(report.unused) == set(source) and not report.warnings
    learned = [key for key in source if not key.endswith(("num_batches_tracked", "relative_position_index"))]
    assert set(report.used) == {key for key in learned if key.rpartition(".")[2] not in ("dx", "bx", "nx", "frustum")}
    assert set(report.carried) == {key for key in source if key.endswith("num_batches_tracked")}
    back = upstream.export_state(params, state, model, report.carried)
    assert_same(back, source)


@pytest.mark.parametrize(("folder", "model"), [("bevdepth_r50_2key", "bevdepth-2key"), ("matrixvt_r50", "matrixvt")])
def test_lightning_manifests_of_bevdepth_are_accounted_for_and_round_trip(folder, model):
    source = golden.fill_case(case(folder))
    specs = golden.read_manifest(case(folder))["constructor_buffers"]
    buffers = {f"model.{key}": leaf for key, leaf in checkpoints.buffers(model).items()}
    assert {k: (list(leaf.shape), str(leaf.dtype)) for k, leaf in buffers.items()} == {
        k: (spec["shape"], f"torch.{spec['dtype']}") for k, spec in specs.items()
    }
    source |= buffers
    params, state, report = upstream.import_state(source, model)
    assert report.prefix == "model." and not report.warnings
    assert set(report.used) | set(report.unused) == {key.removeprefix("model.") for key in source}
    back = upstream.export_state(params, state, model, report.carried, prefix=report.prefix)
    assert_same(back, source)


@pytest.mark.parametrize(("folder", "leaves", "counts"), [("bevnext_stage1", 770, 127), ("bevnext_stage2", 889, 152)])
def test_manifests_of_bevnext_are_accounted_for_and_round_trip(folder, leaves, counts):
    source = golden.fill_case(case(folder))
    params, state, report = upstream.import_state(source, folder.replace("_", "-"))
    assert not report.warnings and (len(report.used), len(report.unused)) == (leaves, counts)
    back = upstream.export_state(params, state, folder.replace("_", "-"), report.carried)
    assert list(back) == list(source)
    assert_same(back, source)


def test_a_detectors_resnet_starts_bevnext():
    """As FCOS3D's and the nuImages detectors' files have it: below `backbone.`, beside a neck and heads."""
    source = upstream_state("resnet50-detector") | {"neck.fpn_convs.0.conv.weight": torch.zeros(4)}
    found = recognise.recognise(source)
    assert (found.model, found.prefix) == ("resnet50-detector", "backbone.")
    params, state, report = upstream.import_state(source, found.model, config=small(found.model))
    assert report.unused["neck.fpn_convs.0.conv.weight"] == "outside 'backbone.', where the model is"
    initial = bevnext.init(small(found.model), seed=0)
    rest = ("image.neck", "view", "bev", "head")
    merged, statistics, _ = upstream.load_into(*initial, {"fcos3d.pth": (params, state)}, allow_missing=rest)
    stem = merged["image"]["backbone"]["stem"]
    assert torch.equal(stem["conv"]["weight"], source["backbone.conv1.weight"])
    seen = statistics["image"]["backbone"]["stages"][3][2]["layers"][2]["norm"]["var"]
    assert torch.equal(seen, source["backbone.layer4.2.bn3.running_var"])


def test_the_ema_file_of_a_bevnext_is_read(tmp_path):
    source = upstream_state("bevnext-stage1")
    path = tmp_path / "epoch_2_ema.pth"
    torch.save({"epoch": 2, "state_dict": source, "updates": 14420}, path)
    params, _, report = upstream.import_state(
        upstream.read_state_dict(path), "bevnext-stage1", config=small("bevnext-stage1")
    )
    assert not report.missing
    assert torch.equal(params["view"]["crf"]["strength"], source["img_view_transformer.crf.ws.0"])
    assert torch.equal(
        params["head"]["refine"]["rows"], source["transformer_neck.positional_encoding.row_embed.weight"]
    )


@pytest.mark.parametrize("model", [name for name, spec in upstream.CHECKPOINTS.items() if spec.family is bevdepth])
def test_frames_of_a_bevdepth_are_read_off_its_bev_map(model):
    prefix = "" if model == "resnet50" else "model."
    found = recognise.recognise({prefix + key: leaf for key, leaf in upstream_state(model).items()})
    assert (found.model, found.prefix) == (model, prefix)


def test_nine_key_frames_are_named_but_not_read():
    source = upstream_state("bevdepth-2key")
    source["head.trunk.conv1.weight"] = torch.zeros(4, 9 * 32, 7, 7)
    with pytest.raises(ValueError, match=r"looks like a BEVDepth detector of 9 key frames, .*: bevfn reads"):
        upstream.import_state(source, "bevdepth-2key", config=small("bevdepth-2key"))


def test_a_lightning_file_is_read_beside_its_training_log(tmp_path):
    source = {f"model.{key}": leaf for key, leaf in upstream_state("bevdepth-2key").items()}
    path = tmp_path / "23.ckpt"
    log = {"epoch": 23, "callbacks": {"ModelCheckpoint": {"best_model_score": None}}, "hyper_parameters": {"gpus": 8}}
    torch.save({"state_dict": source, "optimizer_states": [{"state": {}}], "lr_schedulers": [], **log}, path)
    params, state, report = upstream.import_state(
        upstream.read_state_dict(path), "bevdepth-2key", config=small("bevdepth-2key")
    )
    assert not report.missing and len(report.used) == len(tree.leaves(params)) + len(tree.leaves(state))
    gate = source["model.backbone.depth_net.context_se.conv_expand.weight"]
    assert torch.equal(params["view"]["depth_net"]["context_gate"]["expand"]["weight"], gate)
    fine = source["model.backbone.img_neck.deblocks.1.0.weight"]  # a transposed convolution of size 1
    assert torch.equal(params["image"]["neck"]["blocks"][1]["conv"]["weight"], fine.transpose(0, 1))


def test_torchvisions_resnet_starts_a_detector():
    """resnet50-0676ba61.pth has the classifier and, being older than batch counts, none of those."""
    source = {k: v for k, v in upstream_state("resnet50").items() if not k.endswith("num_batches_tracked")}
    source |= {"fc.weight": torch.zeros(1000, 128), "fc.bias": torch.zeros(1000)}
    params, _, report = upstream.import_state(source, "resnet50", config=small("resnet50"))
    assert report.unused == dict.fromkeys(("fc.weight", "fc.bias"), "classification head of the pre-training")
    assert torch.equal(params["image"]["backbone"]["stages"][0][0]["shortcut"]["conv"]["weight"],
                       source["layer1.0.downsample.0.weight"])  # fmt: skip
    model = bevdepth.init(small("resnet50"), seed=0)
    listed = {e.name for e in checkpoints.entries("resnet50", config=small("resnet50")) if e.tree != "upstream"}
    ours = {f"params.{path}" for path in tree.flatten(model[0]) if path.startswith("image.backbone.")}
    assert {name for name in listed if name.startswith("params.")} == ours


# --- AWML's releases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "model", "derived"),
    [("awml_bevfusion_l_offline", "awml-lidar-offline", 0), ("awml_bevfusion_cl", "awml-camera-lidar", 16)],
)
def test_manifests_of_awml_are_accounted_for_and_round_trip(folder, model, derived):
    source = golden.fill_case(case(folder))
    params, state, report = upstream.import_state(source, model)
    assert set(report.used) | set(report.unused) == set(source) and not report.warnings
    empty = {key for key, leaf in source.items() if leaf.shape == (0,)}
    assert {key.rpartition(".")[2] for key in empty} == {"aug_features_min_values", "aug_features_max_values"}
    assert sum("derived" in reason for reason in report.unused.values()) == derived
    back = upstream.export_state(params, state, model, report.carried, naming=report.naming)
    assert_same(back, source)


def older(config):
    """A small CL as AWML released it up to 2.0: without intensity, a fuser of 3 x 3, mmdetection3d's depth net."""
    lidar, view = config.lidar, config.camera.view
    lidar = bevfusion.Lidar(replace(lidar.encoder, channels_in=4), features=(0, 1, 2, 4))
    camera = replace(config.camera, view=replace(view, bias=True, wide_depth_net=False))
    return replace(config, lidar=lidar, camera=camera, fuser_kernel=3)


@pytest.mark.parametrize("release", [older, lambda config: config])
@pytest.mark.parametrize("naming", ["mmdet", "net"])
@pytest.mark.parametrize("sparse", ["spconv2", "mmcv"])
def test_a_fusion_model_of_every_release_naming_and_layout_round_trips(release, naming, sparse, monkeypatch):
    model = "awml-camera-lidar"
    source = upstream_state(model, naming, sparse, release(small(model)))
    monkeypatch.setitem(checkpoints.CHECKPOINTS, model, shrunk(model))
    source |= {f"pts_middle_encoder.aug_features_{end}_values": torch.zeros(0) for end in ("min", "max")}
    assert any("depthnet.net." in key for key in source) == (naming == "net")
    params, state, report = upstream.import_state(source, model)
    assert (report.naming, report.sparse) == (naming, sparse)
    assert set(report.used) | set(report.unused) == set(source)
    assert bool(report.warnings) == (release is older)
    assert all("of another release than the published" in line for line in report.warnings)
    back = upstream.export_state(params, state, model, report.carried, naming=naming, sparse=sparse)
    assert_same(back, source)


def test_a_lidar_model_from_before_fourier_features_is_the_online_or_the_offline_one(monkeypatch):
    source = upstream_state("awml-lidar-offline")
    for model in ("awml-lidar", "awml-lidar-offline"):
        monkeypatch.setitem(checkpoints.CHECKPOINTS, model, shrunk(model))
    assert recognise.recognise(source).alike == ("awml-lidar",)
    for model in ("awml-lidar", "awml-lidar-offline"):
        params, state, report = upstream.import_state(source, model)
        assert report.model == model and params["lidar"]["conv_input"]["conv"]["weight"].shape[3] == 5
        assert bool(report.warnings) == (model == "awml-lidar")
        assert_same(upstream.export_state(params, state, model, report.carried), source)


def test_bounds_of_fourier_features_are_the_configurations(monkeypatch):
    source = upstream_state("awml-lidar")
    monkeypatch.setitem(checkpoints.CHECKPOINTS, "awml-lidar", shrunk("awml-lidar"))
    assert source["pts_middle_encoder.exponents"].tolist() == [1.0, 2.0, 4.0, 8.0]
    source["pts_middle_encoder.aug_features_max_values"][0] = 100.0
    params, state, report = upstream.import_state(source, "awml-lidar")
    assert (
        len(report.warnings) == 1 and "aug_features_max_values differs from the configuration's" in report.warnings[0]
    )
    assert_same(upstream.export_state(params, state, "awml-lidar", report.carried), source)


def test_a_release_with_intensity_and_one_with_other_depths_are_told_by_their_widths():
    entry = {"pts_middle_encoder.conv_input.0.weight": torch.empty(16, 3, 3, 3, 50)}
    assert names_awml.fitted(awml.lidar(), entry) == awml.lidar(intensity=True)
    for bins, depth in ((95, (1.0, 134.0, 1.4)), (118, (1.0, 166.2, 1.4))):
        last = {"view_transform.depthnet.6.weight": torch.empty(bins + 80, 256, 1, 1)}
        grid = names_awml.fitted(awml.camera_lidar(), last).camera.view.grid
        assert (grid.depth_m, grid.depth_bins) == (depth, bins)
    assert names_awml.fitted(awml.camera(), {}) == awml.camera()


def test_awmls_lidar_model_on_nuscenes_is_mmdetection3ds():
    empty = {f"pts_middle_encoder.aug_features_{end}_values": torch.zeros(0) for end in ("min", "max")}
    source = upstream_state("bevfusion-lidar") | empty
    params, state, report = upstream.import_state(source, "bevfusion-lidar", config=small("bevfusion-lidar"))
    assert {report.unused[key] for key in empty} == {"bounds of Fourier features, which this model has none of"}
    back = upstream.export_state(
        params, state, "bevfusion-lidar", report.carried, config=small("bevfusion-lidar")
    )  # fmt: skip
    assert_same(back, source)


def test_leaves_land_where_the_contract_says():
    source = upstream_state("bevfusion-lidar-camera")
    params, state, _ = upstream.import_state(source, "bevfusion-lidar-camera", config=small("bevfusion-lidar-camera"))
    block = params["camera"]["backbone"]["stages"][1]["blocks"][1]
    key = "img_backbone.stages.1.blocks.1."
    assert torch.equal(block["attn"]["bias_table"], source[key + "attn.w_msa.relative_position_bias_table"])
    assert torch.equal(block["mlp"]["fc2"]["bias"], source[key + "ffn.layers.1.bias"])
    kernel = params["lidar"]["stages"][0]["blocks"][0]["conv2"]["weight"]  # kx ky kz in out
    theirs = source["pts_middle_encoder.encoder_layers.encoder_layer1.0.conv2.weight"]  # out kx ky kz in
    assert kernel[0, 1, 2, 3, 1] == theirs[1, 0, 1, 2, 3]
    position = params["head"]["decoder"][0]["cross_position"]
    prefix = "bbox_head.decoder.0.cross_posembed.position_embedding_head."
    assert torch.equal(position["fc1"]["weight"], source[prefix + "0.weight"][..., 0])
    assert torch.equal(position["fc2"]["bias"], source[prefix + "3.bias"])
    assert torch.equal(state["head"]["decoder"][0]["cross_position"]["norm"]["var"], source[prefix + "1.running_var"])
    norm = state["bev"]["backbone"]["blocks"][1][1]["norm"]
    assert torch.equal(norm["mean"], source["pts_backbone.blocks.1.4.running_mean"])
    depth_net = params["camera"]["view"]["depth_net"]
    assert torch.equal(depth_net[2]["conv"]["bias"], source["view_transform.depthnet.6.bias"])


@pytest.mark.parametrize("model", upstream.CHECKPOINTS)
def test_every_leaf_of_a_whole_model_has_an_upstream_key_and_not_of_one_that_a_part_starts(model):
    spec = upstream.CHECKPOINTS[model]
    with torch.device("meta"):
        params, state = spec.family.init(spec.config(), seed=0)
    ours = {f"params.{path}": tuple(leaf.shape) for path, leaf in tree.flatten(params).items()}
    ours |= {f"state.{path}": tuple(leaf.shape) for path, leaf in tree.flatten(state).items()}
    listed = [entry for entry in checkpoints.entries(model) if entry.tree != "upstream"]
    assert ({entry.name: entry.shape for entry in listed} == ours) == (model not in catalogue.PARTS)


def test_imported_leaves_do_not_share_memory_with_the_checkpoint():
    source = upstream_state("bevfusion-lidar")
    params, state, report = upstream.import_state(source, "bevfusion-lidar", config=small("bevfusion-lidar"))
    for leaf in [*tree.leaves(params), *tree.leaves(state), *report.carried.values()]:
        leaf.zero_()
    assert_same(source, upstream_state("bevfusion-lidar"))


def test_mmcv_and_spconv_kernels_give_the_same_model_and_export_their_own_layout():
    spconv = upstream_state("bevfusion-lidar")
    mmcv = {key: t.permute(1, 2, 3, 4, 0).contiguous() if t.dim() == 5 else t for key, t in spconv.items()}
    one, state, report = upstream.import_state(spconv, "bevfusion-lidar", config=small("bevfusion-lidar"))
    two, _, other = upstream.import_state(mmcv, "bevfusion-lidar", config=small("bevfusion-lidar"))
    assert (report.sparse, other.sparse) == ("spconv2", "mmcv")
    assert_same(tree.flatten(one), tree.flatten(two))
    back = upstream.export_state(
        two, state, "bevfusion-lidar", other.carried, config=small("bevfusion-lidar"), sparse="mmcv"
    )
    assert_same(back, mmcv)


@pytest.mark.parametrize(("model", "has"), [("bevfusion-lidar", True), ("bevdepth-2key", False)])
def test_the_layout_of_sparse_kernels_is_said_where_a_model_has_some(model, has):
    _, _, report = upstream.import_state(upstream_state(model), model, config=small(model))
    assert ("sparse kernels spconv2" in report.text()) == has


def test_sparse_kernels_of_two_layouts_are_refused():
    source = upstream_state("bevfusion-lidar")
    key = "pts_middle_encoder.conv_out.0.weight"
    source[key] = source[key].permute(1, 2, 3, 4, 0).contiguous()
    with pytest.raises(ValueError, match=r"two layouts: .*conv_input.0.weight is \[out kx .*conv_out.0.weight is \[kx"):
        upstream.import_state(source, "bevfusion-lidar", config=small("bevfusion-lidar"))


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "model", "message"),
    [
        (
            "bevfusion-lidar",
            "bevfusion-lidar-camera",
            "looks like a LiDAR-only BEVFusion.*use --model bevfusion-lidar[.]",
        ),
        (
            "bevfusion-lidar-camera",
            "bevfusion-lidar",
            r"camera \+ LiDAR BEVFusion.*use --model bevfusion-lidar-camera[.]",
        ),
        ("swin-nuimages", "bevfusion-lidar-camera", "looks like a Swin backbone.*use --model swin-nuimages[.]"),
        (["encoders.lidar.backbone.x"], "bevfusion-lidar", "original MIT repository.*: bevfn reads"),
        (
            "bevdepth-1key",
            "bevdepth-2key",
            "BEVDepth detector of 1 key frame, not like bevdepth-2key: use --model bevdepth-1",
        ),
        (
            "matrixvt",
            "bevdepth-1key",
            "looks like a MatrixVT detector, not like bevdepth-1key: use --model matrixvt[.]",
        ),
        (
            "awml-lidar",
            "bevfusion-lidar",
            "looks like an AWML BEVFusion-L detector, not like .*use --model awml-lidar[.]",
        ),
        ("awml-camera-lidar", "awml-camera", "an AWML BEVFusion-CL detector.*use --model awml-camera-lidar[.]"),
        ("awml-camera", "awml-camera-lidar", "an AWML BEVFusion-C detector.*use --model awml-camera[.]"),
        ("awml-lidar", "awml-lidar-offline", "an AWML BEVFusion-L detector, not like.*use --model awml-lidar[.]"),
        ("bevdepth-2key", "matrixvt", "BEVDepth detector of 2 key frames.*use --model bevdepth-2key[.]"),
        ("bevdepth-2key-da", "bevdepth-2key", "with depth aggregation.*use --model bevdepth-2key-da[.]"),
        ("resnet50", "bevdepth-2key", "looks like an ImageNet ResNet-50.*use --model resnet50[.]"),
        (
            "bevnext-stage1",
            "bevnext-stage2",
            r"BEVNeXt detector of stage 1 \(one frame\).*use --model bevnext-stage1[.]",
        ),
        ("bevnext-stage2", "bevnext-stage1", r"stage 2 \(frames fused\).*use --model bevnext-stage2[.]"),
        ("resnet50-detector", "resnet50", "a detector of mmdetection on a ResNet-50.*use --model resnet50-detector[.]"),
        (["pts_bbox_head.task_heads.0.x"], "bevfusion-lidar", "CenterPoint or BEVDet family"),
        (["layer1.0.conv1.weight", "fc.weight"], "swin-nuimages", "looks like a ResNet"),
        (["stem.weight", "tail.bias"], "swin-nuimages", "a model with the parts stem, tail"),
    ],
)
def test_a_checkpoint_of_another_model_is_named(keys, model, message):
    source = upstream_state(keys) if isinstance(keys, str) else dict.fromkeys(keys, torch.zeros(1))
    with pytest.raises(ValueError, match=message):
        upstream.import_state(source, model, config=small(model))


def test_missing_unknown_and_mismatched_keys_are_named_together():
    source = upstream_state("bevfusion-lidar")
    del source["bbox_head.shared_conv.weight"]
    source["pts_neck.deblocks.1.0.weight"] = torch.zeros(6, 5, 2, 2)
    source["pts_backbone.blocks.2.0.weight"] = torch.zeros(1)
    with pytest.raises(upstream.Refused) as refused:
        upstream.import_state(source, "bevfusion-lidar", config=small("bevfusion-lidar"))
    message = str(refused.value)
    assert "lacks bbox_head.shared_conv.weight (our params.head.shared.weight)" in message
    assert "pts_neck.deblocks.1.0.weight is [6, 5, 2, 2] where the model has [64, 32, 2, 2]" in message
    assert "holds pts_backbone.blocks.2.0.weight, which this model does not have" in message
    report = refused.value.report
    assert report.missing == {"params.head.shared.weight": "bbox_head.shared_conv.weight"}
    assert report.unknown == ["pts_backbone.blocks.2.0.weight"]
    text = report.text()
    assert "missing    params.head.shared.weight" in text and "mismatched pts_neck" in text


def test_a_deeper_swin_of_the_same_width_is_refused():
    config = small("swin-nuimages")
    backbone = replace(config.camera.backbone, depths=(2, 3, 2, 2))  # Swin-S to our Swin-T
    config = replace(config, camera=replace(config.camera, backbone=backbone))
    deeper = checkpoints.entries("swin-nuimages", config=config)
    source = {entry.key: torch.zeros(entry.shape) for entry in deeper}
    with pytest.raises(ValueError, match=r"holds stages\.1\.blocks\.2\..*which this model does not have"):
        upstream.import_state(source, "swin-nuimages", config=small("swin-nuimages"))


def test_a_bias_table_of_another_window_is_named():
    source = upstream_state("swin-nuimages")
    source["stages.0.blocks.0.attn.w_msa.relative_position_bias_table"] = torch.zeros(25, 1)
    with pytest.raises(ValueError, match=r"table is \[25, 1\] where the model has \[49, 1\] \(another window size\)"):
        upstream.import_state(source, "swin-nuimages", config=small("swin-nuimages"))


def test_export_names_missing_foreign_and_misshapen_leaves():
    params, state, report = upstream.import_state(
        upstream_state("bevfusion-lidar"), "bevfusion-lidar", config=small("bevfusion-lidar")
    )

    def export(params):
        upstream.export_state(params, state, "bevfusion-lidar", report.carried, config=small("bevfusion-lidar"))

    with pytest.raises(ValueError, match=r"params.head.shared.weight is missing"):
        export({**params, "head": {**params["head"], "shared": {"bias": params["head"]["shared"]["bias"]}}})
    with pytest.raises(ValueError, match=r"bevfusion-lidar has no params.fuser.weight"):
        export({**params, "fuser": {"weight": torch.zeros(1)}})
    with pytest.raises(ValueError, match=r"params.head.shared.bias is \[3\] where bevfusion-lidar has \[32\]"):
        export({**params, "head": {**params["head"], "shared": {**params["head"]["shared"], "bias": torch.zeros(3)}}})


# --- derived buffers and types -----------------------------------------------------------------------------------


def test_a_frustum_of_another_camera_warns_and_still_exports_as_it_was():
    source = upstream_state("bevfusion-lidar-camera")
    source["view_transform.frustum"] = source["view_transform.frustum"] + 0.5
    params, state, report = upstream.import_state(
        source, "bevfusion-lidar-camera", config=small("bevfusion-lidar-camera")
    )
    (warning,) = report.warnings
    assert warning == "view_transform.frustum differs from the configuration's by up to 0.5, bevfn uses its own"
    back = upstream.export_state(
        params, state, "bevfusion-lidar-camera", report.carried, config=small("bevfusion-lidar-camera")
    )
    assert torch.equal(back["view_transform.frustum"], source["view_transform.frustum"])


def test_derived_buffers_follow_the_manifest_rules():
    found = checkpoints.buffers("bevfusion-lidar-camera")
    index = found["img_backbone.stages.2.blocks.3.attn.w_msa.relative_position_index"]
    (qi, qj), (ki, kj) = (2, 5), (6, 1)
    assert index[qi * 7 + qj, ki * 7 + kj] == 13 * (qi - ki + 6) + (qj - kj + 6)
    frustum = found["view_transform.frustum"]  # D H W 3
    x, y = np.linspace(0, 703, 88, dtype=np.float32), np.linspace(0, 255, 32, dtype=np.float32)
    np.testing.assert_allclose(frustum[100, 31, 40].numpy(), [x[40], y[31], 51.0], rtol=1e-6)
    assert found["view_transform.dx"].tolist() == pytest.approx([0.3, 0.3, 20.0])
    assert found["view_transform.bx"].tolist() == pytest.approx([-53.85, -53.85, 0.0])
    assert found["view_transform.nx"].tolist() == [360, 360, 1]


def test_half_precision_weights_become_float32_and_say_so():
    source = upstream_state("bevfusion-lidar")
    source["bbox_head.shared_conv.bias"] = source["bbox_head.shared_conv.bias"].half()
    params, _, report = upstream.import_state(source, "bevfusion-lidar", config=small("bevfusion-lidar"))
    assert params["head"]["shared"]["bias"].dtype == torch.float32
    assert report.warnings == ["bbox_head.shared_conv.bias is float16 and becomes float32"]


# --- Swin --------------------------------------------------------------------------------------------------------


def test_original_swin_patch_merging_is_reordered_to_unfold_order():
    source = upstream_state("swin-nuimages", "original")
    params, _, report = upstream.import_state(source, "swin-nuimages", config=small("swin-nuimages"))
    assert report.naming == "original"
    ours = params["camera"]["backbone"]["stages"][0]["downsample"]
    x = torch.randn(1, 4, 6, 16)  # B H W C
    blocks = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]  # the original's order
    norm = source["layers.0.downsample.norm.weight"], source["layers.0.downsample.norm.bias"]
    want = F.layer_norm(torch.cat(blocks, -1), (64,), *norm) @ source["layers.0.downsample.reduction.weight"].T
    patches = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)  # B 6 4C, channel-major
    got = F.layer_norm(patches, (64,), ours["norm"]["weight"], ours["norm"]["bias"]) @ ours["reduction"]["weight"].T
    torch.testing.assert_close(got.reshape(want.shape), want)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_original_swin_round_trips_with_its_masks_and_head(prefix):
    source = upstream_state("swin-nuimages", "original")
    source["layers.1.blocks.1.attn_mask"] = torch.randn(4, 4, 4)
    source["head.weight"], source["norm.bias"] = torch.randn(3, 16), torch.randn(16)
    file = {prefix + key: leaf for key, leaf in source.items()}
    outside = {"rpn_head.rpn_conv.weight": torch.zeros(1)} if prefix else {}
    params, state, report = upstream.import_state(file | outside, "swin-nuimages", config=small("swin-nuimages"))
    assert state == {} and report.prefix == prefix
    assert report.unused["head.weight"] == "classification head of the pre-training"
    assert all("outside 'backbone.'" in report.unused[key] for key in outside)
    back = upstream.export_state(
        params,
        state,
        "swin-nuimages",
        report.carried,
        config=small("swin-nuimages"),
        naming=report.naming,
        prefix=report.prefix,
    )
    assert_same(back, file)


def test_imagenet_swin_leaves_the_output_norms_at_init():
    source = {key: t for key, t in upstream_state("swin-nuimages", "original").items() if key[:4] != "norm"}
    params, _, report = upstream.import_state({**source}, "swin-nuimages", config=small("swin-nuimages"))
    assert "out_norms" not in params["camera"]["backbone"]
    assert report.initial["params.camera.backbone.out_norms.0.weight"] == "norm1.weight"
    assert "at init    params.camera.backbone.out_norms.0.weight (no norm1.weight)" in report.text()


# --- merging -----------------------------------------------------------------------------------------------------


def small_trees() -> tuple[dict, dict]:
    params, state, _ = upstream.import_state(
        upstream_state("bevfusion-lidar-camera"), "bevfusion-lidar-camera", config=small("bevfusion-lidar-camera")
    )
    return tree.map(torch.zeros_like, params), tree.map(torch.zeros_like, state)


def load(model: str, naming: Naming = "mmdet") -> tuple[dict, dict]:
    return upstream.import_state(upstream_state(model, naming), model, config=small(model))[:2]


def test_lidar_detector_and_swin_merge_into_the_camera_model():
    params, state = small_trees()
    loaded = {"lidar.pth": load("bevfusion-lidar"), "swin.pth": load("swin-nuimages", "original")}
    new = ("camera.neck", "camera.view", "fuser")
    filled, filled_state, merge = upstream.load_into(params, state, loaded, allow_missing=new)
    assert torch.equal(filled["head"]["shared"]["weight"], loaded["lidar.pth"][0]["head"]["shared"]["weight"])
    norm = filled_state["lidar"]["conv_out"]["norm"]
    assert torch.equal(norm["var"], loaded["lidar.pth"][1]["lidar"]["conv_out"]["norm"]["var"])
    swin = "params.camera.backbone.stages.1.blocks.0.attn.bias_table"
    assert merge.filled[swin] == "swin.pth" and merge.filled["state.head.heatmap.hidden.norm.mean"] == "lidar.pth"
    assert {name.split(".", 1)[1].rsplit(".", 1)[0].split(".")[0] for name in merge.initial} == {"camera", "fuser"}
    assert not filled["fuser"]["conv"]["weight"].any()
    assert set(merge.filled) | set(merge.initial) == {f"params.{p}" for p in tree.flatten(params)} | {
        f"state.{p}" for p in tree.flatten(state)
    }
    assert not any(leaf.any() for leaf in tree.leaves(params))  # the given trees stay as they were
    assert tree.diff(filled, params) == []
    assert "tensors from swin.pth" in merge.text() and "tensors of camera.view at init" in merge.text()


def test_merge_refuses_gaps_overlaps_and_other_models():
    params, state = small_trees()
    lidar = load("bevfusion-lidar")
    with pytest.raises(ValueError, match=r"no checkpoint of lidar.pth holds params.camera.*path in allow_missing"):
        upstream.load_into(params, state, {"lidar.pth": lidar}, allow_missing=("fuser", "camera.nec"))
    with pytest.raises(ValueError, match=r"both a and b hold params.lidar.conv_input.conv.weight"):
        upstream.load_into(params, state, {"a": lidar, "b": lidar}, allow_missing=("camera", "fuser"))
    with pytest.raises(ValueError, match=r"x holds params.extra, which the model lacks"):
        upstream.load_into(params, state, {"x": ({"extra": torch.zeros(1)}, {})}, allow_missing=("camera",))
    with pytest.raises(ValueError, match=r"params.fuser.norm.weight is \[3\] in x but \[128\] in the model"):
        upstream.load_into(params, state, {"x": ({"fuser": {"norm": {"weight": torch.zeros(3)}}}, {})})


def test_a_relative_gives_what_fits_and_the_rest_is_named():
    ours = {"a": {"w": torch.zeros(2, 3), "b": torch.zeros(2)}, "new": torch.full((4,), 7.0)}, {"n": torch.zeros(1)}
    theirs = {"a": {"w": torch.ones(2, 3), "b": torch.ones(5)}, "old": torch.ones(1)}, {"n": torch.ones(1)}
    params, state, merge = upstream.load_into(*ours, {"x": theirs}, allow_missing=("a", "new"), fitting_only=True)
    assert bool(params["a"]["w"].all()) and not params["a"]["b"].any() and bool(state["n"].all())
    assert torch.equal(params["new"], ours[0]["new"])
    assert merge.filled == {"params.a.w": "x", "state.n": "x"} and merge.absent == ["params.new"]
    assert merge.reshaped == {"params.a.b": "is [5] in x, [2] in the model"} and merge.unused == {"params.old": "x"}
    for sentence in (
        "at init, params.a.b is [5] in x, [2] in the model", "at init, params.new is in no file", "unused, params.old of x",
        "2 of 4 tensors have their shape there, 1 another one, 1 are absent; 1 of the files' are not used",
    ):  # fmt: skip
        assert sentence in merge.text().splitlines()
    with pytest.raises(ValueError, match=r"params.a.b is \[5\] in x but \[2\] in the model"):
        upstream.load_into(*ours, {"x": theirs}, allow_missing=("a", "new"))


# --- files -------------------------------------------------------------------------------------------------------


class Malicious:
    """Creates the file it is given when unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_a_file_that_pickles_code_is_refused_and_nothing_runs(tmp_path, container):
    file, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {"state_dict": upstream_state("bevfusion-lidar"), "meta": Malicious(trace)}
    if container == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps({"meta": Malicious(trace)}, protocol=2))
    with pytest.raises(ValueError, match=r"evil\.pth holds .* besides tensors, which.*weights_only=False"):
        checkpoint.import_(file, tmp_path / "out.safetensors", model="bevfusion-lidar")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pth"]


def test_an_mmengine_training_log_beside_the_weights_is_skipped_unread(tmp_path, monkeypatch):
    # The class mmengine pickles, under its name; its own code must not run when the file is read.
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self._log_history, self.max_length = np.arange(3.0), 1000

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = upstream_state("bevfusion-lidar")
    log = {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {"lr": np.float64(0.1)}}
    torch.save({"meta": {"epoch": 20}, "state_dict": source, "message_hub": log}, tmp_path / "a.pth")
    for name in (module.__name__, "mmengine.logging", "mmengine"):
        monkeypatch.delitem(sys.modules, name)
    allowed = set(torch.serialization.get_safe_globals())
    assert_same(upstream.read_state_dict(tmp_path / "a.pth"), source)
    assert set(torch.serialization.get_safe_globals()) == allowed  # the permission does not outlive the call


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    whole, file = tmp_path / f"whole{suffix}", tmp_path / f"half{suffix}"
    upstream.write_state_dict(whole, upstream_state("bevfusion-lidar"), sparse="spconv2")
    for size in (0, 7, whole.stat().st_size // 2, whole.stat().st_size - 100):
        file.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(ValueError, match=rf"half\{suffix} is not a complete .* again"):
            checkpoint.import_(file, tmp_path / "out.safetensors", model="bevfusion-lidar")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("nesting", ["state_dict", "model", None])
def test_state_dict_is_found_at_every_level(tmp_path, nesting):
    source = upstream_state("swin-nuimages")
    torch.save({nesting: source, "epoch": 1} if nesting else source, tmp_path / "a.pth")
    assert_same(upstream.read_state_dict(tmp_path / "a.pth"), source)


def test_files_without_a_state_dict_are_named(tmp_path):
    file = tmp_path / "a.pth"
    with pytest.raises(ValueError, match=r"a\.pth: no such checkpoint file"):
        upstream.read_state_dict(file)
    file.write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"a\.pth is not a torch checkpoint: it begins with b'<html>no'"):
        upstream.read_state_dict(file)
    torch.save([torch.zeros(1)], file)
    with pytest.raises(ValueError, match=r"a\.pth holds no state dict"):
        upstream.read_state_dict(file)
    torch.save({"state_dict": {"epoch": 3}}, file)
    with pytest.raises(ValueError, match=r"a\.pth: entry 'epoch' of the state dict is a int, not a tensor"):
        upstream.read_state_dict(file)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_import_and_export_commands_give_back_the_published_file(tmp_path, suffix, capsys):
    folder = case("bevfusion_lidar")
    source = golden.fill_case(folder)
    published, imported, exported = tmp_path / f"in{suffix}", tmp_path / "ours.safetensors", tmp_path / f"out{suffix}"
    upstream.write_state_dict(published, source, sparse="spconv2")
    checkpoint.import_(published, imported, model="bevfusion-lidar")
    assert "used       262 tensors" in capsys.readouterr().out
    read = upstream.read_imported(imported)
    assert (read.model, read.source, read.sparse) == ("bevfusion-lidar", published.name, "spconv2")
    names_in_file = set(safetensors.torch.load_file(imported))
    assert "params.head.shared.weight" in names_in_file and "state.fuser.norm.mean" not in names_in_file
    checkpoint.export(imported, exported)
    assert "tensors of bevfusion-lidar, sparse kernels spconv2" in capsys.readouterr().out
    assert_same(upstream.read_state_dict(exported), source)
    checkpoint.show(imported)
    checkpoint.show(exported)
    shown = capsys.readouterr().out
    assert "bevfusion-lidar, imported from in" in shown and "params.head.shared" in shown
    assert "import it with --model bevfusion-lidar" in shown


def test_a_file_imported_under_a_former_name_of_its_model_is_read(tmp_path):
    params, state, report = upstream.import_state(
        upstream_state("bevfusion-lidar-camera"),
        "bevfusion-lidar-camera",
        config=small("bevfusion-lidar-camera"),
    )
    report.model = "bevfusion-lidar-cam"
    upstream.write_imported(tmp_path / "old.safetensors", params, state, report, source="a.pth")
    assert upstream.read_imported(tmp_path / "old.safetensors").model == "bevfusion-lidar-camera"


def test_exported_pth_records_the_version_that_keeps_upstream_from_permuting_kernels(tmp_path):
    source = upstream_state("bevfusion-lidar")
    upstream.write_state_dict(tmp_path / "a.pth", source, sparse="spconv2")
    stored = torch.load(tmp_path / "a.pth", weights_only=True)["state_dict"]
    assert stored._metadata["pts_middle_encoder.conv_input.0"] == {"version": 2}
    upstream.write_state_dict(tmp_path / "b.pth", source, sparse="mmcv")
    assert not hasattr(torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"], "_metadata")


def test_a_refused_import_leaves_the_old_output_and_prints_the_report(tmp_path, capsys):
    source = upstream_state("bevfusion-lidar")  # small, so the published sizes do not fit
    torch.save(source, tmp_path / "a.pth")
    (tmp_path / "out.safetensors").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"a\.pth: the checkpoint does not fit --model bevfusion-lidar: .*; and \d+"):
        checkpoint.import_(tmp_path / "a.pth", tmp_path / "out.safetensors", model="bevfusion-lidar")
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"
    assert "mismatched bbox_head.shared_conv.weight: [32, 64, 3, 3] where the model has" in capsys.readouterr().out


# --- values that no weight can have ------------------------------------------------------------------------------

WEIGHT, VARIANCE = "bbox_head.shared_conv.bias", "pts_backbone.blocks.0.1.running_var"


def holding(key: str, change) -> dict[str, Tensor]:
    source = upstream_state("bevfusion-lidar")
    return source | {key: change(source[key])}


def with_first(value: float):
    return lambda leaf: torch.cat([torch.tensor([value], dtype=leaf.dtype), leaf[1:]])


@pytest.mark.parametrize(
    "key, change, what",
    [
        (WEIGHT, with_first(float("nan")), "NaN or infinite"),
        (WEIGHT, with_first(-float("inf")), "NaN or infinite"),
        (WEIGHT, lambda leaf: leaf.double() * 1e300, "NaN or infinite"),
        (VARIANCE, with_first(float("nan")), "NaN or infinite"),
        (VARIANCE, with_first(-1e-3), "negative, which no variance is"),
        (WEIGHT, lambda leaf: leaf > 0, "of type bool, which no weight is"),
        (WEIGHT, lambda leaf: leaf.int(), "of type int32, which no weight is"),
        (WEIGHT, lambda leaf: leaf.to(torch.complex64), "of type complex64, which no weight is"),
        (VARIANCE, lambda leaf: leaf.long(), "of type int64, which no weight is"),
        ("pts_backbone.blocks.0.1.num_batches_tracked", lambda leaf: leaf + 0.5, "float32 7.5, where a batch norm's count"),
        ("pts_backbone.blocks.0.1.num_batches_tracked", lambda leaf: -leaf, "int64 -7, where a batch norm's count"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_value_that_no_weight_can_have_is_named_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, key, change, what, suffix
):
    monkeypatch.setitem(checkpoints.CHECKPOINTS, "bevfusion-lidar", shrunk("bevfusion-lidar"))
    upstream.write_state_dict(tmp_path / f"a{suffix}", holding(key, change), sparse="spconv2")
    with pytest.raises(ValueError, match=f"{key} is {what}"):
        checkpoint.import_(tmp_path / f"a{suffix}", tmp_path / "out.safetensors", model="bevfusion-lidar")
    assert not (tmp_path / "out.safetensors").exists()
    assert f"mismatched {key}: {what}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "leaf, what",
    [(torch.ones(2), None), (torch.zeros(0), None), (torch.tensor([1.0, float("nan")]), "NaN or infinite"),
     (torch.tensor([-0.0]), None), (torch.tensor(-1e-30), "negative, which no variance is"),
     (torch.ones(1, dtype=torch.int64), "of type int64, which no weight is")],
)  # fmt: skip
def test_what_a_variance_cannot_be(leaf, what):
    assert upstream.impossible("state.head.norm.var", leaf) == what
    assert upstream.impossible("params.head.variance", torch.tensor(-1.0)) is None


# --- imported files ----------------------------------------------------------------------------------------------


@pytest.fixture
def imported(tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoints.CHECKPOINTS, "bevfusion-lidar", shrunk("bevfusion-lidar"))
    params, state, report = upstream.import_state(upstream_state("bevfusion-lidar"), "bevfusion-lidar")
    upstream.write_imported(tmp_path / "a.safetensors", params, state, report, source="a.pth")
    return tmp_path / "a.safetensors"


def test_a_flipped_bit_of_an_imported_file_is_found_wherever_it_is(imported):
    whole, draw = imported.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [
        *range(8),
        *(draw.randrange(header) for _ in range(150)),
        *(draw.randrange(len(whole)) for _ in range(50)),
    ]
    for place in places:
        imported.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=re.escape(str(imported))):
            upstream.read_imported(imported)
        with pytest.raises(ValueError, match=re.escape(str(imported))):
            pretrained.read_weights(imported)
    imported.write_bytes(whole)
    pretrained.read_weights(imported)


def remade(path: Path, change, tensors=None) -> None:
    """The file with other metadata, as its checksum says."""
    held = safetensors.torch.load_file(path) | (tensors or {})
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del metadata["crc32"]
    change(metadata)
    metadata["crc32"] = storage._checksum(held, metadata)
    safetensors.torch.save_file(held, path, metadata)


@pytest.mark.parametrize("name", ["model", "source", "sparse", "naming", "prefix"])
def test_an_imported_file_without_part_of_its_metadata_is_named(imported, name):
    remade(imported, lambda metadata: metadata.pop(name))
    with pytest.raises(ValueError, match=rf"a\.safetensors is damaged \(its metadata lacks {name}\): copy it"):
        upstream.read_imported(imported)


@pytest.mark.parametrize("name, value", [("model", "bevfusion-radar"), ("sparse", "torchsparse"), ("naming", "mine")])
@pytest.mark.parametrize("command", ["export", "show"])
def test_an_imported_file_of_a_made_up_model_or_layout_is_one_sentence(imported, name, value, command):
    remade(imported, lambda metadata: metadata.update({name: value}))
    with pytest.raises(ValueError, match=rf"a\.safetensors is damaged \(its {name} is '{value}', none of "):
        if command == "show":
            checkpoint.show(imported)
        checkpoint.export(imported, imported.with_name("b.pth"))
    assert not imported.with_name("b.pth").exists()


@pytest.mark.parametrize(
    "name, what",
    [("weights.a", "holds 'weights.a', which is neither of"), ("params", "holds 'params', which is neither of"),
     ("params.head.shared", "'head.shared' is a leaf|lies below"), ("params.head.shared.bias.x", "lies below|is a leaf"),
     ("params." + "a." * 2000 + "b", "has 2001 levels"), ("params.head.heatmap.7", "has no params.head.heatmap.7")],
)  # fmt: skip
def test_leaves_that_are_no_tree_are_one_sentence(imported, name, what):
    remade(imported, lambda metadata: None, {name: torch.zeros(1)})
    with pytest.raises(ValueError, match=what):  # the last one: only the model knows
        upstream.read_imported(imported)
        checkpoint.export(imported, imported.with_name("b.pth"))


def test_an_imported_file_of_an_earlier_bevfn_has_no_checksum_and_is_read(imported):
    held = safetensors.torch.load_file(imported)
    with safetensors.safe_open(imported, framework="pt") as file:
        metadata = file.metadata() | {"format": "bevfn import 1"}
    del metadata["crc32"]
    safetensors.torch.save_file(held, imported, metadata)
    assert upstream.read_imported(imported).model == "bevfusion-lidar"


def test_weights_that_are_none_are_refused_wherever_they_are_read(imported):
    name = "state.head.heatmap.hidden.norm.var"
    remade(imported, lambda metadata: None, {name: -torch.ones(32)})
    with pytest.raises(ValueError, match=f"{name} is negative, which no variance is"):
        pretrained.read_weights(imported)


# --- golden cases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bevfusion_lidar", "bevfusion_lidar_cam", "bevdepth_r50_2key"])
def test_fill_case_agrees_with_the_manifest_checksum(name):
    folder = case(name)
    manifest = golden.read_manifest(folder)
    found = golden.fill_case(folder)  # raises if the checksum differs
    assert list(found) == list(manifest["weights"]) + list(manifest.get("derived") or {})
    for key, spec in (manifest["weights"] | (manifest.get("derived") or {})).items():
        assert list(found[key].shape) == spec["shape"] and str(found[key].dtype) == f"torch.{spec['dtype']}"


def test_fill_case_refuses_an_edited_manifest(tmp_path):
    spec = '{"a": {"shape": [2], "dtype": "float32", "kind": "normal", "mean": 0, "std": 1}}'
    (tmp_path / "manifest.json").write_text(f'{{"seed": 0, "weights_crc32": 1, "weights": {spec}}}')
    with pytest.raises(ValueError, match=r"CRC \d+ but manifest.json says 1"):
        golden.fill_case(tmp_path)
    with pytest.raises(ValueError, match=r"manifest.json is missing; a golden case has"):
        golden.fill_case(tmp_path / "none")


def test_nest_builds_lists_and_refuses_gaps():
    leaf = torch.zeros(1)
    assert upstream.nest({"a.1.b": leaf, "a.0.b": leaf, "c": leaf}) == {"a": [{"b": leaf}, {"b": leaf}], "c": leaf}
    with pytest.raises(ValueError, match="the list a has gaps: its items are 0, 2"):
        upstream.nest({"a.0": leaf, "a.2": leaf})
