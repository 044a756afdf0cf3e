"""`bevfn export`: a checkpoint as a file for another runtime, verified there. Its flags; the work is `exporting`'s, which imports
what help need not wait for."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from bevfn import catalogue
from bevfn.choices import one_of


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

    model.onnx (stock operators, fixed shapes; needs `pip install -e '.[export]'`; --to autoware: from voxels, for its BEVFusion
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
    asked = dict(locals())
    from bevfn.commands import exporting

    return exporting.export(**asked)
