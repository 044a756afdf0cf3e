"""`bevfn export`: a checkpoint as a file for another runtime, verified there."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from PIL import Image
from tyro.conf import Positional

from bevfn import catalogue, detector
from bevfn.choices import one_of
from bevfn.data import inputs, scene, source
from bevfn.data.batch import Batch, Sample, collate
from bevfn.data.reading import Reading
from bevfn.export import build, kinds, runtimes
from bevfn.files import check_new_folder
from bevfn.synth import key_frame, rig


def export(
    checkpoint: Positional[Path],
    *,
    out: Path,
    to: Literal["onnx", "autoware", "air", "aoti"] = "onnx",
    runtime: str | None = None,
    model: Annotated[str | None, one_of(catalogue.MODELS)] = None,
    entry: Annotated[Literal["points", "voxels"], tyro.conf.arg(name="input")] = "points",
    precision: Literal["fp32", "fp16"] = "fp32",
    averages: bool = True,
    data: Path | None = None,
    scene_name: Annotated[str | None, tyro.conf.arg(name="scene")] = None,
    version: str | None = None,
    columns: str = "",
    intensity: bool | None = None,
    fuser_kernel: Literal[3, 5] | None = None,
    point_capacity: int | None = None,
    voxel_capacity: int | None = None,
    site_capacity: tuple[int, ...] | None = None,
) -> int:
    """Writes the whole detector, from points and images to boxes, as a file that needs no bevfn, and verifies it.

    model.onnx (stock operators, fixed shapes; needs `pip install 'bevfn[export]'`; --to autoware: from voxels, for its BEVFusion
    node, with the parameters that this reads), model.air (an Ascend graph for CANN's atc; needs `make npu`) or model.pt2
    (compiled by AOTInductor for this CPU; needs a C++ compiler), manifest.json (inputs, outputs, capacities, what was compared),
    example.npz (an example of both). docs/deploy.md reads them. Exit code 1, and nothing is left, if what the file computes is
    not what the eager detector does.

    Args:
        checkpoint: as of `bevfn predict`: a run's folder, a step's, an imported file or a published one
        out: folder for the files, new or empty
        to: kind of file: onnx for onnxruntime, and with --input voxels for OpenVINO; autoware: ONNX with the plugins of its
            BEVFusion node (models with a LiDAR); air for Ascend; aoti for CPU servers with libtorch
        runtime: of --to autoware: the plugins' version, 2.7 or 2.8 (default)
        model: that the weights are of; by default the run's, or what the published file looks like
        entry: where the file begins: at points, or at voxels, which the vehicle's program then makes
        precision: fp16: half-precision weights and activations; sums by index, positions and geometry stay float32
        averages: a run's averaged weights, if it has any; no: those that it trained
        data: what the file is verified on, its first key frame: as of `bevfn predict`; by default a generated key frame
        scene_name: of a data set: see `bevfn predict`
        version: of a nuScenes root that has several, or the revision of T4 scenes
        columns: of bare clouds: see `bevfn predict`
        intensity: of awml-lidar: see `bevfn predict`
        fuser_kernel: of awml-camera-lidar: 3 of AWML's releases up to 2.0
        point_capacity: room for points; this and the next two are by default the run's, and what does not fit is counted by
            the file's outputs "overflow/..."
        voxel_capacity: voxels
        site_capacity: active sites at each level of the sparse encoder
    """
    for flag, given in (("--scene", scene_name), ("--version", version)):
        if data is None and given is not None:
            raise ValueError(f"{flag} is of --data; give --data, or leave {flag} out")
    folder = kinds.folder(to)
    check_new_folder(out)
    options = _options(to, entry, runtime)
    flags: dict[str, Any] = {"intensity": intensity, "fuser_kernel": fuser_kernel, "point_capacity": point_capacity}
    flags |= {"voxel_capacity": voxel_capacity, "site_capacity": site_capacity}
    made = detector.load(checkpoint, model=model, averages=averages, precision=precision, **flags)
    float32 = None
    if precision != "fp32":
        float32 = detector.load(checkpoint, model=model, averages=averages, precision="fp32", **flags)
    with _shown(data, made.config.scale) as place:
        made = made.at(place)
        full = made if float32 is None else float32.at(place)  # one object: the detector runs once
        index = inputs.read(place, scene_name, version, columns)
        reading = made.ready(index)
        sample = scene.load(index, 0, reading)
        batch, counts = _collated(sample, reading)
        if to == "autoware" and reading.cameras is not None:
            options["picture"] = _picture(sample)
        what = "a generated key frame" if data is None else f"key frame {sample.token} of {data.resolve().name}"
        try:
            print(folder(made, full, batch, out, data=what, counts=counts, **options))
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
