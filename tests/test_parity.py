"""`bevfn parity`: its measures can fail, its errors are sentences, and the golden cases pass."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bevfn.commands.parity import parity
from bevfn.parity import awml, compare, golden, replay

GOLDENS = Path(__file__).parents[1].parent / "shared" / "goldens"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="the golden cases (../shared/goldens) are not here")


def test_a_line_fails_beyond_its_tolerance_and_on_nan():
    assert compare.Line("a", 1e-6, 1e-5).ok
    assert not compare.Line("a", 2e-5, 1e-5).ok
    assert not compare.Line("a", float("nan"), 1e-5).ok
    assert not compare.Table("empty").ok


def test_relative_l2_sees_a_wrong_shape_and_a_wrong_value():
    x = torch.randn(4, 5)
    assert compare.relative_l2(x, x) == 0
    assert compare.relative_l2(x[:3], x) == float("inf")
    assert compare.relative_l2(2 * x, x) == pytest.approx(1.0)


def test_slicing_is_parsed_and_not_evaluated():
    x = torch.arange(24).view(4, 6)
    assert compare.sliced(x, "[::2, 1:]").tolist() == x[::2, 1:].tolist()
    with pytest.raises(ValueError, match="not of the form"):
        compare.sliced(x, "[__import__('os')]")


def test_sets_are_compared_without_order_and_duplicates_are_noticed():
    a, b = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[3, 4], [1, 2]])
    assert compare.set_difference(a, b)[0] == 0
    assert compare.order_like(a, b).tolist() == [1, 0]
    assert compare.set_difference(a, torch.tensor([[1, 2], [5, 6]]))[0] > 0
    assert compare.set_difference(torch.tensor([[1, 2], [1, 2]]), torch.tensor([[1, 2]]))[0] > 0


def test_a_folder_that_is_no_case_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        golden.read(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        golden.read(tmp_path)


def test_a_case_that_bevfn_makes_of_itself_passes_and_notices_a_change(tmp_path, capsys):
    """In eager torch and as a graph; a number that is another fails its line, and only the line."""
    folder = tmp_path / "case"
    made = {only: tmp_path / f"{only}.json" for only in ("eval", "train")}
    assert parity(folder, make="bevfusion-lidar", only="eval", backend="aot_eager", json_file=made["eval"]) == 0
    assert "no published implementation" in capsys.readouterr().out
    assert parity(folder, only="train", json_file=made["train"]) == 0
    named = {line["name"] for file in made.values() for line in json.loads(file.read_text())["lines"]}
    assert {"eval/lidar.bev", "eval/head.dense_heatmap", "train/loss/loss/total", "train/gradient"} <= named
    outputs = load_file(folder / "outputs.safetensors")
    outputs["eval/bev.neck"] = outputs["eval/bev.neck"] * 1.001
    save_file(outputs, folder / "outputs.safetensors")
    assert parity(folder, only="eval") == 1
    assert capsys.readouterr().out.rstrip().endswith("; FAILED: eval/bev.neck")


def test_a_case_is_not_made_over_another_folder(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="exists and is not empty; choose another CASE_DIR"):
        parity(tmp_path / "full", make="bevfusion-lidar")


@needs_goldens
def test_a_published_case_has_no_backend():
    with pytest.raises(ValueError, match="--backend inductor is for cases that --make made"):
        parity(GOLDENS / "bevfusion_lidar", backend="inductor")


@needs_goldens
def test_a_truncated_case_is_refused(tmp_path):
    folder = shutil.copytree(GOLDENS / "bevfusion_lidar", tmp_path / "case")
    (folder / "outputs.safetensors").write_bytes((folder / "outputs.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"outputs\.safetensors is damaged"):
        golden.read(folder)


@needs_goldens
def test_lidar_only_evaluation_is_the_published_model(tmp_path):
    assert parity(GOLDENS / "bevfusion_lidar", only="eval", json_file=tmp_path / "table.json") == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["ok"] and len(table["lines"]) > 40


@needs_goldens
def test_matrixvt_evaluation_is_the_published_model(tmp_path):
    assert parity(GOLDENS / "matrixvt_r50", only="eval", json_file=tmp_path / "table.json") == 0
    lines = json.loads((tmp_path / "table.json").read_text())["lines"]
    named = {line["name"] for line in lines}
    assert {"eval/ray_points_index", "eval/horiconv_out", "decode_synth_size_aware/boxes", "results/rotation"} <= named


@needs_goldens
def test_a_case_of_an_unknown_model_is_refused(tmp_path):
    folder = shutil.copytree(GOLDENS / "matrixvt_r50", tmp_path / "case")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["weights"] = {key.replace("depth_net", "stereo_net"): spec for key, spec in manifest["weights"].items()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match="a case of a ResNet or a detector on one, which bevfn does not have yet; it has"
    ):
        parity(folder)


@needs_goldens
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("bevfusion_lidar", "bevfusion-lidar"),
        ("bevfusion_lidar_cam", "bevfusion-lidar-camera"),
        ("bevdepth_r50_2key", "bevdepth-2key"),
        ("matrixvt_r50", "matrixvt"),
        ("bevnext_stage1", "bevnext-stage1"),
        ("bevnext_stage2", "bevnext-stage2"),
        ("awml_bevfusion_l_offline", "awml-lidar-offline"),
        ("awml_bevfusion_cl", "awml-camera-lidar"),
    ],
)
def test_a_case_is_known_by_its_tensors_and_not_by_a_class_name(name, model):
    manifest = golden.read_manifest(GOLDENS / name)
    assert golden.source({"weights": manifest["weights"]}).model == model


def test_every_stored_loss_is_compared_and_one_that_we_lack_fails():
    stored = {"train/loss/total": torch.tensor(2.0), "train/loss/iou": torch.tensor(1.0)}
    case = golden.Case(Path(), {}, {"noise/train_loss": {"total": 1e-3}}, {}, stored)
    table = compare.Table("made up")
    compare.losses(case, table, "train", {"total": 2.01})
    assert [(line.name, line.ok) for line in table.lines] == [("train/loss/total", True), ("train/loss/iou", False)]


def test_detections_are_matched_without_order_and_a_missing_one_fails():
    generator = torch.Generator().manual_seed(0)
    found = {"boxes": torch.rand(5, 9, generator=generator), "scores": torch.rand(5), "labels": torch.arange(5)}
    case = golden.Case(Path(), {}, {}, {}, {f"eval/{k}": v.flip(0) for k, v in found.items()})
    table = compare.Table("made up")
    compare.detections(case, table, "eval", found)
    assert table.ok and len(table.lines) == 3
    compare.detections(case, table, "eval", {k: v[:4] for k, v in found.items()})
    assert table.lines[-1].name == "eval/count" and not table.ok


def test_a_norm_that_is_rounding_by_the_cases_whole_is_compared_with_that():
    case = golden.Case(Path(), {}, {"train/grad_norm": {"a": 1.0, "b": 1e-9}, "train/total_grad_norm": 1.0}, {}, {})
    assert case.gradients().floor == 1e-6
    for other, ok in ((2e-9, True), (2e-8, False)):
        table = compare.Table("made up")
        compare.gradients(case, table, {"a": torch.ones(1), "b": torch.full((1,), other)})
        assert table.lines[0].ok == ok


def test_slices_shapes_and_noise_are_read_from_every_form_of_statistics():
    stats = {
        "tensors": {"eval/x": {"shape": [1, 8], "slice": "[:, ::2]"}},
        "noise": {"noise_eval": {"eval/x": 1e-3}, "noise_train": {"train/loss/total": 1e-4}},
    }
    case = golden.Case(Path(), {}, stats, {}, {"eval/x": torch.arange(8.0)[None, ::2]})
    assert case.shape("eval/x") == (1, 8) and case.slicing("eval/x") == "[:, ::2]"
    assert case.noise("eval", "x") == 1e-3 and case.loss_noise("total") == 1e-4 and case.noise("train", "x") == 0
    table = compare.Table("made up")
    compare.boundary(case, table, "eval/x", torch.arange(8.0), 0.0)
    assert table.ok


def test_statistics_below_their_phase_are_read_and_the_sampling_follows_from_the_sizes():
    whole = torch.randn(1, 12, 23, generator=torch.Generator().manual_seed(0))
    stats = {
        "eval": {"view/x": {"shape": [1, 12, 23], "mean": 0.0}, "head/topk": {"gap": 1e-3}},
        "train": {"boundaries": {"x": {"shape": [1, 12, 23]}}, "grad_norm": {"a": 1.0}},
        "noise_floor_f32_vs_f64": {"view/x": 1e-3},
        "noise_floor_f32_vs_f64_same_depth_image": {"view/x": 1e-6},
    }
    outputs = {"eval/view/x": whole[0, ::4, ::8], "train/x": whole[:, ::3]}
    case = golden.Case(Path(), {}, golden._named_by_phase(stats, outputs), {}, outputs)
    assert case.slicing("eval/view/x") == "[::4, ::8]" and case.shape("train/x") == (1, 12, 23)
    assert case.noise("eval", "view/x") == 1e-6 and case.gradients().norms == {"a": 1.0}
    table = compare.Table("made up")
    for name in outputs:
        compare.boundary(case, table, name, whole, 0.0)
    assert table.ok


def test_a_match_of_equal_cost_passes_and_one_that_costs_more_fails():
    centre, box = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 3.0], [4.0, 5.0]])
    cost = torch.cat([(centre[:, None] - box).abs().sum(-1), torch.full((1, 2), 50.0)])[None]  # both beyond both
    valid = torch.ones(1, 2, dtype=torch.bool)
    for match, ok in (([0, 1], True), ([1, 0], True), ([2, 1], False)):
        table = compare.Table("made up")
        awml._matched(table, {"cost": cost, "match": torch.tensor([match])}, valid)
        assert table.ok == ok


def test_gradients_that_are_zero_in_exact_arithmetic_are_left_out_and_missing_ones_named():
    norms = {"a": 1.0, "b": 2.0, "shift": 1e-9}
    case = golden.Case(Path(), {}, {"train/grad_norm": norms}, {}, {})
    table = compare.Table("made up")
    compare.gradients(case, table, {"a": torch.ones(1), "shift": torch.ones(1)}, zero=["shift"])
    lines = {line.name: line for line in table.lines}
    assert lines["train/grad_norm/missing"].note == "b" and not lines["train/grad_norm/missing"].ok
    assert lines["train/grad_norm (median)"].ok and "1 parameters" in lines["train/grad_norm (99 % of parameters)"].note


def test_a_line_may_be_off_by_ten_times_what_rounding_moves_and_no_more(capsys):
    stored = {"train/x": torch.ones(4), "train/y": torch.ones(4), "train/z": torch.ones(4)}
    norms = {"train/grad_norm": {"a": 1.0, "b": 1.0}}
    case = golden.Case(Path(), {}, norms, {}, stored)

    def run(x: float, y: float, z: float, norm: float) -> compare.Table:
        table = compare.Table("made up", silent=True)
        for name, value in zip(stored, (x, y, z)):
            compare.boundary(case, table, name, torch.full((4,), 1 + value), 1e-4)
        compare.gradients(case, table, {key: torch.full((1,), 1 + norm) for key in ("a", "b")})
        compare.differing(table, "train/labels", torch.ones(2), torch.zeros(2), "labels")
        return table

    table, other = run(1e-3, 1e-3, 1e-5, 5e-2), run(1.2e-3, 1.05e-3, 2e-5, 6e-2)
    table.allow_rounding(other)
    ok = {line.name: line.ok for line in table.lines}
    assert ok["train/x"] and not ok["train/y"] and ok["train/z"] and not ok["train/labels"]
    assert table.lines[-1].note == "2 of 2 labels differ"
    assert ok["train/grad_norm (99 % of parameters)"] and ok["train/grad_norm (median)"]
    assert table.lines[2].tolerance == 1e-4  # what passes is left as it is
    assert "by which half an ulp in every parameter moves it; 1e-04 without" in capsys.readouterr().out


def test_parameters_are_moved_by_their_rounding():
    params = {"a": torch.linspace(1, 2, 10_000), "b": {"c": torch.zeros(3)}}
    moved = replay._moved(params)
    apart = (moved["a"] - params["a"]).abs() / params["a"]
    assert 0 < float(apart.mean()) < 2.0**-23 and float(apart.max()) < 2.0**-21 and not moved["b"]["c"].any()


@needs_goldens
@pytest.mark.parametrize("name", ["bevfusion_lidar", "bevdepth_r50_2key", "bevnext_stage1", "awml_bevfusion_l_offline"])
def test_which_cases_have_measured_a_training_step(name):
    assert golden.read(GOLDENS / name).measured_training == (not name.startswith("awml"))


@needs_goldens
def test_a_changed_weight_fails_parity(tmp_path):
    folder = shutil.copytree(GOLDENS / "bevfusion_lidar", tmp_path / "case")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["weights"]["pts_backbone.blocks.0.0.weight"]["std"] *= 1.001
    del manifest["weights_crc32"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert parity(folder, only="eval") == 1


CASES = (
    "bevfusion_lidar",
    "bevfusion_lidar_cam",
    "bevdepth_r50_2key",
    "matrixvt_r50",
    "bevnext_stage1",
    "bevnext_stage2",
    "awml_bevfusion_cl",
    "awml_bevfusion_l_offline",
)


@pytest.mark.slow
@needs_goldens
@pytest.mark.parametrize("name", CASES)
def test_full_golden_case(name):
    assert parity(GOLDENS / name) == 0
