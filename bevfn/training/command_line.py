"""The flags that every experiment has, and how a command line chooses between a recipe's defaults for them."""

import dataclasses
import difflib
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_type_hints

import tyro

from bevfn import catalogue, choices
from bevfn.data import source
from bevfn.files import as_read
from bevfn.precision import Precision
from bevfn.training import limits, located, run_folder

RUNS = located.RUNS
ELSEWHERE = {
    **dict.fromkeys(
        ("--work-dir", "--workdir", "--output-dir", "--out-dir", "--log-dir"), "--run-dir is the run's folder"
    ),
    **dict.fromkeys(("--learning-rate", "--base-lr"), "--lr is the peak learning rate"),
    **dict.fromkeys(("--data", "--dataset", "--dataroot"), "--data-root is the data set's folder"),
    **dict.fromkeys(("--max-steps", "--max-iters", "--iters"), "--steps is their number"),
    **dict.fromkeys(("--num-workers", "--workers-per-gpu"), "--workers is their number"),
    **dict.fromkeys(("--samples-per-gpu", "--train-batch-size"), "--batch-size is their number on each device"),
    **dict.fromkeys(
        ("--ckpt", "--weights"), "--pretrained takes weights to start from, and `bevfn eval` evaluates a checkpoint"
    ),
    **dict.fromkeys(("--fp16", "--bf16"), "--precision fp16 (or bf16) is mixed precision"),
    "--load-from": "--pretrained takes weights to start from, and --resume goes on with the run in --run-dir",
    "--resume-from": "--resume goes on with the run in --run-dir",
    "--auto-resume": "--resume goes on with the run in --run-dir",
    "--amp": "--precision fp16 (or bf16) is mixed precision",
    "--cfg-options": "every number of a recipe is a flag of its own: see --help",
    "--launcher": "torchrun --nproc-per-node N in place of python starts N processes",
    "--gpus": "torchrun --nproc-per-node N in place of python starts N processes, one for each device",
    "--checkpoint": "--pretrained takes weights to start from, and `bevfn eval` evaluates a checkpoint",
    "--max-epochs": "--epochs is their number",
    "--freeze": "--frozen takes paths of parameters that are not trained, such as 'camera.*', in the recipes that have it (--help)",
}
"""Flags that mmdetection3d's tools and Lightning have for what has another name here."""
Scale = choices.Scale


@dataclass(frozen=True)
class Config:
    """Flags that every experiment has; a recipe sets its own defaults."""

    CHOOSES: ClassVar[tuple[str, ...]] = ("model",)
    """fields by whose flags a model's defaults are found"""
    model: str = ""
    """network and recipe, a name of `bevfn.catalogue`"""
    scale: Scale = "published"
    """published: every size as in the paper; mini: the same code at a size for demos and CI"""
    precision: Precision = "fp32"
    """fp16 scales the loss dynamically, in the graph"""
    backend: choices.TrainBackend = "inductor"
    """what compiles the train step; auto: on a CPU nothing in a run too short for compiling to pay, which is printed"""
    eval_backend: choices.Backend = "inductor"
    """what compiles the forward pass of an evaluation"""
    device: str = "auto"
    """torch device: cpu, cuda, cuda:1, npu; auto: an NPU, else a CUDA device, else the CPU, which is printed. Under torchrun each
    process takes its own"""
    mode: Literal["full", "performance"] = "full"
    """full: all epochs, with evaluations; performance: one epoch without, and samples/s after --warm-up steps"""
    warm_up: int = 20
    """steps that performance mode does not count"""
    data_root: Path | None = None
    """a nuScenes root (the folder with v1.0-trainval/ and samples/), a T4 data set (docs/t4.md), data of one's own or a mixture
    (docs/custom_data.md), an info file of mmdetection3d, or a folder with one frame.json; none: a synthetic world in runs/, made
    when missing"""
    version: str = "v1.0-trainval"
    """of the nuScenes root; v1.0-mini trains on mini_train. A number is the revision of a T4 data set's scenes"""
    train_split: str | None = None
    """of the version, also one of its splits.json; none: train, mini_train"""
    eval_split: str | None = None
    """of the version, also one of its splits.json, scored by its own key frames; none: val, mini_val"""
    epochs: int = 1
    """passes over the (class-balanced) training set; the schedules run through all of them"""
    steps: int | None = None
    """optimizer steps instead of epochs; the schedules run through them"""
    batch_size: int = 4
    """samples per device and microbatch"""
    box_capacity: int | None = None
    """room for the annotated boxes of a sample (none: the recipe's); what does not fit is dropped and counted"""
    checkpoint_activations: bool = False
    """blocks of the network keep only what goes in, and are computed again for the gradient: less memory, more time, the
    same numbers (bit for bit but for what a compiler that fuses operators rounds anew)"""
    accumulate: int = 1
    """microbatches per device whose gradients are averaged into one step; 8 on one device are the mathematics of 8 devices,
    rounded otherwise, so that only a run of two resumes as the other without --force"""
    drop_last: bool = False
    """an epoch ends before its last, incomplete batch; no: that one is filled up from the epoch's start"""
    recipe_batch: int = 32
    """the global batch that the published learning rate is for"""
    recipe_lr: float = 1e-3
    """published peak learning rate, for recipe_batch samples"""
    lr: float | None = None
    """peak learning rate, taken as it is; none: the recipe's, scaled by --lr-scaling"""
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """how the recipe's learning rate follows the global batch (batch size x devices x accumulate) / recipe batch"""
    weight_decay: float = 0.01
    clip_norm: float = 35.0
    """global L2 norm of the gradients"""
    ema: float | None = None
    """decay of the averaged parameters that are evaluated; none: they are not averaged"""
    norm_momentum: float | None = None
    """of the batch norms that are published with 0.01, whose statistics need hundreds of steps; none: as published"""
    class_balanced: bool = False
    """CBGS: every class supplies as many key frames as the others"""
    augment: bool = True
    """images, boxes and points are moved, turned, scaled and mirrored at random"""
    sync_statistics: bool = False
    """batch norm and loss normalisers over all devices (of the published recipes BEVNeXt's stage 2 alone, see --sync-after;
    BEVDepth's, MatrixVT's and BEVNeXt's average the detection losses' normalisers alone, which happens anyway)"""
    sync_after: int = 0
    """epochs before --sync-statistics holds: at the change another step is compiled; a run that ends before it has none"""
    workers: int = 4
    """processes per device that read samples; 0: none"""
    on_damaged: Literal["stop", "skip"] = "stop"
    """a sample that cannot be read ends the run, or is replaced by the next one, named and counted; with skip a data set
    that is there in part is trained on and evaluated without the key frames that lack files, which are named first"""
    pretrained: tuple[Path, ...] = ()
    """files of `bevfn checkpoint import` or checkpoint folders of a run; later ones fill what earlier ones left"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0: one per epoch"""
    keep: int = 3
    """checkpoints kept, besides the best"""
    eval_every: int = 1
    """epochs between evaluations; 0: only after the last"""
    eval_last: int = 0
    """last epochs that are all followed by an evaluation, whatever --eval-every says"""
    eval_first: bool = False
    """evaluate the untrained model too"""
    log_every: int = 0
    """steps whose metrics leave the device together, in one copy, which is when it is seen that one is not finite; 0: 10,
    and 1 on a CPU"""
    profile: int = 0
    """steps, behind the third, of which RUN/trace.json.gz shows read, move, step and report (ui.perfetto.dev); 0: none"""
    peak_tflops: float | None = None
    """what the device can do at best in --precision, for the MFU; none: known of A100, H100 and H200 in fp16 and bf16, elsewhere
    there is no MFU"""
    run_dir: Path = Path("runs/run")
    """config.json, metrics.jsonl, tensorboard/, checkpoints/, evaluations/"""
    loggers: tuple[choices.Logger, ...] = ()
    """wandb, mlflow: besides TensorBoard numbers, scores and the worst key frame go there too (pip install -e '.[wandb]',
    '.[mlflow]'; where to, their own environment variables say)"""
    resume: bool = False
    """go on from the latest checkpoint in --run-dir. A run that SIGTERM or Ctrl-C stops saves, and exits with 143 or 130"""
    force: bool = False
    """resume although the config, the data, the processes or the code have changed"""
    seed: int = 0
    """of parameters, augmentation, data order and dropout"""

    def __post_init__(self) -> None:
        limits.check({known: getattr(self, known) for known in limits.LIMITS if hasattr(self, known)})
        if self.sync_after and not self.sync_statistics:
            raise ValueError(
                f"--sync-after {self.sync_after} is of --sync-statistics; add that, or --sync-after 0 if batch norm is to be of "
                "each device"
            )

    @property
    def world(self) -> source.World:
        """In which format the synthetic world is that stands in for no data root."""
        return "nuscenes"

    def completed(self) -> Self:
        """With what is taken from the data root where flags do not say it, as config.json keeps it. Raises ValueError."""
        return self

    def plain(self) -> Self:
        """Without what only training needs: frames as they come, nothing moved or pasted in."""
        return replace(self, class_balanced=False, augment=False)


Defaults = Mapping[str, Mapping[source.Kind, Config]]
"""A recipe's configs: by model, of which the first is trained where none is named, and by what lies at the data root."""


def flags(config: Config) -> dict:
    """The config as plain JSON values."""
    return as_read(dataclasses.asdict(config))


def parse(defaults: Defaults, arguments: list[str], description: str | None = None, prog: str | None = None) -> Any:
    """The config of a command line; --model (and what else `Config.CHOOSES`) and what is at --data-root decide on the
    defaults."""
    replayed, arguments = _replayed(arguments)
    root, first = flag(arguments, "--data-root"), next(iter(defaults.values()))
    some = {name: next(iter(of.values())) for name, of in defaults.items()}  # what chooses is of a model, at any root
    given = {name: flag(arguments, f"--{name}") for name in next(iter(some.values())).CHOOSES}
    chosen = {name: value for name, value in given.items() if value is not None}
    fitting = (m for m, one in some.items() if all(str(getattr(one, n)) == v for n, v in chosen.items()))
    # Tyro names the choices for an unknown model, the config what contradicts a known one.
    _check_model(chosen.get("model"), defaults, None if replayed is None else replayed[1])
    of = defaults.get(next(fitting, chosen.get("model", "")), first)
    default = fitting_root(of, None if root is None else Path(root))
    if replayed is not None:
        stored = run_folder.stored_config(replayed[0], default)
        default = replace(stored, run_dir=default.run_dir, resume=False, force=False)
    module = sys.modules["__main__"].__spec__
    if prog is None and module:
        prog = f"python -m {module.name}"  # not the file's path, which nobody types
    _hint(default, arguments)
    limits.check_words(get_type_hints(type(default)), arguments)
    description = f"{description or ''}\n\n--config FILE, a run's config.json or its folder, sets every flag that is not given as it was there."
    return tyro.cli(type(default), default=default, args=arguments, description=description, prog=prog)


def _check_model(model: str | None, defaults: Defaults, replayed: str | None) -> None:
    """Raises ValueError, with the command that works, for a model of another recipe; replayed: what --config names, if it does."""
    if model is None or model in defaults:
        return
    if model not in catalogue.MODELS:
        if alike := difflib.get_close_matches(model, [*defaults, *catalogue.MODELS], n=1):
            meant = f"--model {alike[0]}" if alike[0] in defaults else f"bevfn train {alike[0]}"
            raise ValueError(
                f"there is no model {model}; did you mean `{meant}`? Models of this recipe: {', '.join(defaults)}"
            )
        return
    recipe, here = catalogue.MODELS[model].experiment, ", ".join(defaults)
    if replayed is not None:
        raise ValueError(
            f"--config {replayed} is of the recipe {recipe}: `bevfn train {recipe} --config {shlex.quote(replayed)}`"
        )
    raise ValueError(f"model {model} is of the recipe {recipe}: `bevfn train {model}`; models of this one are {here}")


def _replayed(arguments: list[str]) -> tuple[tuple[Path, str] | None, list[str]]:
    """((file of --config, as it was typed), the arguments without it and with what chooses the defaults: the flags of that run).
    Raises ValueError."""
    file = flag(arguments, "--config")
    if file is None:
        return None, arguments
    if not file or file.startswith("-"):
        raise ValueError(f"--config takes a run's folder, or its {run_folder.CONFIG_FILE}; name one behind it")
    path = Path(file) / run_folder.CONFIG_FILE if Path(file).is_dir() else Path(file)
    if not path.is_file():
        if Path(file).is_dir():
            why = f"has no {run_folder.CONFIG_FILE}"
        else:
            why = f"is not there ({located.near(Path(file))})"
        raise ValueError(f"--config {file} {why}; give a run's folder, or its {run_folder.CONFIG_FILE}")
    stored = run_folder.read_config(path)
    at = next(place for place, word in enumerate(arguments) if word.partition("=")[0] == "--config")
    rest = arguments[:at] + arguments[at + (1 if "=" in arguments[at] else 2) :]
    for name in ("model", "data_root"):
        if stored.get(name) is not None and flag(rest, f"--{name.replace('_', '-')}") is None:
            rest = [f"--{name.replace('_', '-')}", str(stored[name]), *rest]
    return (path, file), rest


def fitting_root(defaults: Mapping[source.Kind, Config], root: Path | None) -> Config:
    """The defaults for what lies at the data root; those of the synthetic world for one that somebody made. Raises ValueError."""
    found = source.of_kind(defaults, root)
    return defaults["synthetic"] if "synthetic" in defaults and source.is_world(root) else found


def _hint(default: Config, arguments: list[str]) -> None:
    """Raises ValueError for a flag of mmdetection3d's or torchrun's tools that has another name here."""
    for word, following in zip(arguments, [*arguments[1:], "--"]):
        name = word.partition("=")[0].replace("_", "-")
        if name in ELSEWHERE and not hasattr(default, name[2:].replace("-", "_")):
            raise ValueError(f"there is no flag {name}; {ELSEWHERE[name]}")
        if word.endswith(".py"):
            raise ValueError(
                f"{word} is no flag: a recipe takes no config file; its numbers are flags (--help), and --config RUN takes those "
                "of another run"
            )
        if word == "--resume" and not following.startswith("-"):
            raise ValueError(
                f"--resume takes no folder: `--run-dir {shlex.quote(following)} --resume` goes on with the run that is there"
            )


def flag(arguments: list[str], name: str) -> str | None:
    """What a command line gives for --a-flag, before it is parsed: the defaults of the others depend on it."""
    value = None
    for word, following in zip(arguments, [*arguments[1:], ""]):
        given, _, joined = word.partition("=")
        if given.replace("_", "-") == name:
            value = joined or following
    return value
