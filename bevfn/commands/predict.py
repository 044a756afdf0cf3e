"""`bevfn predict`: a checkpoint's detections in data of one's own, as files, pictures, a video and a recording for a viewer."""

from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from bevfn import catalogue, waiting
from bevfn.choices import Backend, Precision, one_of
from bevfn.files import check_new_folder, new_folder

RECORDING = "recording.rrd"


def predict(
    checkpoint: Positional[Path],
    data: Positional[Path],
    *,
    out: Path,
    scene: str | None = None,
    version: str | None = None,
    columns: str = "",
    model: Annotated[str | None, one_of(catalogue.MODELS)] = None,
    averages: bool = True,
    score_threshold: float = 0.1,
    pictures: bool = True,
    video: bool = True,
    fps: float | None = None,
    rrd: bool = False,
    precision: Precision | None = None,
    published_sweeps: bool | None = None,
    intensity: bool | None = None,
    fuser_kernel: Literal[3, 5] | None = None,
    point_capacity: int | None = None,
    voxel_capacity: int | None = None,
    site_capacity: tuple[int, ...] | None = None,
    backend: Backend = "eager",
    device: str = "auto",
    batch_size: int = 1,
    workers: int = 0,
) -> None:
    """Detects objects in key frames that need no annotations, and writes what was found.

    results_nusc.json (nuScenes' form, global frame), frames/ (plain JSON of each key frame, in its LiDAR frame), pictures/,
    video.mp4 where there are several key frames, recording.rrd on demand.

    Args:
        checkpoint: a run's folder (its best), RUN/best, RUN/latest, RUN/checkpoints/step_..., a file of `bevfn checkpoint
            import`, or a published .pth
        data: a nuScenes root, a T4 data set or data of your own, an info file (.pkl, .json), a folder with frame.json, a
            directory of point clouds, or one cloud
        out: folder for the results, new or empty
        scene: of a data set: a scene's name, or a split's; all: every scene; by default its only one
        version: of a nuScenes root that has several, or the revision of T4 scenes
        columns: what the numbers of a point are in clouds without a data set, such as "x y z intensity/1 ring:u1"
            (docs/custom_data.md); by default nuScenes' five
        model: that the weights are of; by default the run's, or what the published file looks like
        averages: a run's averaged weights, if it has any; no: those that it trained
        score_threshold: least score of what frames/, pictures, video and recording show; results_nusc.json has all
        pictures: a picture of each key frame; no: no video either
        video: the pictures as an MP4
        fps: pictures a second of the video; by default the key frames' own pace
        rrd: a recording for the rerun viewer (pip install -e '.[viewer]')
        precision: by default the run's, or fp32
        published_sweeps: of BEVFusion: see `bevfn eval`; by default the run's, or as published
        intensity: of awml-lidar: its weights read the points' intensity; by default the run's, or what the file looks like
        fuser_kernel: of awml-camera-lidar: 3 of AWML's releases up to 2.0; by default as intensity
        point_capacity: room for the points of a key frame, for a LiDAR that is denser than the run's; this and the next two
            are by default the run's, and what does not fit is reported
        voxel_capacity: voxels of a key frame
        site_capacity: active sites of a key frame at each level of the sparse encoder
        backend: what compiles the forward pass; inductor first takes a minute or more, which many key frames win back
        device: torch device; auto: an NPU, a CUDA device or the CPU, the first that there is
        batch_size: key frames at a time
        workers: processes that read; 0: none
    """
    from bevfn import detector, host  # and torch, which help need not wait for
    from bevfn.data import inputs
    from bevfn.evaluation import predicted, tables, viewer
    from bevfn.training import located

    check_new_folder(out)
    if rrd:
        viewer.check()
    host.keep_freed_memory()
    flags: dict[str, Any] = {"precision": precision, "published_sweeps": published_sweeps, "intensity": intensity}
    flags |= {"fuser_kernel": fuser_kernel, "point_capacity": point_capacity}
    flags |= {"voxel_capacity": voxel_capacity, "site_capacity": site_capacity}
    checkpoint = located.whole(checkpoint)
    with waiting.told("reading the data set"):
        index = inputs.read(data, scene, version, columns)
    with waiting.told("reading the weights"):
        made = detector.load(checkpoint, model=model, device=device, averages=averages, **flags).at(data)
        made.ready(index)
    how = {"backend": backend, "batch_size": batch_size, "workers": workers}
    found, counts = detector.with_progress(made.over, index, index, **how)
    index, lost = inputs.placed(index)
    reading = made.reading
    pace = (fps or predicted.rate(index)) if video and len(index) > 1 else None
    with new_folder(out) as folder, waiting.told("writing what was detected"):
        shown = predicted.write(
            folder, index, found, reading, placed=not lost, threshold=score_threshold, pictures=pictures, fps=pace
        )
        if rrd:
            viewer.write(folder / RECORDING, index, found, reading, threshold=score_threshold)
    if lost:
        print("key frames have no poses: results_nusc.json is in their LiDAR frames, not in the world's")
    print(f"{len(index):,} key frames, {shown:,} detections with a score of at least {score_threshold:g}; all in {out}")
    for line in tables.counted(counts):
        print(line)
