"""BEVNeXt: frames in one call are frames one after another, statistics move as published, gradients reach what they must."""

import itertools
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import small_cameras
import small_steps
import torch
from graph_counts import graph_counts
from torch.utils._python_dispatch import TorchDispatchMode

from bevfn import tree
from bevfn.backbones import resnet
from bevfn.data.batch import Base
from bevfn.distributed import Groups, Replicas
from bevfn.heads import centerpoint, two_stage
from bevfn.layers import batch_norm
from bevfn.models import bevnext, cameras
from bevfn.necks import fpn
from bevfn.training import optim
from bevfn.views import camera_grid, crf, depth_net


def tiny(frames):
    """Every part of the model at the smallest size that exercises it: 32 x 96 images, 16 x 16 cells."""
    head = centerpoint.Config(
        channels_in=16,
        channels=8,
        tasks=(1, 2),
        heatmap_bias=None,
        lower=(-16.0, -16.0),
        cell=(2.0, 2.0),
        cells=(16, 16),
        queries=20,
        nms=("rotated", "circle"),
        nms_thresholds=(0.2, 1.0),
        nms_rescale=(1.0, 0.7, 2.0),
        max_per_task=8,
    )
    return bevnext.Config(
        frames=frames,
        backbone=resnet.Config(channels=4, blocks=(1, 1, 1), strides=(1, 2, 2)),
        neck=fpn.Config(channels_in=(32, 64), channels=8),
        grid=camera_grid.Config(
            image_size=(32, 96), stride=8, depth_m=(2.0, 34.0, 4.0), x_m=(-16.0, 16.0, 2.0), y_m=(-16.0, 16.0, 2.0)
        ),
        depth=depth_net.Config(
            channels_in=8,
            channels=8,
            context=8,
            depth_bins=8,
            blocks=1,
            dilations=(1, 2),
            weight_groups=2,
            deform="context",
        ),
        random_field=crf.Config(iterations=2, colour_deviation=30.0),
        neck_channels=16,
        head=two_stage.Config(head, channels=8, depth_bins=8, attention_heads=2),
    )


@cache
def initial(frames):
    """Parameters and statistics after a few steps' worth of noise: no block is its shortcut, no statistic a 0 or 1."""
    params, state = bevnext.init(tiny(frames), seed=0)
    generator = torch.Generator().manual_seed(1)
    params = tree.map(lambda leaf: leaf + 0.05 * torch.randn(leaf.shape, generator=generator), params)
    return params, tree.map(lambda leaf: leaf + 0.2 * torch.rand(leaf.shape, generator=generator), state)


def batch(frames, **given):
    return replace(small_cameras.make(T=frames, classes=3, **given), base=Base.EGO_AT_FRONT)


def stepped(config, data=None):
    """(gradients, (loss, (new state, metrics))) of a training step without dropout."""
    params, state = initial(config.frames)
    data = batch(config.frames) if data is None else data
    return torch.func.grad_and_value(lambda p: bevnext.loss(p, state, data, config=config), has_aux=True)(params)


def close(ours, theirs, tolerance):
    """Every leaf's error relative to its norm, and to the largest leaf's by 1e-6."""
    ours, theirs = tree.flatten(ours), tree.flatten(theirs)
    whole = max(float(leaf.norm()) for leaf in theirs.values())
    for name, leaf in theirs.items():
        error = float((ours[name] - leaf).norm())
        assert error <= tolerance * float(leaf.norm()) + 1e-6 * whole, (name, error, float(leaf.norm()))


# --- frames ---


def test_earlier_frames_in_one_call_are_frames_one_after_another_in_evaluation():
    config, data = tiny(3), batch(3)
    params, state = initial(3)
    at_once, in_turn = (
        bevnext.apply(params, state, data, config=replace(config, frames_at_once=how), train=False)
        for how in (True, False)
    )
    assert [*tree.flatten(at_once[0])] == [*tree.flatten(in_turn[0])]
    close(at_once[0]["frames"], in_turn[0]["frames"], 1e-5)
    close(at_once[0]["bev"], in_turn[0]["bev"], 1e-5)
    assert tree.flatten(at_once[1]).keys() == tree.flatten(state).keys()


def test_earlier_frames_in_one_call_are_frames_one_after_another_in_training():
    """Outputs, statistics and gradients; with the second update of the recomputed parts and without."""
    for recomputed in (True, False):
        config = replace(tiny(3), recomputed_statistics=recomputed)
        at_once, in_turn = (stepped(replace(config, frames_at_once=how)) for how in (True, False))
        close(at_once[1][1][0], in_turn[1][1][0], 1e-5)
        assert float(at_once[1][0]) == pytest.approx(float(in_turn[1][0]), rel=1e-5)
        close(at_once[0], in_turn[0], 1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_tables_that_come_with_the_batch_are_those_that_the_model_makes(at_once, training):
    params, state = initial(3)
    config, data = replace(tiny(3), frames_at_once=at_once), batch(3)
    brought = bevnext.with_tables(data, config=config, train=training)
    brought.validate()
    assert len(brought.tables) == (3 if not at_once else 2 if training else 1)
    here, there = (
        tree.flatten(bevnext.apply(params, state, given, config=config, train=training)) for given in (data, brought)
    )
    assert list(here) == list(there) and all(torch.equal(here[k], there[k]) for k in here)
    moved = replace(brought, tables=[{**made, "cell": made["cell"][:, :1]} for made in brought.tables])
    fewer = replace(brought, tables=brought.tables[1:])
    for wrong, said in (
        (moved, r"cells of frustum points are \[\d, 1, "),
        (fewer, r"tables are of \d calls, the model has \d"),
    ):
        with pytest.raises(ValueError, match=said + ".*make tables by the config that is run"):
            bevnext.apply(params, state, wrong, config=config, train=training)


def test_key_frame_then_earlier_ones_then_the_key_frames_recomputed_parts_update_the_statistics():
    """As the one-frame model on each frame in turn, whose vehicle stands still and which sees no colours, says."""
    blind = crf.Config(iterations=0)
    config, data = replace(tiny(3), random_field=blind), batch(3)
    poses = {k: getattr(data, k)[:, :1].expand_as(getattr(data, k)) for k in ("base_from_camera", "base_from_pixel")}
    data = replace(data, **poses)
    params, state = initial(3)
    _, new = bevnext.apply(params, state, data, config=config, train=True)
    alone = replace(tiny(1), random_field=blind, recomputed_statistics=False)
    ends, rest = ({k: made[k] for k in ("bev", "head")} for made in initial(1))
    ends |= {k: params[k] for k in ("image", "view")}
    seen = [{k: state[k] for k in ("image", "view")}]
    for t in (0, 1, 2, 0):
        shown = replace(data, images=data.images[:, t:])
        _, after = bevnext.apply(ends, {**seen[-1], **rest}, shown, config=alone, train=True)
        seen.append({k: after[k] for k in ("image", "view")})
    once, twice = tree.flatten(seen[3]), tree.flatten(seen[4])  # before and after the key frame's second run
    found = tree.flatten({k: new[k] for k in ("image", "view")})
    assert found.keys() == once.keys()
    for name, leaf in found.items():
        again = name.startswith(("image.backbone.stages.", "view.depth_net.blocks.", "view.depth_net.aspp."))
        torch.testing.assert_close(leaf, (twice if again else once)[name], atol=1e-5, rtol=1e-4, msg=name)


def test_earlier_frames_send_no_gradient():
    config, data = tiny(3), batch(3)
    params, state = initial(3)

    def of_frame(t):
        def total(params):
            outputs, _ = bevnext.apply(params, state, data, config=config, train=True)
            return outputs["frames"][t]["view"]["map"].square().sum()

        return sum(float(g.abs().sum()) for g in tree.leaves(torch.func.grad(total)(params)))

    assert of_frame(0) > 0 and of_frame(1) == of_frame(2) == 0


def test_earlier_frames_are_lifted_by_their_own_poses_but_see_the_key_frames_cameras_and_colours():
    config, data = tiny(3), batch(3)
    params, state = initial(3)

    def earlier(data):
        return bevnext.apply(params, state, data, config=config, train=False)[0]["frames"][1]["view"]

    first = earlier(data)
    moved = replace(data, base_from_camera=data.base_from_camera.clone())
    moved.base_from_camera[:, 1:, :, :3, 3] += 1.0
    assert torch.equal(earlier(moved)["depth"], first["depth"])  # where the camera was enters the place alone
    cells = camera_grid.cells(data, 1, config.grid)
    wanted = camera_grid.pool(first["depth"], first["depth_net"]["context"], cells, config.grid)
    torch.testing.assert_close(first["bev"], wanted)
    assert not torch.allclose(earlier(moved)["bev"], wanted)
    painted = replace(data, images=data.images.clone())
    painted.images[:, 0] = 0  # all patches alike
    assert torch.equal(earlier(painted)["crf"]["start"], first["crf"]["start"])
    assert not torch.allclose(earlier(painted)["depth"], first["depth"])


def test_without_earlier_frames_their_maps_are_zeros():
    config, data = replace(tiny(3), with_prev=False), batch(3)
    params, state = initial(3)
    outputs, new = bevnext.apply(params, state, data, config=config, train=True)
    C = config.depth.context
    assert len(outputs["frames"]) == 1 and outputs["bev"]["map"].shape[1] == 3 * C
    assert not outputs["bev"]["map"][:, C:].any() and outputs["bev"]["map"][:, :C].any()
    stem = state["image"]["backbone"]["stem"]["norm"]["mean"], new["image"]["backbone"]["stem"]["norm"]["mean"]
    one = bevnext.apply(params, state, data, config=tiny(3), train=True)[1]["image"]["backbone"]["stem"]["norm"]["mean"]
    assert not torch.equal(stem[0], stem[1]) and not torch.equal(stem[1], one)


def test_frames_become_samples_and_outputs_frames_again():
    data = batch(3)
    both = cameras.frames_as_samples(data, (2, 0))
    assert both.images.shape[:2] == (4, 1) and torch.equal(
        both.images[:, 0], torch.cat([data.images[:, 2], data.images[:, 0]])
    )
    assert torch.equal(both.undo_base_aug[2:], data.undo_base_aug) and both.boxes is None
    split = cameras.per_frame({"x": torch.arange(6)}, 3)
    assert [part["x"].tolist() for part in split] == [[0, 1], [2, 3], [4, 5]]
    assert cameras.as_groups(False, 3) is False and cameras.as_groups(True, 1) is True
    assert cameras.as_groups(True, 3) == Groups(3)


class Counter(TorchDispatchMode):
    """Of the operators that are called, which are a trace's nodes."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def nodes(config):
    """Of a training pass."""
    params, state = bevnext.init(config, seed=0)
    with Counter() as counter:
        bevnext.apply(params, state, batch(config.frames), config=config, train=True)
    return counter.calls


def test_eight_earlier_frames_in_one_call_are_little_more_than_half_the_graph_of_eight_in_turn():
    """Counted in eager operators: in one call batch norm is written out, by groups, and else it is one."""
    at_once, in_turn = nodes(tiny(9)), nodes(replace(tiny(9), frames_at_once=False))
    print(at_once, in_turn)
    assert at_once < 0.6 * in_turn


# --- the step ---


@cache
def ran(frames, precision, backend):
    """(metrics of every step, last train state, graph counts) of 2 steps."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    optimizer = optim.Config(lr=optim.Schedule(1e-3), eps=1.0, clip_norm=5.0)
    return *small_steps.run(bevnext, tiny(frames), batch(frames), optimizer, precision, backend, 2), graph_counts()


QUICK = {(3, "fp16", "aot_eager")}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product((1, 3), ("fp32", "fp16"), ("aot_eager", "inductor"))
]


@pytest.mark.parametrize(("frames", "precision", "backend"), CASES)
def test_compiled_step_equals_eager_in_one_graph(frames, precision, backend):
    """With aot_eager bit for bit but for the gradients' sums; tolerances of inductor as for BEVDepth, against eager fp32."""
    inductor = backend == "inductor"
    eager, eager_state, _ = ran(frames, "fp32" if inductor else precision, "eager")
    compiled, compiled_state, counts = ran(frames, precision, backend)
    assert counts == {"graphs": 1, "breaks": 0}
    assert all(metrics["skipped"] == 0 and metrics["num_pos"] > 0 for metrics in compiled)
    loose = precision == "fp16"
    first, later, leaf = ((5e-2, 2e-1, 3e-1) if loose else (2e-4, 2e-3, 2e-2)) if inductor else (1e-6, 1e-5, 1e-5)
    for i, (a, b) in enumerate(zip(eager, compiled)):
        for name in a:
            limit = first if i == 0 else later
            assert b[name] == pytest.approx(a[name], rel=limit, abs=limit), (i, name)
    start = bevnext.init(tiny(frames), seed=0)[0]
    small_steps.compare_leaves(start, eager_state, compiled_state, leaf)


def test_half_precision_steps_follow_single_precision():
    single, half = (ran(3, precision, "eager")[0] for precision in ("fp32", "fp16"))
    for name in ("loss/total", "loss/heatmap", "loss/bbox", "loss/depth"):
        assert half[0][name] == pytest.approx(single[0][name], rel=2e-2), name


def test_gradients_reach_every_parameter():
    """But one whose L1 loss may have as many signs of either kind."""
    gradients, (_, (new, _)) = stepped(tiny(3))
    still = {name for name, g in tree.flatten(gradients).items() if not g.any()}
    assert still <= {"head.bbox.tasks.0.vel.out.bias"}
    state = initial(3)[1]
    assert all(not torch.equal(a, b) for a, b in zip(tree.leaves(state), tree.leaves(new)))


@pytest.mark.parametrize("frames", [1, 3])
def test_the_loss_falls(frames):
    config, data = tiny(frames), batch(frames)
    params, state = initial(frames)
    losses = []
    for _ in range(4):
        slopes, (total, _) = torch.func.grad_and_value(
            lambda p: bevnext.loss(p, state, data, config=config), has_aux=True
        )(params)
        norm = sum(float(g.square().sum()) for g in tree.leaves(slopes)) ** 0.5
        params = tree.map(lambda p, g, norm=norm: p - 0.01 * g / norm, params, slopes)
        losses.append(float(total))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_held_statistics_stand_still_also_where_they_would_move_twice():
    config, data = tiny(3), batch(3)
    params, state = initial(3)
    paths = {f"image.backbone.stages.0.0.layers.{i}.norm" for i in range(3)}
    held = batch_norm.hold(state, paths)
    _, new = bevnext.apply(params, held, data, config=config, train=True)
    for i in range(3):
        before, after = (made["image"]["backbone"]["stages"][0][0]["layers"][i]["norm"] for made in (held, new))
        assert torch.equal(before.mean, after.mean) and torch.equal(before.var, after.var)


@dataclass(frozen=True)
class Twin(Replicas):
    """One of two replicas, the other of which sees the same batch, its statistics `ratio` times as large."""

    group: str = "none"
    rank: int = 0
    count: int = 2
    ratio: float = 1.0
    asked: list[int] = field(default_factory=list)
    """sizes of what the batch norms shared"""

    def sum(self, x):
        return 2 * x

    def stack(self, x):
        self.asked.append(x.numel())
        return torch.stack([x, self.ratio * x])


def test_all_batch_norms_ask_the_other_replicas_once_for_the_key_frame_and_once_for_the_earlier_ones():
    config, data = tiny(3), batch(3)
    params, state = initial(3)
    twin = Twin()
    shared, _ = bevnext.apply(params, state, data, config=config, train=twin)
    norms = [(name.split(".")[0], leaf.numel()) for name, leaf in tree.flatten(state).items() if name.endswith("mean")]
    # counted rows, means and variances; a channel of each of the two earlier frames in one call
    expected = [1 + 2 * C for _, C in norms] + [1 + 2 * 2 * C for part, C in norms if part in ("image", "view")]
    assert sorted(twin.asked) == sorted(expected)
    alone, _ = bevnext.apply(params, state, data, config=config, train=True)
    close(shared["head"]["tasks"], alone["head"]["tasks"], 1e-4)


def test_dropout_needs_a_key_and_differs_from_key_to_key():
    config, data = tiny(1), batch(1)
    params, state = initial(1)
    key = torch.tensor(7)
    logits = [
        bevnext.apply(params, state, data, config=config, train=True, key=k)[0]["frames"][0]["view"]["depth_net"][
            "logits"
        ]
        for k in (None, key, key, key + 1)
    ]
    assert torch.equal(logits[1], logits[2])
    assert not torch.equal(logits[0], logits[1]) and not torch.equal(logits[1], logits[3])


# --- sizes and bad input ---


@pytest.mark.parametrize("make", [bevnext.stage_one, bevnext.stage_two])
def test_published_stages_and_their_mini_sizes_are_consistent(make):
    config = bevnext.mini(make())
    assert config.frames == min(make().frames, 3)
    params, state = bevnext.init(config, seed=0)
    data = batch(config.frames, B=1, size=config.grid.image_size)
    outputs, _ = bevnext.apply(params, state, data, config=config, train=False)
    assert outputs["bev"]["map"].shape == (1, config.frames * config.depth.context, *config.grid.cells)
    assert make().head.head.code_weights[-1] == (0.2 if make().frames == 1 else 1.0)
    assert bevnext.needs(make()).frames == make().frames
    assert config.frozen == ()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not():
    a, b, c = (tree.flatten(bevnext.init(tiny(3), seed=s)[0]) for s in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_bad_batches_and_settings_are_one_sentence():
    config = tiny(3)
    params, state = initial(3)
    for wrong, message in (
        (batch(2), "the batch has 2 frames, the model takes 3; read more key frames"),
        (batch(3, size=(64, 96)), r"images are \(64, 96\) pixels"),
        (replace(batch(3), depth=None), "the batch has no depth maps"),
        (replace(batch(3), boxes=None), "the batch has no boxes"),
    ):
        with pytest.raises(ValueError, match=message):
            bevnext.loss(params, state, wrong, config=config)
    for change, message in (
        ({"frames": 0}, "frames 0 must be 1, .* or a multiple of 3"),
        ({"frames": 4}, "frames 4 must be 1, .* or a multiple of 3"),
        ({"depth": replace(config.depth, depth_bins=9)}, "has 8 bins, depth.depth_bins is 9"),
        ({"depth": replace(config.depth, context=16)}, "16 context channels and 8 bins, head.channels and .* 8 and 8"),
        ({"grid": replace(config.grid, x_m=(-16.0, 16.0, 1.0))}, r"the grid has \(16, 32\) cells, head.head.cells"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, **change)


class OfMore(Replicas):
    """Other processes that count 5 of everything."""

    def sum(self, x):
        return x + 5


def test_the_depth_loss_has_its_own_normaliser_where_the_detection_losses_have_that_of_all_processes():
    params, state = initial(1)
    config, data = tiny(1), batch(1)
    alone, of_more = (
        bevnext.loss(params, state, data, config=config, replicas=replicas)[1][1]
        for replicas in (None, OfMore("", 0, 1))
    )
    assert torch.equal(alone["loss/depth"], of_more["loss/depth"]) and float(alone["loss/depth"]) > 0
    for name in ("loss/heatmap", "loss/bbox"):
        assert 0 < float(of_more[name]) < 0.9 * float(alone[name])
