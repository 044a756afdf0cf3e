"""Everything that bevfn can train, by its one name: where its recipe is, which files start it, what is published.

Names and strings only, so that everything may import it. The choices of `bevfn graph`, `eval`, `bench`, `checkpoint` and
`parity` and the README's table follow from here. A new model is a line of `MODELS`; the code is in its model
(`bevfn/models/`), its recipe (`experiments/`, whose `NETWORKS` has the name), its checkpoint's names (`bevfn/upstream/`) and
its parity map (`bevfn/parity/`), which tests hold against this dictionary.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Published:
    """Figures in percent, and whose they are: of the nuScenes validation split; of AWML on its own T4 data."""

    mean_ap: float
    other: float | None
    """NDS; of T4 data mAPH, None where it is not published"""
    source: str
    t4: bool = False

    def __str__(self) -> str:
        names = (" mAP", " mAPH") if self.t4 else ("", "")
        numbers = [f"{x:g}{name}" for x, name in zip((self.mean_ap, self.other), names) if x is not None]
        return f"{', '.join(numbers)}{' on T4 data' if self.t4 else ''} ({self.source})"


@dataclass(frozen=True)
class Model:
    """A trainable model; its name is the recipe's `--model`."""

    experiment: str
    """file in experiments/"""
    family: str
    """file in bevfn/models/"""
    parameters: float
    """millions"""
    checkpoints: tuple[str, ...]
    """published layouts that `bevfn checkpoint import --model` reads for it: the model's own, if there is one, then parts"""
    published: Published | None = None
    case: str | None = None
    """folder of goldens/ that it is compared with upstream on"""

    @property
    def layout(self) -> str | None:
        """The published layout that holds all of it; None: upstream has no such model."""
        return next((name for name in self.checkpoints[:1] if name not in PARTS), None)


PARTS = ("swin-nuimages", "resnet50", "resnet50-detector")
"""Published layouts of what a model only starts from."""

BEVDEPTH = Model(
    experiment="bevdepth",
    family="bevdepth",
    parameters=76.4,
    checkpoints=("bevdepth-2key", "resnet50"),
    published=Published(33.04, 43.55, "BEVDepth"),
    case="bevdepth_r50_2key",
)
AGGREGATED = replace(
    BEVDEPTH,
    parameters=76.6,
    checkpoints=("bevdepth-2key-da", "resnet50"),
    published=Published(34.84, 48.05, "BEVDepth"),
    case=None,
)
AWML = Model("awml", "bevfusion", 8.3, checkpoints=())
BEVNEXT_1 = Model("bevnext", "bevnext", 65.4, ("bevnext-stage1", "resnet50"), case="bevnext_stage1")
BEVNEXT_2 = Model(
    experiment="bevnext",
    family="bevnext",
    parameters=59.3,
    checkpoints=("bevnext-stage2", "bevnext-stage1"),
    published=Published(43.7, 54.8, "BEVNeXt"),
    case="bevnext_stage2",
)
MODELS: dict[str, Model] = {
    "bevfusion-lidar-camera": Model(
        "bevfusion",
        "bevfusion",
        39.8,
        checkpoints=("bevfusion-lidar-camera", "bevfusion-lidar", "swin-nuimages"),
        published=Published(68.6, 71.4, "mmdetection3d"),
        case="bevfusion_lidar_cam",
    ),
    "bevfusion-lidar": Model(
        "bevfusion_lidar",
        "bevfusion",
        8.3,
        checkpoints=("bevfusion-lidar",),
        published=Published(64.9, 69.6, "mmdetection3d"),
        case="bevfusion_lidar",
    ),
    "bevfusion-camera": Model("bevfusion", "bevfusion", 35.1, checkpoints=("swin-nuimages",)),
    "bevfusion-lidar-masked": Model("pretrain", "masked_voxels", 7.6, checkpoints=()),
    "bevfusion-image": Model("pretrain", "image_branch", 29.3, checkpoints=("swin-nuimages",)),
    "bevfusion-camera-image": Model("pretrain", "image_branch", 29.3, checkpoints=("swin-nuimages",)),
    "bevdepth-2key": BEVDEPTH,
    "bevdepth-2key-ema": replace(BEVDEPTH, published=Published(33.29, 44.09, "BEVDepth")),
    "bevdepth-2key-da": AGGREGATED,
    "bevdepth-2key-da-ema": replace(AGGREGATED, published=Published(35.89, 47.97, "BEVDepth")),
    "bevdepth-1key-ema": Model("bevdepth", "bevdepth", 75.8, checkpoints=("bevdepth-1key", "resnet50")),
    "bevdepth-4key": Model("bevdepth", "bevdepth", 77.6, checkpoints=("bevdepth-4key", "resnet50")),
    "matrixvt": Model(
        "matrixvt",
        "bevdepth",
        79.2,
        checkpoints=("matrixvt", "resnet50"),
        published=Published(32.99, 41.4, "DrivingSDK on GPUs"),
        case="matrixvt_r50",
    ),
    "bevnext-stage1": BEVNEXT_1,
    "bevnext-stage2": BEVNEXT_2,
    "bevnext-pers-stage1": replace(BEVNEXT_1, checkpoints=("bevnext-stage1", "resnet50-detector"), case=None),
    "bevnext-pers-stage2": replace(BEVNEXT_2, published=Published(45.6, 56.0, "BEVNeXt"), case=None),
    "awml-lidar": replace(
        AWML, checkpoints=("awml-lidar",), published=Published(77.77, 74.2, "AWML base/2.7.0", t4=True)
    ),
    "awml-lidar-offline": replace(
        AWML,
        checkpoints=("awml-lidar-offline",),
        published=Published(72.2, None, "AWML base/0.2, without intensity", t4=True),
        case="awml_bevfusion_l_offline",
    ),
    "awml-camera-lidar": replace(
        AWML,
        parameters=41.7,
        checkpoints=("awml-camera-lidar", "awml-lidar", "swin-nuimages"),
        published=Published(80.08, None, "AWML j6gen2/2.0.1, fuser of 3 x 3", t4=True),
        case="awml_bevfusion_cl",
    ),
    "awml-camera": replace(AWML, parameters=31.8, checkpoints=("awml-camera", "swin-nuimages")),
    "awml-nuscenes-lidar": replace(AWML, checkpoints=("bevfusion-lidar",)),
    "awml-lidar-masked": Model("pretrain", "masked_voxels", 7.6, checkpoints=()),
    "awml-lidar-offline-masked": Model("pretrain", "masked_voxels", 7.6, checkpoints=()),
    "awml-image": Model("pretrain", "image_branch", 29.3, checkpoints=("swin-nuimages",)),
    "custom-lidar": Model("custom", "bevfusion", 8.3, checkpoints=("bevfusion-lidar",)),
    "custom-lidar-camera": Model(
        "custom", "bevfusion", 39.8, checkpoints=("bevfusion-lidar-camera", "bevfusion-lidar", "swin-nuimages")
    ),
    "custom-camera": Model("custom", "bevfusion", 35.1, checkpoints=("swin-nuimages",)),
}
PRETEXT = "pretext"
"""Where a model's parameters and statistics have what its pretraining alone needs: a model that starts from it leaves them out."""
FORMER = {
    "bevfusion-lidar-cam": "bevfusion-lidar-camera",
    "two-key": "bevdepth-2key",
    "two-key-ema": "bevdepth-2key-ema",
    "two-key-cbgs-da": "bevdepth-2key-da",
    "two-key-cbgs-da-ema": "bevdepth-2key-da-ema",
    "one-key-ema": "bevdepth-1key-ema",
    "four-key": "bevdepth-4key",
}
"""Names that models had, in run folders and imported files which are older."""
EXPERIMENTS = tuple(dict.fromkeys(model.experiment for model in MODELS.values()))
LAYOUTS = {model.layout: name for name, model in reversed(MODELS.items()) if model.layout is not None}
"""Published layout of a whole model: the first model that it is of."""
CHECKPOINTS = tuple(dict.fromkeys(name for model in MODELS.values() for name in model.checkpoints))


def table() -> str:
    """The README's table, in Markdown."""
    lines = [
        "| `--model` | of `bevfn.experiments.` | parameters | published: mAP, NDS on nuScenes val, or as it says | "
        "parity with upstream |",
        "|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        published = "none" if model.published is None else model.published
        parity = f"golden case `{model.case}`" if model.case else "no golden case"
        lines.append(f"| {name} | {model.experiment} | {model.parameters} M | {published} | {parity} |")
    return "\n".join(lines)
