"""`bevfn predict`: the same detections as an evaluation's, as files; and nothing written where something is refused."""

import io
import json
import resource
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import small_runs
import small_world
from PIL import Image

from bevfn import cli, files
from bevfn.data.index import CAMERAS
from bevfn.evaluation import predicted, results
from bevfn.evaluation.detect import detect
from bevfn.evaluation.judge import submission
from bevfn.synth import key_frame
from bevfn.training import pretrained

LIDAR = "bevfusion-lidar"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return small_runs.write(tmp_path_factory.mktemp("run") / "run", LIDAR, sweeps=1, data_root=small_world.index().root)


@pytest.fixture(scope="module")
def frame(tmp_path_factory) -> Path:
    return key_frame.write_frame(tmp_path_factory.mktemp("frame"), image_size=(90, 160))


def bevfn(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["bevfn", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_a_scene_gets_results_plain_json_pictures_and_a_video(trained, monkeypatch, capsys, tmp_path):
    index, out = small_world.index(), tmp_path / "out"
    task = small_runs.task(small_runs.config(LIDAR, sweeps=1, data_root=index.root), index)
    found, _ = detect(task.predict, *pretrained.read_weights(trained, ema=True), index, task.data.eval_reading)
    least = float(np.median(np.concatenate([one.scores for one in found.values()])))
    arguments = ("predict", trained.parent.parent, index.root, "--scene", index[0].scene, "--score-threshold", least)
    assert bevfn(monkeypatch, *arguments, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["frames", "pictures", "results_nusc.json", "video.mp4"]
    ours = results.read(out / "results_nusc.json")["results"]
    assert list(ours) == [f.token for f in index] and {len(entries) for entries in ours.values()} == {100}
    sure = [sum(entry["detection_score"] >= least for entry in entries) for entries in ours.values()]
    assert 150 <= sum(sure) < 300 and f"3 key frames, {sum(sure)} detections with a score of" in capsys.readouterr().out

    # as an evaluation has them, which leaves out what is too far to be scored
    for token, theirs in submission(index, found, task.data.eval_reading)["results"].items():
        assert len(theirs) > 10 and all(entry in ours[token] for entry in theirs)

    # plain JSON: the same boxes in the LiDAR's frame
    (first, *_) = sorted((out / "frames").iterdir())
    document = json.loads(first.read_text())
    assert first.name == f"0000_{document['token']}.json" and len(document["detections"]) == sure[0]
    best, entry = document["detections"][0], ours[document["token"]][0]
    moved = np.array(document["global_from_lidar"]) @ [*best["centre_m"], 1.0]
    assert np.allclose(moved[:3], entry["translation"]) and best["class"] == entry["detection_name"]
    assert np.allclose(best["size_m"], np.array(entry["size"])[[1, 0, 2]]) and best["score"] == entry["detection_score"]

    assert [p.stem for p in sorted((out / "pictures").iterdir())] == [
        p.stem for p in sorted((out / "frames").iterdir())
    ]
    width, height = Image.open(next((out / "pictures").iterdir())).size
    film = cv2.VideoCapture(str(out / "video.mp4"))
    assert [film.get(what) for what in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FRAME_WIDTH)] == [3, width // 2 * 2]
    assert film.get(cv2.CAP_PROP_FPS) == pytest.approx(2.0, abs=0.1)  # the world's key frames
    assert film.get(cv2.CAP_PROP_FRAME_HEIGHT) == height // 2 * 2


def test_lidar_needs_neither_cameras_nor_poses_nor_annotations(trained, frame, monkeypatch, capsys, tmp_path):
    clouds = tmp_path / "clouds"
    clouds.mkdir()
    shutil.copy(frame / key_frame.LIDAR_FILE, clouds / "a.pcd.bin")
    out = tmp_path / "out"
    out.mkdir()  # an empty one is taken
    assert bevfn(monkeypatch, "predict", trained, clouds, "--out", out, "--no-pictures") == 0
    assert sorted(path.name for path in out.iterdir()) == ["frames", "results_nusc.json"]
    (document,) = (json.loads(path.read_text()) for path in (out / "frames").iterdir())
    assert document["token"] == "a" and document["cameras"] == {}
    assert "empty/boxes" not in "".join(capsys.readouterr())  # nothing is taught here


def test_a_frame_without_poses_says_where_its_boxes_are(trained, frame, monkeypatch, capsys, tmp_path):
    lost = Path(shutil.copytree(frame, tmp_path / "frame"))
    info = json.loads((lost / "frame.json").read_text())
    del info["data_list"][0]["ego2global"]
    (lost / "frame.json").write_text(json.dumps(info))
    assert bevfn(monkeypatch, "predict", trained, lost, "--out", tmp_path / "out") == 0
    assert "no poses: results_nusc.json is in their LiDAR frames" in capsys.readouterr().out
    (document,) = (json.loads(path.read_text()) for path in (tmp_path / "out" / "frames").iterdir())
    assert document["global_from_lidar"] is None
    (picture,) = (tmp_path / "out" / "pictures").iterdir()
    assert Image.open(picture).size[0] > 800 and not (tmp_path / "out" / "video.mp4").exists()  # of one key frame


def test_a_camera_model_detects_without_a_cloud(frame, monkeypatch, tmp_path):
    """In its own base frame; boxes are written in the LiDAR's, and a picture has no points."""
    step = small_runs.write(tmp_path / "run", "bevdepth-1key-ema")
    seen = Path(shutil.copytree(frame, tmp_path / "frame"))
    (seen / key_frame.LIDAR_FILE).unlink()
    info = json.loads((seen / "frame.json").read_text())
    info["data_list"][0]["lidar_points"]["lidar_path"] = ""
    (seen / "frame.json").write_text(json.dumps(info))
    assert bevfn(monkeypatch, "predict", step, seen, "--out", tmp_path / "out", "--score-threshold", 0) == 0
    (document,) = (json.loads(path.read_text()) for path in (tmp_path / "out" / "frames").iterdir())
    assert set(document["cameras"]) == set(CAMERAS) and len(document["detections"]) > 0


def test_without_rerun_a_recording_is_one_sentence(trained, frame, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "rerun", None)
    assert bevfn(monkeypatch, "predict", trained, frame, "--out", tmp_path / "out", "--rrd") == 2
    assert "needs rerun-sdk: pip install -e '.[viewer]', or leave out --rrd" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recording_holds_every_key_frame(trained, frame, monkeypatch, tmp_path):
    rerun = pytest.importorskip("rerun")
    rerun.set_strict_mode(True)  # a wrong argument raises, where it would only be left out
    assert bevfn(monkeypatch, "predict", trained, frame, "--out", tmp_path / "out", "--rrd", "--no-pictures") == 0
    content = (tmp_path / "out" / "recording.rrd").read_bytes()
    assert content.startswith(b"RRF") and all(name in content for name in (b"detections", b"CAM_FRONT"))


# --- refusals ----------------------------------------------------------------------------------------------------


def four_columns(folder: Path) -> Path:
    cloud = np.random.default_rng(0).uniform(-20, 20, (1001, 4)).astype("<f4")
    cloud.tofile(folder / "a.bin")
    return folder


@pytest.mark.parametrize(
    "arguments, says",
    [(["{run}", "{tmp}/none"], "none does not exist; give a nuScenes root, a T4 data set"),
     (["{run}", "{tmp}"], "holds no data of a known kind; give a nuScenes root"),
     (["{run}", "{world}"], "has 2 scenes: "),
     (["{run}", "{world}", "--scene", "night"], "has no scene 'night'; it has scene-"),
     (["{run}", "{world}", "--version", "v1.0-mini"], "has no v1.0-mini; it has v1.0-trainval"),
     (["{tmp}/none.pth", "{frame}"], "none.pth is not there"),
     (["{run}", "{frame}", "--model", "bevdepth-2key"], "is of another experiment"),
     (["{camera}", "{clouds}"], "has no camera CAM_FRONT_LEFT, "),
     (["{run}", "{four}"], "16016 bytes are not a whole number of points (5 float32 = 20 bytes each)"),
     (["{run}", "{frame}", "--columns", "x y z"], "the columns x y z are of bare clouds, which "),
     (["{run}", "{frame}", "--fps", "0"], "--fps 0 must be at least 0.01"),
     (["{run}", "{frame}", "--intensity", "True"], "bevfusion_lidar is not AWML's; leave out --intensity")],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_nothing_is_written(
    trained, frame, monkeypatch, capsys, tmp_path, arguments, says
):
    for name in ("four", "clouds"):
        (tmp_path / name).mkdir()
    shutil.copy(frame / key_frame.LIDAR_FILE, tmp_path / "clouds" / "a.pcd.bin")
    places = {"run": trained, "tmp": tmp_path, "world": small_world.index().root, "frame": frame}
    places |= {"four": four_columns(tmp_path / "four"), "clouds": tmp_path / "clouds"}
    if "{camera}" in arguments:
        places["camera"] = small_runs.write(tmp_path / "camera", "bevdepth-1key-ema")
    before = sorted(tmp_path.rglob("*"))
    assert bevfn(monkeypatch, "predict", *(a.format(**places) for a in arguments), "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_folder_with_something_in_it_is_refused_before_anything_is_read(monkeypatch, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert bevfn(monkeypatch, "predict", "none", "none", "--out", tmp_path / "out") == 2
    assert "out exists and is not empty; choose another --out, or empty it" in capsys.readouterr().err


def test_a_recording_that_the_disk_did_not_take_is_refused(trained, frame, monkeypatch, capsys, tmp_path):
    """As a video, whose test says how; a small frame's recording has some megabytes."""
    pytest.importorskip("rerun")
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, most))
    try:
        code = bevfn(monkeypatch, "predict", trained, frame, "--out", tmp_path / "out", "--rrd", "--no-pictures")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    said = capsys.readouterr().err
    assert code == 2 and "recording.rrd could not be written (File too large)" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("codec", predicted.CODECS)
def test_a_video_that_the_disk_did_not_take_is_refused(codec, monkeypatch, tmp_path):
    """A limit on files' sizes ends a write as a full disk does; opencv says nothing, and leaves the beginning."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 120, 160, 3), dtype=np.uint8)
    made = [io.BytesIO() for _ in noise]
    for file, pixels in zip(made, noise):
        Image.fromarray(pixels).save(file, "PNG")
    pictures = [file.getvalue() for file in made]
    monkeypatch.setattr(predicted, "CODECS", (codec,))
    predicted.film(tmp_path / "whole.mp4", pictures, 2.0)
    size, (before, most) = (tmp_path / "whole.mp4").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (size // 2, size * 9 // 10):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
        try:
            with pytest.raises(
                files.NotWritten, match=r"film\.mp4 could not be written .* of its 12 pictures can be read"
            ):
                predicted.film(tmp_path / "film.mp4", pictures, 2.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
        assert (tmp_path / "film.mp4").stat().st_size == room  # which is not nothing


def test_what_fails_while_it_is_written_leaves_nothing(trained, frame, monkeypatch, capsys, tmp_path):
    def fails(*_, **__):
        raise OSError(28, "No space left on device", "frame.png")

    monkeypatch.setattr(predicted.draw, "picture", fails)
    assert bevfn(monkeypatch, "predict", trained, frame, "--out", tmp_path / "out") == 2
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())
