"""Parity of BEVFusion with mmdetection3d: what `goldens/bevfusion_*` store, boundary by boundary.

Stored weights go through the same import as a real `.pth`; stored inputs are used as they are (our own preprocessing
is compared with them in tests/test_data.py). Unordered results are compared as sets, as the cases' READMEs say.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from bevfn import goldens, tree, upstream
from bevfn.data import batch
from bevfn.data.batch import Base, Batch
from bevfn.heads import transfusion, transfusion_loss
from bevfn.kernels.linear_assignment import linear_assignment
from bevfn.models import bevfusion
from bevfn.parity import compare
from bevfn.parity.case import Case
from bevfn.parity.compare import EVAL_TOLERANCE, TRAIN_TOLERANCE, Table
from bevfn.views import camera_grid, lift_splat

PER_QUERY = ("query_score", "query_pos", "query_feat_in", "self_attn", "cross_attn", "decoder_out")

# Shifts that a following batch norm removes: their gradients are zero in exact arithmetic and rounding in practice
# (goldens bevfusion_lidar_cam, "Measured values"). `dtransform.0.weight` is a pure scale of a one-channel input.
ZERO_GRADIENT = (
    "bbox_head.decoder.0.norms.2.bias",
    "bbox_head.decoder.0.self_posembed.position_embedding_head.0.bias",
    "bbox_head.decoder.0.cross_posembed.position_embedding_head.0.bias",
    *(f"view_transform.dtransform.{i}.bias" for i in (0, 3, 6)),
    "view_transform.dtransform.0.weight",
    *(f"view_transform.depthnet.{i}.bias" for i in (0, 3)),
    *(f"img_backbone.norm{i}.bias" for i in (1, 2, 3)),
)


def run(case: Case, table: Table, *, only: str | None, device: str) -> None:
    """Adds every comparison of the case to the table; `only` is "eval", "train" or None for both."""
    name = model_name(case)
    params, state, report = upstream.import_state(goldens.fill_case(case.folder), name)
    if report.missing or report.mismatched:
        raise ValueError(f"{case.folder}/manifest.json does not fill {name}: {report}")
    config = config_for(case, name)
    loaded = {str(case.folder): (params, state)}
    params, state, _ = upstream.load_into(*bevfusion.init(config, seed=0), loaded)
    params, state = tree.to(params, device), tree.to(state, device)
    if only != "train":
        _evaluate(case, table, params, state, config, device)
    if only != "eval":
        _train(case, table, params, state, config, name, device)
        if any(k.startswith("unit/") for k in case.outputs):
            _unit(case, table, config, device)


def model_name(case: Case) -> str:
    """The model that the manifest's keys belong to."""
    camera = any(key.startswith("img_backbone.") for key in case.manifest["weights"])
    return "bevfusion-lidar-camera" if camera else "bevfusion-lidar"


def config_for(case: Case, name: str) -> bevfusion.Config:
    """The published model with capacities that this case's points cannot overflow by much: overflow is compared too."""
    config = bevfusion.lidar_camera() if name == "bevfusion-lidar-camera" else bevfusion.lidar_only()
    assert config.lidar is not None
    room = min(len(case.inputs["points"]), config.voxels.max_voxels[1])
    encoder = replace(config.lidar.encoder, capacities=(3 * room, 2 * room, room, room))
    return replace(config, lidar=replace(config.lidar, encoder=encoder))


def batch_of(case: Case, boxes: Tensor | None, device: str, prefix: str = "") -> Batch:
    """The stored inputs as a batch of one; `boxes` [n] selects annotations (None: all)."""
    inputs = case.inputs
    points = inputs[f"{prefix}points"][None]
    chosen = torch.arange(len(inputs["gt_boxes"])) if boxes is None else boxes
    fields = {
        "points": points,
        "points_valid": torch.ones(points.shape[:2], dtype=torch.bool),
        "boxes": inputs["gt_boxes"][chosen][None],
        "labels": inputs["gt_labels"][chosen][None],
        "boxes_valid": torch.ones(1, len(chosen), dtype=torch.bool),
    }
    if "imgs" in inputs:  # with one frame, T = 1
        names = {
            "images": "imgs",
            "intrinsics": "cam2img",
            "image_aug": f"{prefix}img_aug_matrix",
            "base_from_camera": "cam2lidar",
            "image_from_base": "lidar2img",
        }
        fields |= {ours: inputs[theirs][None, None] for ours, theirs in names.items()}
    base_aug = inputs.get(f"{prefix}lidar_aug_matrix", torch.eye(4))[None]
    return batch.make(base=Base.LIDAR, base_aug=base_aug, **fields).to(device)


# ------------------------------------------------------------------------------------------------------ evaluation


def _evaluate(case: Case, table: Table, params: dict, state: dict, config: bevfusion.Config, device: str) -> None:
    with torch.no_grad():
        batch = batch_of(case, None, device)
        outputs, _ = bevfusion.apply(params, state, batch, config=config, train=False)
        detections = transfusion.decode(outputs["head"], config.head)
    outputs = tree.map(lambda x: x.cpu(), outputs)
    _overflow(table, outputs)
    if config.lidar is not None and "eval/voxel/coords" in case.outputs:
        _sites(case, table, "eval/voxel", _voxels(outputs), {"num_points": "num_points", "features": "features"})
    for name in [n for n in case.names("eval/sparse/") if n.endswith("/coords")]:
        stage = name.removesuffix("/coords")
        reached = outputs["sparse"][stage]
        found = {
            "coords": reached["coords"][reached["valid"]][:, 1:],
            "features": reached["features"][reached["valid"]],
        }
        _sites(case, table, f"eval/sparse/{stage}", found, {"features": "features"})
    _dense(case, table, "eval/", dense_boundaries(outputs))
    if config.camera is not None:
        _depth_map(case, table, "eval/vt", outputs["vt"]["depth_map"])
        _augmented_geometry(case, table, config, device)
    _queries(case, table, "eval/head", outputs["head"], EVAL_TOLERANCE)
    _detections(case, table, {k: v[0].cpu() for k, v in detections.items()})


def dense_boundaries(outputs: dict) -> dict[str, Callable[[], Tensor]]:
    """Stored name -> our tensor in upstream's layout, for everything that has a place and no order."""
    made = {
        "sparse/bev": lambda: outputs["sparse"]["bev"],
        "fuser": lambda: outputs["fuser"],
        "second/0": lambda: outputs["second"][0],
        "second/1": lambda: outputs["second"][1],
        "secfpn": lambda: outputs["secfpn"],
        "head/shared_conv": lambda: outputs["head"]["shared_conv"],
        "head/dense_heatmap": lambda: outputs["head"]["dense_heatmap"],
        "vt/geometry": lambda: outputs["vt"]["geometry"],
        "vt/dtransform": lambda: outputs["vt"]["dtransform"],
        "vt/depthnet": lambda: outputs["vt"]["depthnet"],
        "vt/bev_pool": lambda: outputs["vt"]["bev_pool"],
        "vt/bev": lambda: outputs["vt"]["bev"],
    }
    made |= {f"swin/{i}": lambda i=i: outputs["swin"][i] for i in range(3)}
    made |= {f"lssfpn/{i}": lambda i=i: outputs["lssfpn"][i] for i in range(2)}
    return made


def _dense(
    case: Case, table: Table, prefix: str, ours: dict[str, Callable[[], Tensor]], floor: float = EVAL_TOLERANCE
) -> None:
    for name, get in ours.items():
        if prefix + name in case.outputs:
            stored = case.outputs[prefix + name]
            x = get()
            x = x.reshape(case.stats[prefix + name]["shape"]) if "shape" in case.stats.get(prefix + name, {}) else x
            # the second set of matrices ("aug/") is sampled as its evaluation twin
            slicing = case.slicing(prefix + name) or (case.slicing(f"eval/{name}") if prefix == "aug/" else None)
            error = compare.relative_l2(compare.sliced(x.cpu(), slicing), stored)
            table.add(prefix + name, error, max(floor, 10 * case.noise(name)))


def _overflow(table: Table, outputs: dict) -> None:
    for name, count in outputs["overflow"].items():
        table.add(f"overflow/{name}", float(count), 0.0, "sites dropped")


def _voxels(outputs: dict) -> dict[str, Tensor]:
    filled = outputs["voxel"]["count"][0] > 0
    return {
        "coords": outputs["voxel"]["coords"][0][filled],
        "num_points": outputs["voxel"]["count"][0][filled].float(),
        "features": outputs["voxel"]["features"][0][filled],
    }


def _sites(case: Case, table: Table, name: str, found: dict[str, Tensor], values: dict[str, str]) -> None:
    """Active sites as a set, then their values in the stored (sorted) order."""
    stored = case.outputs[f"{name}/coords"]
    error, note = compare.set_difference(found["coords"], stored)
    table.add(f"{name}/coords", error, 0.0, note)
    order = compare.order_like(found["coords"], stored)
    for key in values:
        if f"{name}/{key}" in case.outputs:
            x = compare.sliced(found[key][order], case.slicing(f"{name}/{key}"))
            kind = name.removeprefix("eval/").removeprefix("train/")
            tolerance = 0.0 if key == "num_points" else max(EVAL_TOLERANCE, 10 * case.noise(f"{kind}/{key}"))
            table.add(f"{name}/{key}", compare.relative_l2(x, case.outputs[f"{name}/{key}"]), tolerance)


def _depth_map(case: Case, table: Table, name: str, depth: Tensor) -> None:
    """Hit pixels as a set (camera, row, column), then their depths."""
    if f"{name}/depth_index" not in case.outputs:
        return
    depth = depth.cpu().reshape(case.stats[f"{name}/depth_map"]["shape"])  # N H W
    stored = case.outputs[f"{name}/depth_index"].long()
    error, note = compare.set_difference(torch.nonzero(depth), stored)
    table.add(f"{name}/depth_index", error, 0.0, note)
    value = depth[tuple(stored.T)]
    table.add(f"{name}/depth_value", compare.relative_l2(value, case.outputs[f"{name}/depth_value"]), EVAL_TOLERANCE)


def _augmented_geometry(case: Case, table: Table, config: bevfusion.Config, device: str) -> None:
    """The second set of matrices, drawn from the training augmentation: geometry alone."""
    if "aug/points" not in case.inputs:
        return
    assert config.camera is not None
    batch = batch_of(case, None, device, prefix="aug/")
    view = config.camera.view
    _depth_map(case, table, "aug/vt", lift_splat.lidar_depth_map(batch, view.grid.image_size))
    points = torch.stack(camera_grid.frustum_points(batch, 0, view.grid), -1)
    _dense(case, table, "aug/", {"vt/geometry": lambda: points})


def _queries(case: Case, table: Table, name: str, head: dict, floor: float) -> None:
    """Queries as a set keyed by (class, cell); then everything that belongs to a query in the stored order."""
    ours = torch.stack([head["query_labels"][0], head["query_index"][0]], 1).cpu()
    theirs = torch.stack([case.outputs[f"{name}/query_labels"], case.outputs[f"{name}/query_index"]], 1).long()
    error, note = compare.set_difference(ours, theirs)
    table.add(f"{name}/queries", error, 0.0, note)
    order = compare.order_like(ours, theirs)
    found = {k: head[k] for k in PER_QUERY} | {f"pred/{k}": v for k, v in head["pred"][-1].items()}
    for key, x in found.items():
        stored = case.outputs.get(f"{name}/{key}")
        if stored is None:
            continue
        x = x.cpu()[:, order]  # 1 Q n
        x = x if x.shape == stored.shape else x.transpose(1, 2) if x.dim() == 3 else x[0]
        table.add(f"{name}/{key}", compare.relative_l2(x, stored), max(floor, 10 * case.noise(f"head/{key}")))


def _detections(case: Case, table: Table, found: dict[str, Tensor]) -> None:
    """Decoded boxes matched one to one by box and score."""
    boxes, scores, labels = (found[k][found["valid"]] for k in ("boxes", "scores", "labels"))
    stored = {k: case.outputs[f"eval/det/{k}"] for k in ("boxes", "scores", "labels")}
    if len(boxes) != len(stored["boxes"]):
        table.add("eval/det/count", abs(len(boxes) - len(stored["boxes"])), 0.0, f"{len(boxes)} boxes")
        return
    ours, theirs = torch.cat([boxes, scores[:, None]], 1), torch.cat([stored["boxes"], stored["scores"][:, None]], 1)
    pairs = linear_sum_assignment(torch.cdist(ours.double(), theirs.double()).numpy())
    order = torch.from_numpy(pairs[0][np.argsort(pairs[1])])
    table.add(
        "eval/det/boxes",
        compare.relative_l2(boxes[order], stored["boxes"]),
        max(EVAL_TOLERANCE, 10 * case.noise("det/boxes")),
    )
    table.add(
        "eval/det/scores",
        compare.relative_l2(scores[order], stored["scores"]),
        max(EVAL_TOLERANCE, 10 * case.noise("det/scores")),
    )
    table.add("eval/det/labels", float((labels[order] != stored["labels"]).sum()), 0.0, "labels that differ")


# -------------------------------------------------------------------------------------------------------- training


def _train(
    case: Case, table: Table, params: dict, state: dict, config: bevfusion.Config, name: str, device: str
) -> None:
    batch = batch_of(case, case.inputs.get("gt_train_index"), device)

    def total_loss(params: dict) -> tuple[Tensor, tuple]:
        outputs, new = bevfusion.apply(params, state, batch, config=config, train=True, key=None)
        total, terms = transfusion_loss.loss(
            outputs["head"], batch.boxes, batch.labels, batch.boxes_valid, config=config.head
        )
        return total, (outputs, new, terms)

    gradients, (total, (outputs, new, terms)) = torch.func.grad_and_value(total_loss, has_aux=True)(params)
    _overflow(table, outputs)
    _dense(case, table, "train/", dense_boundaries(outputs), floor=TRAIN_TOLERANCE)
    _queries(case, table, "train/head", outputs["head"], TRAIN_TOLERANCE)
    _losses(case, table, "train", float(total), terms)
    _targets(case, table, "train", outputs["head"], terms["targets"])
    exported = upstream.export_state(gradients, new, name, {})  # gradients and new statistics under upstream's names
    _gradients(case, table, exported)
    _statistics(case, table, exported)
    if "train_all/loss/loss_heatmap" in case.outputs:
        _all_boxes(case, table, outputs["head"], config, device)


def _losses(case: Case, table: Table, name: str, total: float, terms: dict) -> None:
    ours = {
        "total": total,
        "loss_heatmap": terms["heatmap"],
        "layer_-1_loss_cls": terms["cls"],
        "layer_-1_loss_bbox": terms["bbox"],
        "matched_ious": terms["matched_iou"],
    }
    noise = case.stats.get("noise/train_loss", {})
    for key, value in ours.items():
        if f"{name}/loss/{key}" in case.outputs:
            error = compare.relative(float(value), float(case.outputs[f"{name}/loss/{key}"]))
            floor = max(TRAIN_TOLERANCE, 10 * float(noise.get(key, 0.0)))
            if key == "matched_ious":  # logged only; boxes barely touch, so an absolute error of 1e-5 is what it means
                floor = max(floor, 1e-5 / float(case.outputs[f"{name}/loss/{key}"].abs().clamp(min=1e-12)))
            table.add(f"{name}/loss/{key}", error, floor)


def _targets(case: Case, table: Table, name: str, head: dict, targets: dict) -> None:
    """Assigned targets per query, in the stored order of queries; heatmap target as a set of nonzero cells."""
    ours = torch.stack([head["query_labels"][0], head["query_index"][0]], 1).cpu()
    if f"{name}/head/query_labels" in case.outputs:
        stored = [case.outputs[f"{name}/head/query_{k}"] for k in ("labels", "index")]
        order = compare.order_like(ours, torch.stack(stored, 1).long())
    else:
        order = torch.arange(len(ours))
    _heatmap(case, table, name, targets["heatmap"][0].cpu())
    labels = targets["labels"][0].cpu()[order]
    wrong = float((labels != case.outputs[f"{name}/target/labels"]).sum())
    table.add(f"{name}/target/labels", wrong, 0.0, "labels that differ")
    code = targets["code"][0].cpu()[order]
    table.add(
        f"{name}/target/bbox_targets",
        compare.relative_l2(code, case.outputs[f"{name}/target/bbox_targets"]),
        TRAIN_TOLERANCE,
    )
    table.add(
        f"{name}/target/ious",
        float((targets["ious"][0].cpu()[order] - case.outputs[f"{name}/target/ious"]).abs().max()),
        1e-4,
        "absolute",
    )
    match = targets["match"][0].cpu()
    position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    pairs = torch.stack([position[match[match >= 0]], torch.nonzero(match >= 0)[:, 0]], 1)
    error, note = compare.set_difference(pairs, case.outputs[f"{name}/match"])
    table.add(f"{name}/match", error, 0.0, note)


def _heatmap(case: Case, table: Table, name: str, heatmap: Tensor) -> None:
    stored = case.outputs[f"{name}/target/heatmap_index"].long()
    error, note = compare.set_difference(torch.nonzero(heatmap), stored)
    table.add(f"{name}/target/heatmap_index", error, 0.0, note)
    value = heatmap[tuple(stored.T)]
    table.add(
        f"{name}/target/heatmap_value",
        compare.relative_l2(value, case.outputs[f"{name}/target/heatmap_value"]),
        TRAIN_TOLERANCE,
    )


def _gradients(case: Case, table: Table, gradients: dict[str, Tensor]) -> None:
    """Norms per parameter against the stored ones (float64 norms where the case has them), then stored slices."""
    stored = case.stats.get("train/grad_norm_float64") or case.stats["train/grad_norm"]
    zero = set(case.stats.get("noise/train_grad_exactly_zero", ())) | set(ZERO_GRADIENT)
    missing = sorted(set(stored) - set(gradients))
    if missing:
        table.add("train/grad_norm/missing", len(missing), 0.0, ", ".join(missing[:3]))
    names = [k for k in stored if k not in zero and k in gradients]
    errors = np.array([compare.relative(float(gradients[k].double().norm()), stored[k]) for k in names])
    limit, share, median = compare.GRADIENT_TOLERANCE
    worst = names[int(errors.argmax())]
    table.add(
        "train/grad_norm (99 % of parameters)",
        float(np.quantile(errors, share, method="higher")),
        limit,
        f"{len(names)} parameters, worst {worst} {errors.max():.1e}",
    )
    table.add("train/grad_norm (median)", float(np.median(errors)), median)
    noise = case.stats.get("noise/train_grad", {})
    for key in case.names("train/grad/"):
        if key not in zero:
            x = compare.sliced(gradients[key].cpu(), case.slicing(f"train/grad/{key}"))
            error = compare.relative_l2(x, case.outputs[f"train/grad/{key}"])
            # Element-wise, ReLUs whose input changes sign within rounding set the floor (README, noise floor).
            table.add(f"train/grad/{key}", error, max(2e-2, 10 * float(noise.get(key, 0.0))))


def _statistics(case: Case, table: Table, state: dict[str, Tensor]) -> None:
    for key in case.names("train/bn/"):
        table.add(
            f"train/bn/{key}", compare.relative_l2(state[key].cpu(), case.outputs[f"train/bn/{key}"]), TRAIN_TOLERANCE
        )


def _all_boxes(case: Case, table: Table, head: dict, config: bevfusion.Config, device: str) -> None:
    """The same forward with every box. Its matching is degenerate (README): the match is compared by total cost, and
    the box loss with the stored match injected."""
    batch = batch_of(case, None, device)
    head = tree.map(lambda x: x.detach(), head)
    _, terms = transfusion_loss.loss(head, batch.boxes, batch.labels, batch.boxes_valid, config=config.head)
    targets = terms["targets"]
    for key, ours in (("loss_heatmap", terms["heatmap"]), ("layer_-1_loss_cls", terms["cls"])):
        error = compare.relative(float(ours), float(case.outputs[f"train_all/loss/{key}"]))
        table.add(f"train_all/loss/{key}", error, TRAIN_TOLERANCE)
    _heatmap(case, table, "train_all", targets["heatmap"][0].cpu())
    cost, match = targets["cost"][0].cpu().double(), targets["match"][0].cpu()
    paired = float(cost[match[match >= 0], torch.nonzero(match >= 0)[:, 0]].sum())
    stored_cost = case.stats["train_all/match_cost"]
    # A sum of terms of both signs: relative to the terms, not to what is left of them.
    table.add(
        "train_all/match_cost", abs(paired - stored_cost) / float(cost.abs().mean() * len(match)), TRAIN_TOLERANCE
    )
    stored = [case.outputs[f"train/head/query_{k}"] for k in ("labels", "index")]
    ours = torch.stack([head["query_labels"][0], head["query_index"][0]], 1).cpu()
    order = compare.order_like(ours, torch.stack(stored, 1).long())
    query, box = case.outputs["train_all/match"].long().T
    pred = torch.cat([head["pred"][-1][k] for k in ("center", "height", "dim", "rot", "vel")], -1)[0].cpu()[order][
        query
    ]
    code = transfusion_loss.encode_boxes(batch.boxes, config.head)[0].cpu()[box]
    weights = torch.tensor(config.head.code_weights)
    injected = config.head.bbox_weight * float(((pred - code).abs() * weights).sum()) / len(box)
    error = compare.relative(injected, float(case.outputs["train_all/loss/layer_-1_loss_bbox"]))
    table.add("train_all/loss/layer_-1_loss_bbox", error, TRAIN_TOLERANCE, "stored match injected")


# -------------------------------------------------------------------------------------- target assignment by itself


def _unit(case: Case, table: Table, config: bevfusion.Config, device: str) -> None:
    """Targets and losses alone, on stored predictions near the annotations."""
    names = ("center", "height", "dim", "rot", "vel", "heatmap")
    spec = case.stats["unit/dense_heatmap_spec"]
    dense = torch.from_numpy(goldens.draw("unit/dense_heatmap", spec, case.manifest.get("seed", 0)))
    inputs = {k: case.inputs[f"unit/{k}"].transpose(1, 2).contiguous().to(device) for k in names}
    inputs["dense_heatmap"] = dense.to(device)
    batch = batch_of(case, None, device)

    def total_loss(values: dict) -> tuple[Tensor, dict]:
        head = {"dense_heatmap": values["dense_heatmap"], "pred": [{k: values[k] for k in names}]}
        return transfusion_loss.loss(head, batch.boxes, batch.labels, batch.boxes_valid, config=config.head)

    gradients, (total, terms) = torch.func.grad_and_value(total_loss, has_aux=True)(inputs)
    cost = terms["targets"]["cost"][0].cpu()
    table.add("unit/cost", compare.relative_l2(cost, case.outputs["unit/cost"]), TRAIN_TOLERANCE)
    _losses(case, table, "unit", float(total), terms)
    Q = cost.shape[0]
    placeholder = {"query_labels": torch.zeros(1, Q, dtype=torch.long), "query_index": torch.arange(Q)[None]}
    _targets(case, table, "unit", placeholder, terms["targets"])
    match = linear_assignment(case.outputs["unit/cost"][None], batch.boxes_valid.cpu())[0]
    paired = float(case.outputs["unit/cost"].double()[match, torch.arange(len(match))].sum())
    table.add("unit/match_cost", compare.relative(paired, case.stats["unit/match_cost"]), 1e-6, "of the stored costs")
    for key, gradient in gradients.items():
        stored = case.outputs[f"unit/grad/{key}"]
        x = gradient.cpu() if key == "dense_heatmap" else gradient.cpu().transpose(1, 2)
        x = compare.sliced(x, case.slicing(f"unit/grad/{key}"))
        table.add(f"unit/grad/{key}", compare.relative_l2(x, stored), TRAIN_TOLERANCE)
