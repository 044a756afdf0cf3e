"""What `bevfn export` does: the detector of a checkpoint written as a file for another runtime, on a key frame it is verified on."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from bevfn import detector, waiting
from bevfn.data import inputs, scene, source
from bevfn.data.batch import Batch, Sample, collate
from bevfn.data.reading import Reading
from bevfn.export import build, kinds, runtimes
from bevfn.files import check_new_folder
from bevfn.synth import key_frame, rig


def export(
    checkpoint: Path,
    *,
    out: Path,
    to: Literal["onnx", "autoware", "air", "aoti"],
    runtime: str | None,
    model: str | None,
    entry: Literal["points", "voxels"],
    precision: Literal["fp32", "fp16"],
    averages: bool,
    data: Path | None,
    scene_name: str | None,
    version: str | None,
    columns: str,
    intensity: bool | None,
    fuser_kernel: Literal[3, 5] | None,
    point_capacity: int | None,
    voxel_capacity: int | None,
    site_capacity: tuple[int, ...] | None,
) -> int:
    """`bevfn export` of these flags, see `commands.export`: its exit code."""
    for flag, given in (("--scene", scene_name), ("--version", version)):
        if data is None and given is not None:
            raise ValueError(f"{flag} is of --data; give --data, or leave {flag} out")
    folder = kinds.folder(to)
    check_new_folder(out)
    options = _options(to, entry, runtime)
    flags: dict[str, Any] = {"intensity": intensity, "fuser_kernel": fuser_kernel, "point_capacity": point_capacity}
    flags |= {"voxel_capacity": voxel_capacity, "site_capacity": site_capacity}
    float32 = None
    with waiting.told("reading the weights"):
        made = detector.load(checkpoint, model=model, averages=averages, precision=precision, **flags)
        if precision != "fp32":
            float32 = detector.load(checkpoint, model=model, averages=averages, precision="fp32", **flags)
    with _shown(data, made.config.scale) as place:
        made = made.at(place)
        full = made if float32 is None else float32.at(place)  # one object: the detector runs once
        with waiting.told("reading the data set"):
            index = inputs.read(place, scene_name, version, columns)
            reading = made.ready(index)
            sample = scene.load(index, 0, reading)
        batch, counts = _collated(sample, reading)
        if to == "autoware" and reading.cameras is not None:
            options["picture"] = _picture(sample)
        what = "a generated key frame" if data is None else f"key frame {sample.token} of {data.resolve().name}"
        try:
            with waiting.told(f"writing and verifying {to}"):
                told = folder(made, full, batch, out, data=what, counts=counts, **options)
            print(told)
        except build.Differs as error:
            print(error)
            return 1
    print(f"{made.config.model}, {precision}, as {to}: all in {out}")
    return 0


def _options(to: str, entry: str, runtime: str | None) -> dict[str, Any]:
    """What the kind of file has of its own. Raises ValueError, one sentence, for flags of another."""
    if to != "autoware":
        if runtime is not None:
            raise ValueError("--runtime is of --to autoware; leave it out")
        return {"entry": entry}
    if entry != "points":
        raise ValueError("--input is of the other kinds, and autoware's node makes voxels itself; leave it out")
    runtimes.known(runtime or runtimes.NEWEST)
    return {"runtime": runtime or runtimes.NEWEST}


def _collated(sample: Sample, reading: Reading) -> tuple[Batch, dict[str, int]]:
    """The batch, and how many "points" it has and "overflow/points" had no room; annotations are no matter of an export."""
    batch, counts = collate([sample], capacities=reading.capacities)
    if batch.points_valid is None:
        return batch, {}
    return batch, {"points": int(batch.points_valid.sum()), "overflow/points": counts["overflow/points"]}


def _picture(sample: Sample) -> tuple[int, int] | None:
    """Rows and columns of the cameras' own images, if they are all alike and there are any."""
    sizes = {Image.open(path).size[::-1] for path in sample.image_paths}
    return sizes.pop() if len(sizes) == 1 else None


@contextlib.contextmanager
def _shown(data: Path | None, scale: str) -> Iterator[Path]:
    """What the file is verified on: the user's, or a generated key frame."""
    if data is not None:
        yield data
        return
    with tempfile.TemporaryDirectory(prefix="bevfn-frame-") as folder:
        size = rig.CALIBRATED_SIZE if scale == "published" else source.WORLD_IMAGE
        yield key_frame.write_frame(Path(folder), image_size=size)
