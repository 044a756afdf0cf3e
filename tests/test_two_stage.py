"""BEVNeXt's head: both stages, which gradients flow between them, losses against their formulas, the golden cases."""

import math
from dataclasses import replace

import bevnext_case
import ge_graphs
import pytest
import small_cameras
import torch
from safetensors.torch import load_file

from bevfn import tree
from bevfn.distributed import Replicas
from bevfn.heads import centerpoint, centerpoint_loss, two_stage
from bevfn.parity import golden

SIZE = (32, 96)
CONFIG = two_stage.Config(
    head=replace(
        two_stage.published_head(),
        channels_in=6, channels=4, tasks=(1, 3), lower=(-12.0, -12.0), cell=(2.0, 1.5), cells=(16, 12), queries=20,
        nms=("rotated", "circle"), nms_thresholds=(0.2, 1.0), nms_rescale=(1.0, 0.7, 2.0, 1.0), max_per_task=6,
    ),
    channels=8, depth_bins=5, attention_heads=2, heights_m=(-2.0, 2.0, 1.0),
)  # fmt: skip
Y, X = CONFIG.head.cells
needs_goldens = pytest.mark.skipif(not bevnext_case.FOLDERS[0].is_dir(), reason=bevnext_case.MISSING)
goldens = pytest.mark.parametrize("folder", bevnext_case.FOLDERS, ids=lambda folder: folder.name)


def make(seed=0):
    """(params, state, bev, context, depth, batch)."""
    generator = torch.Generator().manual_seed(seed)
    params, state = two_stage.init(CONFIG, generator)
    for name in ("offsets", "weights"):  # which start at 0: the cells' positions would change nothing
        params["refine"]["attention"][name]["weight"].normal_(generator=generator)
    bev, context = torch.randn(2, 6, Y, X, generator=generator), torch.randn(4, 8, 4, 12, generator=generator)
    depth = torch.randn(4, 5, 4, 12, generator=generator).softmax(1)
    return params, state, bev, context, depth, small_cameras.make(size=SIZE)


def run(params, state, bev, context, depth, batch, *, train=True):
    return two_stage.apply(params, state, bev, context, depth, batch, config=CONFIG, image_size=SIZE, train=train)


def loss(outputs, batch, **options):
    return two_stage.loss(outputs, batch.boxes, batch.labels, batch.boxes_valid, config=CONFIG, **options)


def test_tasks_have_the_first_stages_heatmaps_and_the_seconds_codes():
    params, state, *rest = make()
    outputs, new = run(params, state, *rest)
    assert tree.diff(new, state) == []
    for t, classes in enumerate(CONFIG.head.tasks):
        maps = outputs["tasks"][t]
        widths = {name: map_.shape[1] for name, map_ in maps.items()}
        assert widths == {"heatmap": classes, **centerpoint.OUTPUTS}
        assert torch.equal(maps["heatmap"], outputs["proposal"]["tasks"][t]["heatmap"])
        assert all(torch.equal(maps[name], outputs["bbox"]["tasks"][t][name]) for name in centerpoint.OUTPUTS)
    features = rest[1] + outputs["depth_embedding"]
    assert torch.equal(outputs["refine"]["features"], features)
    refined, _ = centerpoint.apply(
        params["bbox"], state["bbox"], outputs["refine"]["map"], config=CONFIG.bbox, train=True
    )
    assert torch.equal(refined["shared"], outputs["bbox"]["shared"])


def gradients(name):
    """Of one sum of losses, with respect to (params, bev, context, depth)."""
    params, state, bev, context, depth, batch = make()

    def term(params, bev, context, depth):
        return loss(run(params, state, bev, context, depth, batch)[0], batch)[1][name]

    return torch.func.grad(term, argnums=(0, 1, 2, 3))(params, bev, context, depth)


def size(gradient):
    return sum(float(leaf.abs().sum()) for leaf in tree.leaves(gradient))


def test_heatmap_losses_reach_only_the_first_stage():
    params, bev, context, depth = gradients("heatmap")
    assert size(params["proposal"]) > 0 and size(bev) > 0
    assert size([params["depth_embedding"], params["refine"], params["bbox"], context, depth]) == 0


def test_box_losses_reach_all_but_the_first_stage_and_the_depth():
    params, bev, context, depth = gradients("bbox")
    for part in (params["bbox"], params["refine"], params["depth_embedding"], bev, context):
        assert size(part) > 0
    assert size([params["proposal"], depth]) == 0
    learning = {path: size(leaf) for path, leaf in tree.flatten(params["refine"]).items()}
    assert all(value > 0 for value in learning.values()), learning


def test_box_losses_reach_the_bev_map_only_through_the_queries():
    params, state, bev, context, depth, batch = make()
    params["refine"]["shared"]["norm"]["weight"] = torch.zeros(8)  # queries that do not depend on the map

    def term(bev, name):
        return loss(run(params, state, bev, context, depth, batch)[0], batch)[1][name]

    assert size(torch.func.grad(term)(bev, "bbox")) == 0 and size(torch.func.grad(term)(bev, "heatmap")) > 0


def test_losses_are_their_formulas():
    _, _, *rest = made = make()
    batch = rest[-1]
    outputs, _ = run(*made)
    total, terms = loss(outputs, batch)
    found = terms["targets"]
    names = [f"task{t}/{name}" for t in range(2) for name in ("heatmap", "xy", "z", "whl", "yaw", "vel")]
    assert set(names) <= set(terms)
    weights = dict(zip(("reg", "height", "dim", "rot", "vel"), (1.0, 1.0, 1.0, 1.0, 0.2)))
    for t, maps in enumerate(outputs["tasks"]):
        target, p = found["heatmaps"][t].double(), maps["heatmap"].double().sigmoid().clamp(1e-4, 1 - 1e-4)
        focal = torch.where(
            target == 1, -(p.log()) * (1 - p) ** 2, -((1 - p).log()) * p**2 * (1 - target) ** 4
        ).sum() / max(1, int((target == 1).sum()))
        assert float(terms[f"task{t}/heatmap"]) == pytest.approx(float(focal), rel=1e-5)
        sums, count, first = dict.fromkeys(weights, 0.0), 0, 0
        for b, g in found["members"][t].nonzero().tolist():
            row, column = divmod(int(found["cell"][b, g]), X)
            count, first = count + 1, 0
            for name, weight in weights.items():
                predicted = maps[name][b, :, row, column]
                wanted = found["code"][b, g, first : first + len(predicted)]
                sums[name] += 0.25 * weight * float((predicted - wanted).abs().sum())
                first += len(predicted)
        assert count > 0
        for name, term in two_stage.TERMS.items():
            assert float(terms[f"task{t}/{term}"]) == pytest.approx(sums[name] / (count + 1e-4), rel=1e-5)
    assert float(total) == pytest.approx(sum(float(terms[name]) for name in names), rel=1e-6)
    assert float(terms["heatmap"] + terms["bbox"]) == pytest.approx(float(total), rel=1e-6)
    assert float(terms["vel"]) == pytest.approx(float(terms["task0/vel"] + terms["task1/vel"]), rel=1e-6)
    assert int(terms["num_pos"]) == int(found["inside"].sum()) and int(terms["bad_boxes"]) == 0


class TwoReplicas(Replicas):
    """Another replica that saw `OTHERS` objects of every task."""

    OTHERS = 5.0

    def mean(self, x):
        return (x + self.OTHERS) / 2


def test_normalisers_are_averaged_over_replicas():
    made = make()
    outputs, batch = run(*made)[0], made[-1]
    _, alone = loss(outputs, batch)
    _, shared = loss(outputs, batch, replicas=TwoReplicas("none", rank=0, count=2))
    own = float(alone["targets"]["members"][1].sum())
    for name in ("heatmap", *two_stage.TERMS.values()):
        ratio = float(alone[f"task1/{name}"] / shared[f"task1/{name}"])
        assert ratio == pytest.approx((own + 5.0) / 2 / own, rel=1e-3 if name == "heatmap" else 1e-4), name


def test_a_task_without_boxes_costs_no_box_loss():
    made = make()
    outputs, batch = run(*made)[0], made[-1]
    batch = replace(batch, labels=torch.zeros_like(batch.labels))
    total, terms = loss(outputs, batch)
    assert torch.isfinite(total) and all(float(terms[f"task1/{name}"]) == 0 for name in two_stage.TERMS.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(dtype):
    params, state, bev, context, depth, batch = make()
    exact, _ = run(params, state, bev, context, depth, batch)
    half, _ = run(params, state, bev.to(dtype), context, depth, batch)
    for ours, theirs in zip(half["tasks"], exact["tasks"]):
        for name, map_ in theirs.items():
            assert ours[name].dtype == torch.float32
            limit = 0.02 if dtype == torch.float16 else 0.1
            assert float((ours[name] - map_).norm() / map_.norm()) < limit, name


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="channels 100 must be a multiple of twice the 8 heads"):
        two_stage.Config(channels=100)
    with pytest.raises(ValueError, match="must hold an even number of steps"):
        two_stage.Config(heights_m=(-5.0, 4.0, 1.0))
    made = make()
    with pytest.raises(ValueError, match=r"BEV map is \(16, 6\) cells"):
        run(*made[:2], made[2][..., :6], *made[3:])


def test_decoding_reaches_an_npu_graph():
    ge_graphs.need_torchair()
    config = replace(CONFIG, head=replace(CONFIG.head, max_per_task=2))
    tasks = run(*make(), train=False)[0]["tasks"]

    def decoded(*maps):
        found = two_stage.decode(tree.unflatten(dict(zip(tree.flatten(tasks), maps)), tasks), config)
        return found["boxes"], found["scores"], found["labels"], found["valid"].int()

    ge_graphs.round_trip(decoded, *tree.leaves(tasks))


# ----------------------------------------------------------------------------------------------------- golden cases


@needs_goldens
@goldens
def test_the_published_head_has_the_tensors_of_the_golden_checkpoint(folder):
    stage_2 = folder.name.endswith("2")
    config = two_stage.Config(two_stage.published_head(1.0 if stage_2 else 0.2), channels=160 if stage_2 else 80)
    weights = golden.read_manifest(folder)["weights"]
    heads = ("proposal_head.", "depth_emb.", "transformer_neck.", "pts_bbox_head.")
    theirs = sorted(
        math.prod(spec["shape"])
        for key, spec in weights.items()
        if key.startswith(heads) and not key.endswith("num_batches_tracked")
    )
    ours = two_stage.init(config, torch.Generator().manual_seed(0))
    assert sorted(leaf.numel() for leaf in tree.leaves(ours)) == theirs


def decoded_maps(stored, head):
    """The stored heatmaps, and codes that put every stored candidate where it was decoded."""
    tasks = []
    Y, X = head.cells
    for t in range(len(head.tasks)):
        heatmap, boxes = stored[f"eval/proposal_head/task{t}/heatmap_logits"], stored[f"eval/decoded/task{t}/bboxes"]
        cell = torch.topk(torch.sigmoid(heatmap).flatten(), len(boxes))[1] % (Y * X)
        place = (boxes[:, :2] - torch.tensor(head.lower)) / torch.tensor(head.cell)
        reg = place - torch.stack([cell % X, cell // X], -1)
        assert float(reg.abs().max()) < 3  # the same cells as upstream's
        code = torch.zeros(10, Y * X)
        yaw = boxes[:, 6]
        values = [reg, boxes[:, 2:3], boxes[:, 3:6].log(), torch.stack([yaw.sin(), yaw.cos()], -1), boxes[:, 7:]]
        code[:, cell] = torch.cat(values, -1).T
        parts = code.view(1, 10, Y, X).split(list(centerpoint.OUTPUTS.values()), 1)
        tasks.append({"heatmap": heatmap, **dict(zip(centerpoint.OUTPUTS, parts))})
    return tasks


@needs_goldens
@goldens
def test_decoding_gives_the_golden_detections_in_their_order(folder):
    """From whole heatmaps through top-k, score and range filters and both kinds of suppression."""
    config, stored = two_stage.Config(), load_file(folder / "outputs.safetensors")
    found = two_stage.decode(decoded_maps(stored, config.head), config)
    keep = found["valid"][0]
    assert torch.equal(found["labels"][0, keep], stored["eval/result/labels_3d"].long())
    torch.testing.assert_close(found["scores"][0, keep], stored["eval/result/scores_3d"], atol=1e-6, rtol=0)
    torch.testing.assert_close(found["boxes"][0, keep], stored["eval/result/boxes_3d"], atol=2e-5, rtol=0)


@needs_goldens
@goldens
def test_targets_are_those_of_the_golden_case(folder):
    config, stored = two_stage.Config().head, load_file(folder / "outputs.safetensors")
    samples = (1,) if folder.name.endswith("2") else (0, 1)
    batch = bevnext_case.key_frame(folder, samples)
    found = centerpoint_loss.targets(batch.boxes, batch.labels, batch.boxes_valid, config)
    for t, (first, count) in enumerate(zip(config.first_class, config.tasks)):
        name = f"train/target/task{t}"
        heatmap = torch.zeros_like(found["heatmaps"][t])
        heatmap[tuple(stored[f"{name}/heatmap_index"].long().T)] = stored[f"{name}/heatmap_value"]
        torch.testing.assert_close(found["heatmaps"][t], heatmap, atol=1e-7, rtol=0)
        rows = []  # upstream's slots: a task's boxes class by class, in annotation order
        for b in range(len(samples)):
            of_class = [(batch.labels[b] == k) & batch.boxes_valid[b] for k in range(first, first + count)]
            rows += [(b, g) for mask in of_class for g in mask.nonzero()[:, 0].tolist()]
        place = tuple(torch.tensor(rows).T)
        assert bool(found["inside"][place].all()) and len(rows) == len(stored[f"{name}/slot"])
        assert torch.equal(found["cell"][place], stored[f"{name}/ind"].long())
        torch.testing.assert_close(found["code"][place], stored[f"{name}/anno_box"], atol=1e-6, rtol=0)
