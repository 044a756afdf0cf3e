"""Where a run's key frames come from: a nuScenes root, a T4 data set, data of one's own, a mixture of these, an info file, a
folder with one frame, or a synthetic world made on the spot. Each becomes a Source, of which everything else reads; what is known
of a split is in its Index."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from bevfn import synth
from bevfn.data import cameras, depth, infos, mixed, nuscenes, own, t4, t4_folders, tables
from bevfn.data.index import Index, Packed, pack
from bevfn.data.reading import Reading
from bevfn.names import printable

Kind = Literal["nuscenes", "t4", "own", "mixed", "frame", "synthetic"]
World = synth.Format
Default = TypeVar("Default")
VERSION = "v1.0-trainval"  # of nuScenes, unless another is asked for
KINDS: dict[Kind, str] = {
    "nuscenes": "nuScenes roots",
    "t4": "T4 data sets",
    "own": "data of one's own",
    "mixed": "mixtures",
    "frame": "single key frames",
}
FOR = (
    "T4 data sets are for the models of bevfn.experiments.awml (but awml-nuscenes-lidar) and for pretraining's awml-..., nuScenes "
    "roots for all others, and bevfn.experiments.custom takes data of every kind"
)
WORLDS: dict[World, Path] = {"nuscenes": Path("runs/world"), "t4": Path("runs/world_t4")}
WORLD_IMAGE = (450, 800)  # half of nuScenes' image size: decoding is what two cores wait for
SIZES: dict[World, tuple[int, int]] = {
    "nuscenes": (10, 20),
    "t4": (50, 4),
}  # scenes, key frames of each, at 2 and 10 Hz


@dataclass(frozen=True)
class Source:
    """Key frames to train on, and to be judged by."""

    training: Index
    evaluation: Index

    def __post_init__(self) -> None:
        ours, theirs = set(self.training.class_names), set(self.evaluation.class_names)
        if ours != theirs:
            differing = _listed(sorted(ours ^ theirs))
            raise ValueError(
                f"{self.training.root} annotates {_listed(self.training.class_names)}, but {self.evaluation.root} "
                f"{_listed(self.evaluation.class_names)}; they differ in {differing}: take both from data sets of the "
                "same classes"
            )
        if self.training is not self.evaluation:
            self._check_apart()

    def _check_apart(self) -> None:
        """Raises ValueError where key frames or scenes of one split are in the other: scores would be of what was trained on."""
        theirs = self.evaluation.positions
        if shared := [place for token, place in theirs.items() if token in self.training.positions]:
            scene = self.evaluation[shared[0]].scene
            such = f", such as those of {printable(scene)}" if scene else ""
            raise ValueError(
                f"{self.training.root} ({self.training.version}): {len(shared):,} of the {len(theirs):,} key frames of the "
                f"evaluation split '{printable(self.evaluation.split)}' are in the training split "
                f"'{printable(self.training.split)}' too{such}, so that it would be scored by what it learned; take them out of "
                "one of the two (splits.json), or name others with --train-split and --eval-split"
            )
        if both := sorted(self.evaluation.scenes & self.training.scenes):  # in two revisions, say
            raise ValueError(
                f"{self.training.root} ({self.training.version}): {len(both):,} of the {len(self.evaluation.scenes):,} scenes of "
                f"the evaluation split '{printable(self.evaluation.split)}', such as {printable(both[0])}, are in the training "
                f"split '{printable(self.training.split)}' too, with other key frames (of another revision?), so that it would be "
                "scored by what it learned; take them out of one of the two lists, or name others with --train-split and "
                "--eval-split"
            )


def kind(root: Path | None) -> Kind:
    """What lies at a data root, by which a recipe chooses its flags' defaults; an info file is one of nuScenes."""
    if root is None:
        return "synthetic"
    if (root / "frame.json").is_file():
        return "frame"
    if mixed.is_mixture(root):
        return "mixed"
    if set(tables.versions(root)) - {t4_folders.TABLES}:
        return "nuscenes"
    if t4_folders.is_t4(root):
        return "t4"
    return "own" if own.scenes(root) else "nuscenes"


def is_world(root: Path | None) -> bool:
    """Whether that is a synthetic world, of `bevfn data synth` or made because there was no root."""
    return root is None or (root / synth.DESCRIPTION).is_file()


def of_kind(defaults: Mapping[Kind, Default], root: Path | None) -> Default:
    """The defaults for what lies at a data root. Raises ValueError, one sentence, where a recipe is for other data."""
    found = kind(root)
    if found in defaults:
        return defaults[found]
    one = next(iter(defaults.values()))
    what = {
        "t4": f"{root} is a T4 data set",
        "nuscenes": f"{root} is no T4 data set: neither it nor a folder up to three below has annotation/ with T4's tables",
        "own": f"{root} is data of one's own ({own.FILE})",
        "mixed": f"{root} is a mixture of data sets",
    }
    raise ValueError(
        f"{what.get(found, f'{root} is of another kind')}, but {getattr(one, 'model', 'this recipe')} is trained on "
        f"{' and '.join(KINDS[known] for known in defaults if known in KINDS)}; {FOR}"
    )


def prepare(root: Path | None, world: World = "nuscenes") -> None:
    """Makes the synthetic world that a run without a data root needs, unless it is there; for one process."""
    if root is None and not WORLDS[world].exists():
        scenes, frames = SIZES[world]
        print(f"no --data-root: making a synthetic world of {scenes} scenes in {WORLDS[world]} (once)", flush=True)
        made = partial(synth.write, WORLDS[world], scenes=scenes, seed=0, frames_per_scene=frames)
        made(image_size=WORLD_IMAGE, format=world)


def open(
    root: Path | None,
    version: str = VERSION,
    training: str | None = None,
    evaluation: str | None = None,
    world: World = "nuscenes",
) -> Source:
    """The source at a data root, of these splits; None: those that nuScenes has for it, or train and val of a T4 data set's
    lists. A single frame is both splits, and so are an info file, a single T4 scene, and the split that is named for the
    evaluation too. version: of nuScenes; of T4 a number asks for that revision of its scenes, and nuScenes' names for none.
    world: in which format the synthetic world is, where there is no root.

    Raises ValueError, one sentence, for a root, version or split that is not there, where a split must be named, and for
    different splits that share key frames.
    """
    if root is None:
        root, version = WORLDS[world], VERSION
    found = kind(root)
    if found == "t4":
        return _open_t4(root, t4_folders.revision_of(version), training, evaluation)
    if found == "own":
        return _open_own(root, training, evaluation)
    if found == "mixed":
        return _open_mixed(mixed.read(root), training or evaluation)
    if root.is_file() or found == "frame":
        if training or evaluation:
            raise ValueError(f"{root} has no splits; leave out the split {training or evaluation!r}")
        only = infos.read(root if root.is_file() else root / "frame.json")
        return Source(only, only)
    names = _split_names(root, version, training, evaluation)
    if names[0] == names[1] and evaluation is None:
        raise ValueError(
            f"--train-split {printable(names[0])} is what would be evaluated on too, so that scores would be of what was "
            "learned; name another one with --eval-split, or the same if that is meant"
        )
    first = nuscenes.index(root, version, names[0])
    return Source(first, first if names[0] == names[1] else nuscenes.index(root, version, names[1]))


def training(root: Path, version: str | None, split: str | None, *, workers: int = 1) -> Index:
    """A nuScenes root's or T4 data set's split to train on; version: None for the only one, of T4 for the highest revision of
    each scene; split: None for that of the defaults; workers: processes that build T4's. Raises ValueError."""
    if kind(root) == "t4":
        default, _ = t4_folders.default_splits(root) or ("train", "")
        return t4.index(root, split or default, revision=t4_folders.revision_of(version), workers=workers)
    if kind(root) == "own":
        default, _ = own.default_splits(root) or ("train", "")
        return own.index(root, split or default)
    if kind(root) == "mixed":
        raise ValueError(
            f"{root} is a mixture; name one of its data sets, each of which has what is made of it for itself"
        )
    version = version or tables.only_version(root)
    tables.check_root(root, version)
    default, _ = tables.default_splits(root, version) or ("train", "")
    return nuscenes.index(root, version, split or default)


def _open_t4(root: Path, revision: str | None, training: str | None, evaluation: str | None) -> Source:
    if training is None or evaluation is None:
        defaults = t4_folders.default_splits(root)
        if defaults is None:
            raise ValueError(
                f"{root} is a T4 data set whose lists have no splits train and val; name with --train-split and --eval-split what "
                f"to take of {', '.join(t4_folders.splits(root, revision))} (all: every scene, also for both), or put AWML's lists "
                "(DATABASE.yaml) or a splits.json there"
            )
        training, evaluation = training or defaults[0], evaluation or defaults[1]
    first = t4.index(root, training, revision=revision)
    return Source(first, first if training == evaluation else t4.index(root, evaluation, revision=revision))


def _open_own(root: Path, training: str | None, evaluation: str | None) -> Source:
    if training is None or evaluation is None:
        defaults = own.default_splits(root)
        if defaults is None:
            raise ValueError(
                f"{root} has no splits train and val; write lists of its scenes into {root / tables.SPLITS}, such as "
                f'{{"train": ["{own.scenes(root)[0]}", ...], "val": [...]}}, or name with --train-split and --eval-split what to take '
                f"of {', '.join(own.splits(root))} (all: every scene, also for both)"
            )
        training, evaluation = training or defaults[0], evaluation or defaults[1]
    first = own.index(root, training)
    return Source(first, first if training == evaluation else own.index(root, evaluation))


def _open_mixed(mixture: mixed.Mixture, split: str | None) -> Source:
    if split is not None:
        raise ValueError(
            f"{mixture.path} says of which splits it is (train, val); leave out the split {split!r}, or write it there"
        )
    if not any(member.evaluate for member in mixture.members):
        raise ValueError(f"{mixture.path} evaluates none of its data sets; leave evaluate = false out of one")
    opened = [(member, *_open_member(mixture, member)) for member in mixture.members]
    learned = [(member, first) for member, first, _ in opened]
    scored = [(member, second) for member, _, second in opened if member.evaluate]
    return Source(mixed.mix(mixture, learned, "train"), mixed.mix(mixture, scored, "val"))


def _open_member(mixture: mixed.Mixture, member: mixed.Member) -> tuple[Index, Index]:
    """Its splits to train and to evaluate on; of one that is not evaluated on twice the former."""
    found = kind(member.root)
    if found == "mixed":
        raise ValueError(f"{mixture.path} names the mixture {member.root}; name its data sets instead")
    if not member.evaluate:
        only = training(member.root, member.version, member.train)
        return only, only
    version = member.version or (tables.only_version(member.root) if found == "nuscenes" else VERSION)
    made = open(member.root, version, member.train, member.val)
    if made.training is made.evaluation:
        raise ValueError(
            f"{mixture.path}: {member.root} would be evaluated on what is trained on, {printable(made.training.split)}; name two "
            "splits of it (train, val), or write evaluate = false"
        )
    return made.training, made.evaluation


def _split_names(root: Path, version: str, training: str | None, evaluation: str | None) -> tuple[str, str]:
    if training is not None and evaluation is not None:
        return training, evaluation
    tables.check_root(root, version)
    defaults = tables.default_splits(root, version)
    if defaults is None:
        flags = [flag for flag, name in (("--train-split", training), ("--eval-split", evaluation)) if name is None]
        raise ValueError(
            f"{root}, {version}, has no splits of nuScenes' names; name with {' and '.join(flags)} what to take of "
            f"{', '.join(tables.splits(root, version)) or 'a splits.json, which it needs'}"
        )
    return training or defaults[0], evaluation or defaults[1]


def trained_on(root: Path | None, version: str, training: str | None, split: str, world: World = "nuscenes") -> str:
    """A sentence about the scenes of a split that a run on the split `training` (None: the default) was trained on; empty
    where there are none, or no splits. Raises ValueError for a wrong root or version."""
    root = WORLDS[world] if root is None else root
    found, present = kind(root), dict[str, list[str]]()
    if found == "t4":
        listed, defaults = t4_folders.splits(root, t4_folders.revision_of(version)), t4_folders.default_splits(root)
        present |= {name: [scene.name for scene in members] for name, members in listed.items()}
    elif found == "own":
        present, defaults = own.splits(root), own.default_splits(root)
    elif root.is_file() or found in ("frame", "mixed"):
        return ""
    else:
        tables.check_root(root, version)
        present, defaults = tables.splits(root, version), tables.default_splits(root, version)
    scenes, learned = set(present.get(split, [])), training or (defaults or ("",))[0]
    if not (seen := scenes & set(present.get(learned, []))):
        return ""
    what = f"{len(seen):,} of the {len(scenes):,} scenes of split '{printable(split)}' were trained on"
    return f"{what}, so these scores say little about other data"


def check(index: Index, reading: Reading, *, train: bool, whole: bool = True, labels: bool = True) -> None:
    """Raises ValueError, one sentence that names both, where a split has not what a reading asks for.

    whole: every key frame must have an image of every camera, not only some. labels: its classes must be annotated.
    """
    name = f"{index.root} ({index.version}, split {index.split!r})" if index.split else str(index.root)
    if (reading.points is not None or reading.depth) and not index.has("lidar"):
        what = "LiDAR points" if reading.points is not None else "depth maps, which are made of LiDAR points"
        raise ValueError(
            f"{name} has no LiDAR scans, but the model reads {what}; choose a camera model, or another root"
        )
    if missing := [channel for channel in reading.channels if channel not in index.channels]:
        raise ValueError(
            f"{name} has no camera {', '.join(missing)}, which the model reads; it has "
            f"{_listed(index.channels) or 'none'}: choose a LiDAR model, or another root"
        )
    for channel in reading.channels:
        if blind := _blind(index, channel):
            raise ValueError(
                f"{name}: its data sets have different cameras, and {blind[0]} has no {channel}; name with --cameras those to read, "
                "which all must have, or let one stand for the other (cameras, in the mixture's file)"
            )
    for channel in reading.channels if whole else ():
        if lacking := index.lacking(channel):
            raise ValueError(
                f"{name} has no image of {channel} at {lacking:,} of its {len(index):,} key frames; complete its tables, or "
                "train with --on-damaged skip, which leaves these key frames out"
            )
    if reading.cameras is not None:
        cameras.check_sizes(index, reading.cameras)
    if reading.depth:
        depth.prepared(index)  # of these key frames, if there is any
    if reading.base.needs_ego_poses and not index.has("ego poses"):
        raise ValueError(
            f"{name} has no ego poses, but the model's base frame is the {reading.base.value}; read the data set's own tables"
        )
    if reading.cameras is not None and reading.cameras.history == "time" and len(index) > 1 and not index.has("scenes"):
        raise ValueError(
            f"{name} does not say of which scene its key frames are, but the recipe takes earlier ones by time within a "
            "scene; read the data set's own tables, or take them scene by scene (--no-published-history)"
        )
    if labels and (missing := [known for known in reading.class_names if known not in index.class_names]):
        raise ValueError(
            f"{name} does not annotate {', '.join(missing)}, which the model detects; it annotates "
            f"{_listed(index.class_names)}"
        )
    if train and not index.annotated:
        raise ValueError(
            f"{name} has no annotations of the classes {_listed(index.class_names)}, so nothing can be learned there; train on "
            "another split (--train-split)"
        )
    if train and reading.velocities and not index.has("velocity"):
        raise ValueError(f"{name} has no velocities of objects, but the model learns them; train on another root")


def _blind(index: Index, channel: str) -> list[str]:
    """Data sets of a mixture that have not that camera at all."""
    if not index.shares or not isinstance(index.frames, Packed):
        return []
    column = index.frames.columns
    owners = np.repeat(np.arange(len(index)), np.diff(column["camera_start"]))
    seeing = owners[column["channel_words"][column["channel"]] == channel.encode()]
    ends = np.cumsum([share.frames for share in index.shares])
    counts = np.bincount(np.searchsorted(ends, seeing, side="right"), minlength=len(ends))
    return [share.root for share, count in zip(index.shares, counts) if not count]


def check_scored(index: Index, attributes: Collection[str]) -> None:
    """Raises ValueError, one sentence, where detections in the key frames could not be scored.

    attributes: those that nuScenes' scores know, "" among them.
    """
    if index.judge == "recall":
        return
    name, other = f"{index.root} ({index.version}, split {index.split!r})", "evaluate on another split (--eval-split)"
    column = (index.frames if isinstance(index.frames, Packed) else pack(index)).columns
    if not index.annotated:
        classes = "ten classes" if index.judge == "nuscenes" else f"classes {', '.join(index.class_names)}"
        raise ValueError(f"{name} has no annotations of the {classes}, so nothing can be scored there; {other}")
    if index.judge != "nuscenes":  # its scores alone know attributes
        return
    scored = column["names_words"][column["names"]] != b""
    found = [column["attributes_words"][code].decode() for code in np.unique(column["attributes"][scored])]
    if unknown := [attribute for attribute in found if attribute not in attributes]:
        raise ValueError(
            f"{name} annotates the attribute '{printable(unknown[0])}', which nuScenes' scores do not know: a box has one of "
            f"{', '.join(filter(None, attributes))} or none; {other}"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(printable, names))
