"""Parity of BEVDepth and MatrixVT with their repository: what `goldens/bevdepth_*` and `goldens/matrixvt_*` store.

Stored weights go through the same import as a real checkpoint. Frustum points that rounding puts into another cell are
counted; behind the pooling the stored cells are used, as the cases' READMEs advise, so that one point does not hide the
rest.
"""

import json

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.transform import Rotation
from torch import Tensor

from bevfn import goldens, tree, upstream
from bevfn.data.batch import Base, Batch, make
from bevfn.data.reading import CLASS_NAMES
from bevfn.evaluation import results
from bevfn.heads import centerpoint, centerpoint_loss
from bevfn.models import bevdepth
from bevfn.parity import compare
from bevfn.parity.case import Case
from bevfn.parity.compare import EVAL_TOLERANCE, TRAIN_TOLERANCE, Table
from bevfn.upstream import recognise
from bevfn.views import depth_net, matrixvt

MOVED_POINTS = 50  # frustum points that may fall into another cell (READMEs: "a few tens")


def run(case: Case, table: Table, *, only: str | None, device: str) -> None:
    """Adds every comparison of the case to the table; `only` is "eval", "train" or None for both."""
    weights = goldens.fill_case(case.folder)
    name = recognise.recognise(weights).model
    if name is None:
        raise ValueError(f"{case.folder}/manifest.json is no BEVDepth or MatrixVT that bevfn knows")
    params, state, _ = upstream.import_state(weights, name)
    config = config_for(case, name)
    params, state, _ = upstream.load_into(*bevdepth.init(config, seed=0), {str(case.folder): (params, state)})
    params, state = tree.to(params, device), tree.to(state, device)
    batch = batch_of(case, device)
    _depth_labels(case, table, batch, config)
    places = _places(case, table, batch, config)
    if only != "train":
        _evaluate(case, table, params, state, batch, config, places)
        _decoder(case, table, config)
    if only != "eval":
        _train(case, table, params, state, batch, config, name, places)


def config_for(case: Case, name: str) -> bevdepth.Config:
    """The published model; velocities weigh what the case's experiment says."""
    config = {"matrixvt": bevdepth.matrix_vt, "bevdepth-2key-da": bevdepth.two_key_aggregated}.get(name)
    if config is not None:
        return config()
    return bevdepth.key_frames(len(case.inputs["ida_mats"]))


def batch_of(case: Case, device: str) -> Batch:
    """The stored inputs as a batch of one; earlier frames' images are made from the key frame's as the README says."""
    inputs = case.inputs
    frames = [inputs["imgs_u8_rgb"]]
    if len(inputs["ida_mats"]) > 1:
        motion = json.loads((case.folder / "augmentation.json").read_text())["sweep_motion"]
        moved = torch.roll(frames[0], motion["shift"], dims=2).int()
        frames.append(((7 * moved + 64) // 8).to(torch.uint8))
    depth = torch.zeros(frames[0].shape[:3])
    depth[tuple(inputs["depth_gt_cam_y_x"].long().T)] = inputs["depth_gt_value"]
    boxes = inputs["gt_boxes"].clone()
    boxes[:, 2] -= boxes[:, 5] * 0.5
    made = make(
        base=Base.EGO_AT_CAMERAS,
        base_aug=inputs["bda_mat"][None],
        boxes=boxes[None],
        labels=inputs["gt_labels"][None],
        boxes_valid=torch.ones(1, len(boxes), dtype=torch.bool),
        images=torch.stack(frames)[None],
        intrinsics=inputs["intrin_mats"][None],
        image_aug=inputs["ida_mats"][None],
        base_from_camera=inputs["sensor2ego_mats"][None],
        image_from_base=(inputs["intrin_mats"] @ torch.linalg.inv(inputs["sensor2ego_mats"]))[None],
        depth=depth[None],
    )
    made.validate()
    return made.to(device)


def suffixes(case: Case) -> tuple[str, ...]:
    """What the case puts behind the names of the first and of later frames."""
    return ("_key", "_sweep") if len(case.inputs["ida_mats"]) > 1 else ("",)


# -------------------------------------------------------------------------------------------------------- geometry


def _depth_labels(case: Case, table: Table, batch: Batch, config: bevdepth.Config) -> None:
    assert batch.depth is not None
    ours = depth_net.depth_labels(batch.depth[0], config.grid.depth_m, config.grid.stride).cpu()
    wrong = int((ours != case.inputs["depth_label_bin"]).sum())
    table.add("inputs/depth_label_bin", wrong, 0.0, f"of {ours.numel()} cells differ")


def _places(case: Case, table: Table, batch: Batch, config: bevdepth.Config) -> list[bevdepth.Place]:
    """Compares where the features go, then hands back the stored answer."""
    device = batch.base_aug.device
    if config.matrix is not None:
        return [_matrices(case, table, batch, config)]
    found: list[bevdepth.Place] = []
    for t, suffix in enumerate(suffixes(case)):
        stored = case.outputs[f"eval/voxel_index{suffix}"].int()[None].to(device)
        ours = bevdepth.place(batch, t, config)
        assert isinstance(ours, Tensor)
        moved = int((ours != stored).sum())
        table.add(f"eval/voxel_index{suffix}", moved, MOVED_POINTS, f"of {stored.numel()} points in another cell")
        found.append(stored)
    return found


def _matrices(case: Case, table: Table, batch: Batch, config: bevdepth.Config) -> bevdepth.Place:
    points = torch.stack(matrixvt.ray_points(batch, 0, config.grid), -1)[0].cpu()
    _compare(case, table, "eval/ray_points_voxel", points, EVAL_TOLERANCE)
    stored = case.outputs["eval/ray_points_index"].long()
    ours = matrixvt.ray_cells(batch, 0, config.grid)
    moved = int((ours[0].cpu() != stored).sum())
    table.add("eval/ray_points_index", moved, MOVED_POINTS, f"of {stored.numel()} points in another cell")
    ring, ray = matrixvt.matrices(stored[None].to(ours.device), config.grid)
    for name, matrix in (("ring", ring), ("ray", ray)):
        for axis, sums in (("row", matrix.sum(2)), ("col", matrix.sum(1))):
            _compare(case, table, f"eval/{name}_{axis}sum", sums.cpu(), 0.0)
    return ring, ray


# ------------------------------------------------------------------------------------------------------ evaluation


def boundaries(outputs: dict, suffix_of: tuple[str, ...]) -> dict[str, Tensor]:
    """Stored name -> our tensor."""
    made: dict[str, Tensor] = {}
    for t, suffix in enumerate(suffix_of):
        frame = outputs["frames"][t]
        net, view, image = frame["depth_net"], frame["view"], frame["image"]
        named = {
            "img_stem": image[0], **{f"img_stage{s}": image[s] for s in range(1, len(image))},
            "img_neck": frame["image_neck"], "mlp_input_raw": net["camera_raw"], "mlp_input_bn": net["camera"],
            "depth_mlp": net["depth_mlp"], "context_mlp": net["context_mlp"], "depthnet_reduce": net["reduce"],
            "context_se": net["context_gated"], "depth_se": net["depth_gated"], "depth_conv_aspp": net["aspp"],
            **{f"depth_conv_block{b}": y for b, y in enumerate(net["blocks"])}, "dcn_offset": net["offset"],
            "depth_conv_dcn": net["deform"], "depth_conv_logits": net["logits"], "depth_prob": frame["depth"],
            "context": net["context"], "bev": view["bev"],
        }  # fmt: skip
        if "merged" in view:
            named |= {
                "vert_logits": view["row_logits"], "depth_reduced": view["depth_reduced"], "hori_merger": view["merged"],
                "hori_reduce": view["reduced"], "horiconv_out": view["feature"],
            }  # fmt: skip
        made |= {name + suffix: x for name, x in named.items()}
    trunk = outputs["trunk"]
    made |= {"trunk_stem": trunk[0], **{f"bev_stage{s}": trunk[s] for s in range(1, len(trunk))}}
    made |= {"bev_neck": outputs["bev_neck"], "head_shared": outputs["head"]["shared"]}
    for t, maps in enumerate(outputs["head"]["tasks"]):
        made |= {f"task{t}/{name}": x for name, x in maps.items()}
    return made


def _noise(case: Case, phase: str, name: str) -> float:
    """Measured relative L2 noise of a boundary: with the same voxel indices where the case tells them apart."""
    stored = case.stats.get("noise", {})
    for key in (f"{phase}_f32_vs_f64_same_voxel_indices", f"{phase}_f32_vs_f64"):
        if key in stored:
            return float(stored[key].get(name, 0.0))
    return 0.0


def _compare(case: Case, table: Table, name: str, ours: Tensor, tolerance: float, note: str = "") -> None:
    x = compare.sliced(ours.detach().cpu(), case.stats["slices"].get(name))
    table.add(name, compare.relative_l2(x, case.outputs[name]), tolerance, note)


def _dense(case: Case, table: Table, phase: str, ours: dict[str, Tensor], floor: float) -> None:
    for name, x in ours.items():
        if f"{phase}/{name}" in case.outputs:
            if phase == "train" and name.startswith("mlp_input_bn"):
                _camera_norm(case, table, name, x)
            else:
                _compare(case, table, f"{phase}/{name}", x, max(floor, 10 * _noise(case, phase, name)))


def _camera_norm(case: Case, table: Table, name: str, ours: Tensor) -> None:
    """Camera numbers that are the same for all cameras are normalised to rounding / sqrt(eps): compared absolutely."""
    stored = case.outputs[f"train/{name}"]
    raw = case.outputs[f"eval/mlp_input_raw{suffixes(case)[0]}"]
    constant = (raw == raw[:1]).all(0)
    ours = ours.detach().cpu()
    error = float((ours - stored)[:, constant].abs().max()) if bool(constant.any()) else 0.0
    table.add(f"train/{name} (equal columns)", error, 5e-3, f"absolute, {int(constant.sum())} columns")
    error = compare.relative_l2(ours[:, ~constant], stored[:, ~constant])
    table.add(f"train/{name}", error, TRAIN_TOLERANCE)


def _evaluate(
    case: Case, table: Table, params: dict, state: dict, batch: Batch, config: bevdepth.Config,
    places: list[bevdepth.Place],
) -> None:  # fmt: skip
    with torch.no_grad():
        outputs, _ = bevdepth.apply(params, state, batch, config=config, train=False, places=places)
        detections = bevdepth.decode(outputs, config)
    _dense(case, table, "eval", boundaries(outputs, suffixes(case)), EVAL_TOLERANCE)
    _detections(case, table, "eval", detections, 10 * _noise(case, "eval", "task4/rot"))
    _results(case, table)


def _detections(case: Case, table: Table, name: str, found: dict[str, Tensor], noise: float) -> None:
    """Decoded boxes, matched one to one by box and score, since equal scores have no order."""
    found = {k: v[0].cpu() for k, v in found.items()}
    boxes, scores, labels = (found[k][found["valid"]] for k in ("boxes", "scores", "labels"))
    boxes = boxes.clone()
    boxes[:, 2] += boxes[:, 5] * 0.5  # stored with gravity centres
    stored = {k: case.outputs[f"{name}/{k}"] for k in ("boxes", "scores", "labels")}
    more = len(boxes) - len(stored["boxes"])
    table.add(f"{name}/boxes/count", abs(more), 0.0, f"{len(stored['boxes'])} boxes")
    if more:
        return
    ours = torch.cat([boxes, scores[:, None], labels[:, None]], 1).double()
    theirs = torch.cat([stored["boxes"], stored["scores"][:, None], stored["labels"][:, None]], 1).double()
    pairs = linear_sum_assignment(torch.cdist(ours, theirs).numpy())
    order = torch.from_numpy(pairs[0][np.argsort(pairs[1])])
    floor = max(EVAL_TOLERANCE, noise)
    table.add(f"{name}/boxes", compare.relative_l2(boxes[order], stored["boxes"]), floor)
    table.add(f"{name}/scores", compare.relative_l2(scores[order], stored["scores"]), floor)
    table.add(f"{name}/labels", float((labels[order] != stored["labels"]).sum()), 0.0, "labels that differ")


def _results(case: Case, table: Table) -> None:
    """The results file's entries of every fourth stored box, in the frame of the mean camera pose."""
    path = case.folder / "results_nusc_every4th.json"
    if not path.is_file():
        return
    ((token, stored),) = json.loads(path.read_text())["results"].items()
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_quat(case.inputs["ego2global_rotation"].numpy()[[1, 2, 3, 0]]).as_matrix()
    pose[:3, 3] = case.inputs["ego2global_translation"].numpy()
    boxes, scores, labels = (case.outputs[f"eval/{k}"][::4].numpy() for k in ("boxes", "scores", "labels"))
    boxes = boxes.astype(np.float64)
    boxes[:, 2] -= boxes[:, 5] * 0.5
    found = results.entries(
        token, results.Detections(boxes, scores, labels), class_names=CLASS_NAMES, ego_from_boxes=np.eye(4),
        global_from_ego=pose, ranges=None,
    )  # fmt: skip
    stored = sorted(stored, key=lambda entry: -entry["detection_score"])
    wrong = abs(len(found) - len(stored)) + sum(
        ours[k] != theirs[k] for ours, theirs in zip(found, stored) for k in ("detection_name", "attribute_name")
    )
    table.add("results/names and attributes", wrong, 0.0, f"of {len(stored)} boxes")
    for key in ("translation", "size", "rotation", "velocity", "detection_score"):
        ours, theirs = (
            torch.tensor([entry[key] for entry in entries], dtype=torch.float64) for entries in (found, stored)
        )
        if key == "rotation":  # q and -q are one rotation
            ours, theirs = (q * torch.where(q[:, 3:] < 0, -1.0, 1.0) for q in (ours, theirs))
        table.add(f"results/{key}", compare.relative_l2(ours, theirs), 1e-6)


def _decoder(case: Case, table: Table, config: bevdepth.Config) -> None:
    """The decoder alone on synthetic maps, with both kinds of suppression."""
    specs = case.manifest.get("extra_tensors", {})
    tasks: list[dict[str, Tensor]] = [{} for _ in config.head.tasks]
    for key, spec in specs.items():
        _, task, name = key.split("/")
        tasks[int(task.removeprefix("task"))][name] = torch.from_numpy(goldens.draw(key, spec, case.manifest["seed"]))
    for name, head in (("decode_synth", config.head), ("decode_synth_size_aware", centerpoint.size_aware(config.head))):
        if f"{name}/boxes" in case.outputs:
            _detections(case, table, name, centerpoint.decode(tasks, head), 0.0)


# -------------------------------------------------------------------------------------------------------- training


def _train(
    case: Case, table: Table, params: dict, state: dict, batch: Batch, config: bevdepth.Config, name: str,
    places: list[bevdepth.Place],
) -> None:  # fmt: skip
    assert batch.boxes is not None and batch.labels is not None and batch.boxes_valid is not None
    annotations = batch.boxes, batch.labels, batch.boxes_valid

    def total_loss(params: dict) -> tuple[Tensor, tuple]:
        outputs, new = bevdepth.apply(params, state, batch, config=config, train=True, places=places)
        detection, terms = centerpoint_loss.loss(outputs["head"]["tasks"], *annotations, config=config.head)
        depth = bevdepth.depth_loss(outputs, batch, config)
        return detection + depth, (outputs, new, {**terms, "detection": detection, "depth": depth})

    gradients, (total, (outputs, new, terms)) = torch.func.grad_and_value(total_loss, has_aux=True)(params)
    _dense(case, table, "train", boundaries(outputs, suffixes(case)), TRAIN_TOLERANCE)
    _losses(case, table, {**terms, "total": total})
    _targets(case, table, batch, terms["targets"], config.head)
    exported = upstream.export_state(gradients, new, name, {}, prefix="model.")  # under upstream's names
    _gradients(case, table, exported)
    for key in case.names("train/bn_after/"):
        if not key.endswith("num_batches_tracked"):  # bevfn does not count
            _compare(case, table, f"train/bn_after/{key}", exported[key], TRAIN_TOLERANCE)


def _losses(case: Case, table: Table, ours: dict) -> None:
    noise = case.stats.get("noise", {}).get("train_loss_rel", {})
    noise = {**noise, "detection": noise.get("detection_loss", 0.0), "depth": noise.get("depth_loss", 0.0)}
    for key in case.names("train/loss/"):
        error = compare.relative(float(ours[key]), float(case.outputs[f"train/loss/{key}"]))
        table.add(f"train/loss/{key}", error, max(TRAIN_TOLERANCE, 10 * float(noise.get(key, 0.0))))


def _targets(case: Case, table: Table, batch: Batch, ours: dict, head: centerpoint.Config) -> None:
    """Stored rows of a task: its boxes by class, then in input order."""
    assert batch.labels is not None
    labels = batch.labels[0].cpu()
    ours = tree.map(lambda x: x.detach().cpu(), {k: ours[k] for k in ("cell", "inside", "code", "heatmaps")})
    for t, (first, count) in enumerate(zip(head.first_class, head.tasks)):
        name = f"train/target/task{t}"
        _compare(case, table, f"{name}/heatmap", ours["heatmaps"][t][0], TRAIN_TOLERANCE)
        rows = torch.cat([torch.nonzero(labels == k)[:, 0] for k in range(first, first + count)])
        mask, index = case.outputs[f"{name}/mask"].bool(), case.outputs[f"{name}/ind"]
        rows = rows[: len(mask)]
        wrong = int((ours["inside"][0, rows].bool() != mask).sum() + (ours["cell"][0, rows] != index)[mask].sum())
        table.add(f"{name}/ind", wrong, 0.0, f"of {len(mask)} boxes differ in cell or validity")
        code, stored = ours["code"][0, rows][mask], case.outputs[f"{name}/anno_box"][mask]
        table.add(f"{name}/anno_box", compare.relative_l2(code, stored), TRAIN_TOLERANCE)


def _gradients(case: Case, table: Table, gradients: dict[str, Tensor]) -> None:
    """Norms per parameter against the float64 ones where the case has them (README: float32 carries 1e-3 noise)."""
    stored = case.stats["grad_norm"] | (case.stats.get("grad_norm_float64") or {})
    norms = {key: float(gradients[key].double().norm()) for key in stored}
    frozen = [key for key, norm in stored.items() if norm is None]
    table.add(
        "train/grad_norm (frozen)", max((norms[key] for key in frozen), default=0.0), 0.0, f"{len(frozen)} parameters"
    )
    zero = set(case.stats.get("noise", {}).get("true_zero_gradients", ()))
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    largest = max((norms[key] for key in zero), default=0.0) / whole
    table.add("train/grad_norm (zero in exact arithmetic)", largest, 1e-6, f"{len(zero)} parameters, of the whole norm")
    names = [key for key in stored if key not in zero and key not in frozen]
    errors = np.array([compare.relative(norms[key], stored[key]) for key in names])
    limit, share, median = compare.GRADIENT_TOLERANCE
    worst = names[int(errors.argmax())]
    table.add(
        f"train/grad_norm ({share:.0%} of parameters)", float(np.quantile(errors, share, method="higher")), limit,
        f"{len(names)} parameters, worst {worst} {errors.max():.1e}",
    )  # fmt: skip
    table.add("train/grad_norm (median)", float(np.median(errors)), median)
    table.add("train/grad_norm (whole)", compare.relative(whole, case.stats["grad_norm_total"]), limit)
