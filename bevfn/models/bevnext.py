"""BEVNeXt (Li et al. 2024, arXiv 2312.01696): camera-only detection in bird's-eye view from many key frames.

BEVDepth's way of lifting images, with a random field over the depth (`views.crf`), and two new ends: a BEV backbone that
fuses the frames (`backbones.res2_fusion`) and a head whose boxes come from a BEV map refined by the images
(`heads.two_stage`). It is trained in two stages: one frame first, then nine with twice the channels.

    config = bevnext.stage_two()
    params, state = bevnext.init(config, seed=0)
    outputs, state = bevnext.apply(params, state, batch, config=config, train=False, policy=Policy())
    detections = bevnext.decode(outputs, config)

Source: BEVNeXt at 9b0e4ad (behaviour; goldens bevnext_stage1, bevnext_stage2).
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bevfn import rng, tree
from bevfn.backbones import res2_fusion, resnet
from bevfn.data.batch import Base, Batch, annotated_boxes, check_base, needed
from bevfn.data.reading import Needs
from bevfn.distributed import Replicas, Train
from bevfn.heads import two_stage
from bevfn.layers import batch_norm
from bevfn.models import cameras
from bevfn.necks import fpn, fpn_lss
from bevfn.precision import Policy
from bevfn.views import camera_grid, crf, depth_net


@dataclass(frozen=True)
class Config:
    """The defaults are the published second stage; the functions below give the others."""

    frames: int = 9
    """key frames, the current one first: 1, or a multiple of the fusion's 3 groups"""
    with_prev: bool = True
    """look at the earlier frames; no: their maps are zeros"""
    backbone: resnet.Config = field(default_factory=resnet.Config)
    neck: fpn.Config = field(default_factory=fpn.Config)
    grid: camera_grid.Config = field(default_factory=lambda: camera_grid.Config(stride=8, depth_m=(1.0, 60.0, 0.5)))
    depth: depth_net.Config = field(
        default_factory=lambda: depth_net.Config(channels=256, context=160, depth_bins=118, deform="context")
    )
    random_field: crf.Config = field(default_factory=crf.Config)
    neck_channels: int = 512
    """inside the BEV neck"""
    head: two_stage.Config = field(
        default_factory=lambda: two_stage.Config(head=two_stage.published_head(1.0), channels=160)
    )
    depth_loss_weight: float = 3.0
    frames_at_once: bool = True
    """run all earlier frames in one call, in evaluation with the key frame, in training each normalised by its own
    statistics; no: one after another"""
    recomputed_statistics: bool = True
    """in training the key frame updates the running statistics of the residual blocks and of the depth branch a second time,
    after the earlier frames: what upstream's activation checkpointing does when it runs them again for the gradient"""

    def __post_init__(self) -> None:
        if self.frames < 1 or (self.frames > 1 and self.frames % 3):
            raise ValueError(f"frames {self.frames} must be 1, the current key frame, or a multiple of 3")
        if any(size % 32 for size in self.grid.image_size):
            raise ValueError(
                f"grid.image_size {self.grid.image_size} must be multiples of 32 pixels, the stride of the backbone's last stage"
            )
        if self.grid.depth_bins != self.depth.depth_bins:
            raise ValueError(
                f"grid.depth_m {self.grid.depth_m} has {self.grid.depth_bins} bins, depth.depth_bins is "
                f"{self.depth.depth_bins}"
            )
        if (self.head.channels, self.head.depth_bins) != (self.depth.context, self.depth.depth_bins):
            raise ValueError(
                f"the depth net has {self.depth.context} context channels and {self.depth.depth_bins} bins, head.channels "
                f"and head.depth_bins are {self.head.channels} and {self.head.depth_bins}"
            )
        if self.head.head.cells != self.grid.cells:
            raise ValueError(f"the grid has {self.grid.cells} cells, head.head.cells is {self.head.head.cells}")

    @property
    def seen(self) -> int:
        """Key frames that are looked at."""
        return self.frames if self.with_prev else 1

    @property
    def pre_process(self) -> resnet.Config:
        """Two residual blocks on every frame's map."""
        return self._on_maps(self.depth.context, blocks=(2,), strides=(1,))

    @property
    def bev_backbone(self) -> resnet.Config | res2_fusion.Config:
        """Three stages on the frames' maps side by side, which are fused first where there are several."""
        C = self.depth.context
        if self.frames == 1:
            return self._on_maps(2 * C, blocks=(2, 2, 2), strides=(2, 2, 2))
        return res2_fusion.Config(
            frames=self.frames, context=C, group_width=3 * C // 8, recompute=self.backbone.recompute
        )

    def _on_maps(self, channels: int, blocks: tuple[int, ...], strides: tuple[int, ...]) -> resnet.Config:
        return resnet.Config(
            channels_in=self.depth.context,
            channels=channels,
            blocks=blocks,
            strides=strides,
            bottleneck=False,
            pool=False,
            stem=False,
            shortcut="convolution",
            torch_init=True,
            recompute=self.backbone.recompute,
        )

    @property
    def bev_neck(self) -> fpn_lss.Config:
        """The backbone's first and last stage, brought to the map's resolution."""
        fine, *_, coarse = self.bev_backbone.stage_channels
        return fpn_lss.Config((fine, coarse), channels=self.neck_channels, channels_out=self.head.head.channels_in)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Path patterns of the leaves that are not trained, for `optim.Group`: none as published."""
        return tuple(f"image.backbone.{path}" for path in self.backbone.frozen)


def stage_one() -> Config:
    """One key frame, 80 channels (bevnext-stage1 and bevnext-pers-pretrained-stage1)."""
    config = Config()
    return replace(
        config, frames=1, depth=replace(config.depth, context=80), head=two_stage.Config(two_stage.published_head(0.2))
    )


def stage_two() -> Config:
    """Nine key frames, 160 channels (bevnext-stage2 and bevnext-pers-pretrained-stage2)."""
    return Config()


def mini(config: Config) -> Config:
    """The same model at a size for demos and CI: 128 x 352 images seen at stride 8, 64 x 64 cells of 1.6 m, narrow layers,
    at most 2 earlier frames."""
    span, C, bins = (-51.2, 51.2, 1.6), 32, 58
    depth = replace(
        config.depth,
        channels_in=64,
        channels=64,
        context=C,
        depth_bins=bins,
        blocks=1,
        dilations=(1, 2, 3),
        dropout=0.1,
    )
    head = replace(config.head.head, channels_in=64, channels=24, cell=(1.6, 1.6), cells=(64, 64))
    return replace(
        config,
        frames=min(config.frames, 3),
        backbone=replace(config.backbone, channels=16, blocks=(2, 2, 2, 2)),
        neck=fpn.Config(channels_in=(128, 256, 512), channels=64),
        grid=replace(config.grid, image_size=(128, 352), depth_m=(2.0, 60.0, 1.0), x_m=span, y_m=span),
        depth=depth,
        neck_channels=64,
        head=replace(config.head, head=head, channels=C, depth_bins=bins, attention_heads=4),
    )


def init(config: Config, seed: int) -> tuple[dict, dict]:
    """(params, state): the pytrees of float32 parameters and batch-norm statistics; same seed, same bytes."""
    generator = torch.Generator().manual_seed(seed)
    backbone = config.bev_backbone
    stages = resnet if isinstance(backbone, resnet.Config) else res2_fusion
    made = {
        "image": {
            "backbone": resnet.init(config.backbone, generator),
            "neck": fpn.init(config.neck, generator),
        },
        "view": {
            "depth_net": depth_net.init(config.depth, generator),
            "crf": crf.init(config.random_field),
            "pre_process": resnet.init(config.pre_process, generator),
        },
        "bev": {
            "backbone": stages.init(backbone, generator),
            "neck": fpn_lss.init(config.bev_neck, generator),
        },
        "head": two_stage.init(config.head, generator),
    }
    return tree.unzip(made)


def apply(
    params: dict,
    state: dict,
    batch: Batch,
    *,
    config: Config,
    train: Train,
    policy: Policy = Policy(),  # noqa: B008
    key: Tensor | None = None,
) -> tuple[dict, dict]:
    """Runs the detector.

    Only the current key frame carries a gradient. Earlier ones are lifted by their own poses straight into its grid, but
    see its camera vectors and its colours, as published. In training each of them normalises by its own statistics and
    updates the running ones, after the key frame's.

    Args:
        batch: see `data.batch.Batch`; at least `config.seen` frames.
        train: batch statistics (of all replicas with `Replicas`).
        key: dropout; None switches it off.

    Returns:
        outputs naming every boundary ("colours", "likeness"; "frames": per frame "image": "backbone", "neck"; "view":
        "depth_net", "crf", "depth", "bev", "map"; then "bev": "map", "backbone", "neck"; "head"), and the new
        state.

    Raises ValueError if the batch has fewer frames or images of another size than the configuration.
    """
    check_base(batch, Base.EGO_AT_FRONT, "BEVNeXt")
    images = cameras.images(batch, config.seen, config.grid.image_size)
    colours = crf.colours(images[:, 0], config.grid.stride)
    alike = crf.likeness(colours, config.random_field)
    frames, sides = _frames(params, state, batch, alike, config=config, train=train, policy=policy, key=key)
    maps = [frame["view"]["map"] for frame in frames]
    maps += [torch.zeros_like(maps[0])] * (config.frames - len(maps))
    bev = torch.cat(maps, 1)  # B T*C Y X
    backbone = config.bev_backbone
    weights, statistics = params["bev"], state["bev"]
    if isinstance(backbone, resnet.Config):
        stages, trunk = resnet.apply(weights["backbone"], statistics["backbone"], bev, config=backbone, train=train)
    else:
        stages, trunk = res2_fusion.apply(
            weights["backbone"], statistics["backbone"], bev, config=backbone, train=train
        )
    x, neck = fpn_lss.apply(
        weights["neck"], statistics["neck"], stages[1], stages[-1], config=config.bev_neck, train=train
    )
    view = frames[0]["view"]
    head, head_state = two_stage.apply(
        params["head"],
        state["head"],
        x,
        view["depth_net"]["context"].float(),
        view["depth"],
        batch,
        config=config.head,
        image_size=config.grid.image_size,
        train=train,
    )
    outputs = {"colours": colours, "likeness": alike, "frames": frames}
    outputs |= {"bev": {"map": bev, "backbone": stages, "neck": x}, "head": head}
    return outputs, {**sides, "bev": {"backbone": trunk, "neck": neck}, "head": head_state}


def _frames(
    params: dict,
    state: dict,
    batch: Batch,
    alike: Tensor,
    *,
    config: Config,
    train: Train,
    policy: Policy,
    key: Tensor | None,
) -> tuple[list[dict], dict]:
    """(outputs of every frame that is looked at, the image side's new state)."""

    calls = _calls(config, bool(train))
    if batch.tables is not None and len(batch.tables) != len(calls):
        raise ValueError(
            f"the batch's tables are of {len(batch.tables)} calls, the model has {len(calls)} of its frames "
            f"({'training' if train else 'evaluation'}); make tables by the config that is run"
        )
    given = dict(zip(calls, batch.tables or ()))

    def run(params: dict, state: dict, frames: tuple[int, ...], train: Train) -> tuple[dict, dict]:
        site = None if key is None else rng.fold(key, frames[0])
        groups = cameras.as_groups(train, len(frames))
        tables = given.get(frames)
        return _lift(
            params, state, batch, alike, frames, config=config, train=groups, policy=policy, key=site, tables=tables
        )

    weights, before = ({part: made[part] for part in ("image", "view")} for made in (params, state))
    count = config.seen
    if config.frames_at_once and not train:
        together, now = run(weights, before, tuple(range(count)), train)
        first, *rest = cameras.per_frame(together, count)
        return [first, *tree.map(lambda leaf: leaf.detach(), rest)], now
    first, after = run(weights, before, (0,), train)
    outputs, now, earlier = [first], after, range(1, count)
    if config.frames_at_once and len(earlier):
        held = tree.map(lambda leaf: leaf.detach(), weights)
        together, now = run(held, now, tuple(earlier), train)
        outputs += cameras.per_frame(together, len(earlier))
    else:
        in_turn, now = cameras.over_frames(
            lambda params, state, t, train: run(params, state, (t,), train),
            weights,
            now,
            order=earlier,
            learning=(),
            train=train,
        )
        outputs += in_turn
    if train and config.recomputed_statistics:
        now = _again(before, after, now)
    return outputs, now


def _calls(config: Config, train: bool) -> list[tuple[int, ...]]:
    """The frames that `_lift` gets at once, call by call."""
    every = tuple(range(config.seen))
    if not config.frames_at_once:
        return [(t,) for t in every]
    return [frames for frames in ((every[:1], every[1:]) if train else (every,)) if frames]


def with_tables(batch: Batch, *, config: Config, train: bool) -> Batch:
    """The batch, on the CPU, with the `camera_grid.pool_tables` of every call of `_lift`, which `apply` then does not compute: the
    same cells, bit for bit. On an Ascend NPU pooling without them is half of a step (docs/ascend.md)."""
    moments = [cameras.frames_as_samples(batch, frames) for frames in _calls(config, train)]
    with torch.no_grad():
        return replace(batch, tables=[camera_grid.pool_tables(moment, 0, config.grid) for moment in moments])


def _again(before: dict, after: dict, now: dict) -> dict:
    """The state `now` as `Config.recomputed_statistics` says, from those `before` and `after` the key frame."""

    def of(side: dict) -> dict:
        net = side["view"]["depth_net"]
        return {"stages": side["image"]["backbone"]["stages"], "blocks": net["blocks"], "aspp": net["aspp"]}

    seen = batch_norm.again(*(of(side) for side in (before, after, now)))
    image = {**now["image"], "backbone": {**now["image"]["backbone"], "stages": seen["stages"]}}
    net = {**now["view"]["depth_net"], "blocks": seen["blocks"], "aspp": seen["aspp"]}
    return {**now, "image": image, "view": {**now["view"], "depth_net": net}}


def _lift(
    params: dict,
    state: dict,
    batch: Batch,
    alike: Tensor,
    frames: tuple[int, ...],
    *,
    config: Config,
    train: Train,
    policy: Policy,
    key: Tensor | None,
    tables: dict[str, Tensor] | None,
) -> tuple[dict, dict]:
    """Images of some frames to their BEV maps in the key frame's base, frame after frame along the first axis."""
    moment = cameras.frames_as_samples(batch, frames)
    known = depth_net.camera_vectors(batch).repeat(len(frames), 1)
    x = cameras.normalise(needed(moment.images, "images")[:, 0], order="bgr").to(policy.compute)  # T*B*N 3 H W
    image, weights, seen = params["image"], params["view"], state["view"]
    maps, backbone = resnet.apply(image["backbone"], state["image"]["backbone"], x, config=config.backbone, train=train)
    x = fpn.apply(image["neck"], maps[2:])
    net, net_state = depth_net.apply(
        weights["depth_net"], seen["depth_net"], x, known, config=config.depth, train=train, key=key
    )
    field = crf.apply(weights["crf"], net["logits"], alike, config=config.random_field)
    place, intervals = camera_grid.located(camera_grid.frustum_points(moment, 0, config.grid), config.grid, tables)
    bev = camera_grid.pool(field["depth"], net["context"].float(), place, config.grid, intervals)  # T*B C Y X float32
    stages, pre_process = resnet.apply(
        weights["pre_process"], seen["pre_process"], bev.to(policy.compute), config=config.pre_process, train=train
    )
    view = {"depth_net": net, "crf": field, "depth": field["depth"], "bev": bev, "map": stages[1]}
    new = {"image": {"backbone": backbone}, "view": {"depth_net": net_state, "pre_process": pre_process}}
    return {"image": {"backbone": maps, "neck": x}, "view": view}, new


def needs(config: Config) -> Needs:
    """What the model reads of a batch."""
    return Needs(
        model="BEVNeXt",
        base=Base.EGO_AT_FRONT,
        classes=config.head.head.classes,
        image_size=config.grid.image_size,
        frames=config.seen,
        depth=config.depth_loss_weight > 0,
    )


def loss(
    params: dict,
    state: dict,
    batch: Batch,
    key: Tensor | None = None,
    *,
    config: Config,
    policy: Policy = Policy(),  # noqa: B008
    train: Train = True,
    replicas: Replicas | None = None,
) -> tuple[Tensor, tuple[dict, dict]]:
    """Training loss, in the form that `train.make_step` takes once config, policy, train and replicas are bound.

    train: True, or `Replicas` for batch statistics and loss normalisers over all replicas.
    replicas: as published: the detection losses' normalisers over all replicas and the depth loss' of each, whether batch
    statistics are its own or, later in stage 2, those of all (`train`).

    Returns:
        total (0-d float32) and (new state, metrics: loss terms "loss/*", "num_pos", "bad/targets").

    Raises ValueError if the batch has no annotations, or no depth while the depth loss counts.
    """
    annotated = annotated_boxes(batch)
    outputs, new = apply(params, state, batch, config=config, train=train, policy=policy, key=key)
    pooled = train if isinstance(train, Replicas) else None
    detection = two_stage.loss(outputs["head"], *annotated, config=config.head, replicas=replicas or pooled)
    depth = cameras.key_frame_depth_loss(outputs, batch, config, pooled if replicas is None else None)
    total, metrics = cameras.total_loss(detection, depth)
    return total, (new, metrics)


def decode(outputs: dict, config: Config) -> dict[str, Tensor]:
    """Detections from the outputs: see `heads.two_stage.decode`."""
    return two_stage.decode(outputs["head"]["tasks"], config.head)


def predict(
    params: dict,
    state: dict,
    batch: Batch,
    *,
    config: Config,
    policy: Policy = Policy(),  # noqa: B008
) -> dict[str, Tensor]:
    """Detections of a batch in evaluation mode, in the augmented ego frame of the key frame."""
    outputs, _ = apply(params, state, batch, config=config, train=False, policy=policy)
    return decode(outputs, config)
