"""`bevfn view`: a picture of each key frame, and one sentence where there is none to draw."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import small_world
from PIL import Image

from bevfn import cli, draw
from bevfn.data import infos
from bevfn.data.reading import CLASS_NAMES
from bevfn.evaluation import results
from bevfn.evaluation.results import Detections
from bevfn.files import to_json
from bevfn.synth import key_frame


@pytest.fixture(scope="module")
def frame(tmp_path_factory) -> Path:
    return key_frame.write_frame(tmp_path_factory.mktemp("frame"), image_size=(90, 160))


def bevfn(monkeypatch, capfd, *words) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["bevfn", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, "".join(capfd.readouterr())


def detected(frame: Path, file: Path, name: str) -> Path:
    """A results file with one long box of a class ahead of the car."""
    (one,) = infos.read(frame / "frame.json")
    box = np.array([[0.0, 20.0, -1.0, 30.0, 20.0, 3.0, 0.0, 9.0, 0.0]])
    found = Detections(box, np.array([0.9]), np.array([0]))
    where = {"ego_from_boxes": one.ego_from_lidar, "global_from_ego": one.global_from_ego}
    listed = results.entries(one.token, found, class_names=(name,), ranges={name: np.inf}, **where)
    meta = {"use_camera": True, "use_lidar": True, "use_radar": False, "use_map": False, "use_external": False}
    file.write_bytes(to_json({"meta": meta, "results": {one.token: listed}}))
    return file


def recorded(monkeypatch) -> dict:
    """What is drawn: the last call of `draw.figure`, which gives a small picture."""
    seen: dict = {}

    def figure(what, found=None, **how):
        seen.update(what=what, found=found, **how)
        return draw.Shown(figsize=(1, 1))

    monkeypatch.setattr(draw, "figure", figure)
    return seen


def test_a_key_frame_is_drawn(frame, monkeypatch, capfd, tmp_path):
    code, told = bevfn(monkeypatch, capfd, "view", frame, "--out", tmp_path / "a")
    assert (code, told) == (0, f"1 picture in {tmp_path / 'a'}\n")
    (picture,) = (tmp_path / "a").iterdir()
    width, height = Image.open(picture).size
    assert picture.name.startswith("0000_") and width > 2 * height > 1600


def test_what_a_results_file_has_is_drawn_in_the_lidars_frame(frame, monkeypatch, capfd, tmp_path):
    seen, file = recorded(monkeypatch), detected(frame, tmp_path / "results.json", "tram")  # no class of nuScenes
    code, _ = bevfn(
        monkeypatch, capfd, "view", frame, "--results", file, "--score-threshold", 0.3, "--out", tmp_path / "b"
    )
    assert code == 0 and seen["score_threshold"] == 0.3
    np.testing.assert_allclose(seen["found"].boxes, [[0.0, 20.0, -1.0, 30.0, 20.0, 3.0, 0.0, 9.0, 0.0]], atol=1e-6)
    assert seen["what"].class_names[seen["found"].labels[0]] == "tram" and len(seen["what"].boxes) > 5


def test_a_batch_after_augmentation_is_drawn_as_the_model_gets_it(frame, monkeypatch, capfd, tmp_path):
    seen = recorded(monkeypatch)
    code, told = bevfn(
        monkeypatch, capfd, "view", frame, "--augmented", "bevfusion-lidar", "--seed", 3, "--out", tmp_path / "a"
    )
    assert code == 0 and "1 picture in" in told and "feeds it" in told  # by default nothing is augmented there
    moved = seen["what"].base_aug[0].numpy()
    assert np.abs(moved - np.eye(4)).max() > 1e-3 and seen["class_names"] == CLASS_NAMES
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_of_a_world_that_somebody_made_the_batch_is_the_one_that_is_trained_on(monkeypatch, capfd, tmp_path):
    """The published recipe would ask for the database of objects to paste, which a world's does not."""
    seen, world = recorded(monkeypatch), small_world.training().root
    code, told = bevfn(
        monkeypatch, capfd, "view", world, "--augmented", "bevfusion-lidar", "--samples", 1, "--out", tmp_path / "a"
    )
    assert code == 0 and "1 picture in" in told and len(seen["what"].points) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{frame}", "--results", "{results}", "--augmented", "bevfusion-lidar"], "give one of them"),
        (["{frame}", "--results", "{other}"], "has none of the 1 key frames of"),
        (["{frame}", "--results", "{nothing}"], "does not exist; give a nuScenes results file"),
        (["{nothing}"], "nothing does not exist; give a nuScenes root"),
        (["{frame}", "--augmented", "bevfusion-lidar", "--scene", "a"], "leave out --scene"),
        (["{frame}", "--samples", "0"], "--samples 0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_folder(frame, monkeypatch, capfd, tmp_path, words, says):
    file = detected(frame, tmp_path / "results.json", "car")
    other = json.loads(file.read_text()) | {"results": {"elsewhere": []}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    paths = {"frame": frame, "results": file, "other": tmp_path / "other.json", "nothing": tmp_path / "nothing"}
    code, told = bevfn(monkeypatch, capfd, "view", *(word.format(**paths) for word in words), "--out", tmp_path / "out")
    assert code == 2 and says in told and told.count("\n") == 1 and not (tmp_path / "out").exists()
