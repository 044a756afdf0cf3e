"""The golden cases of BEVNeXt as tests take them: inputs as a batch, a checkpoint's tensors by name."""

from pathlib import Path

import torch

from bevfn.data.batch import Base, Batch
from bevfn.data.batch import make as make_batch
from bevfn.files import read_json
from bevfn.parity import compare, golden

FOLDERS = [Path(__file__).parents[1].parent / "shared" / "goldens" / f"bevnext_stage{stage}" for stage in (1, 2)]
MISSING = "the golden cases of BEVNeXt (../shared/goldens) are not here"


def key_frame(inputs: dict[str, torch.Tensor], samples: tuple[int, ...], *, boxes: int = 64) -> Batch:
    """The six cameras of the key frame and the boxes of stored samples, without images."""

    def stack(name: str) -> torch.Tensor:
        return torch.stack([inputs[f"sample{s}/{name}"][:6] for s in samples])

    def square(matrix: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        made = torch.eye(4).repeat(*matrix.shape[:-2], 1, 1)
        made[..., :3, :3] = matrix
        if offset is not None:
            made[..., :3, 3] = offset
        return made

    padded, labels, valid = torch.zeros(len(samples), boxes, 9), torch.zeros(len(samples), boxes).long(), []
    for i, s in enumerate(samples):
        count = len(inputs[f"sample{s}/gt_boxes"])
        padded[i, :count], labels[i, :count] = inputs[f"sample{s}/gt_boxes"], inputs[f"sample{s}/gt_labels"]
        valid.append(torch.arange(boxes) < count)
    intrinsics, pose = square(stack("intrins")), square(stack("rots"), stack("trans"))
    return make_batch(
        base=Base.EGO_AT_FRONT,
        base_aug=square(torch.stack([inputs[f"sample{s}/bda"] for s in samples])),
        boxes=padded,
        labels=labels,
        boxes_valid=torch.stack(valid),
        images=torch.zeros(len(samples), 1, 6, 1, 1, 3, dtype=torch.uint8),
        intrinsics=intrinsics[:, None],
        image_aug=square(stack("post_rots"), stack("post_trans"))[:, None],
        base_from_camera=pose[:, None],
        image_from_base=(intrinsics @ torch.linalg.inv(pose))[:, None],
    )


def weight(folder: Path, key: str) -> torch.Tensor:
    """One tensor of the case's checkpoint."""
    manifest = golden.read_manifest(folder)
    return torch.from_numpy(golden.draw(key, manifest["weights"][key], manifest["seed"]))


def stored(folder: Path, name: str, whole: torch.Tensor) -> torch.Tensor:
    """The part of a whole boundary that the case stores under this name."""
    entry = read_json((folder / "stats.json").read_bytes())["tensors"][name]
    assert list(whole.shape) == entry["shape"], name
    return compare.sliced(whole, entry["slice"])
