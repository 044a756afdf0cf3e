"""The report's pictures and page: complete, readable without anything else, and absent where there is nothing to draw."""

import base64
import dataclasses
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import small_world
from PIL import Image
from small_world import annotations, document, index, nothing

from bevfn import draw
from bevfn.data.reading import CLASS_NAMES
from bevfn.evaluation import browse, page, plots, score
from bevfn.evaluation.results import Detections
from bevfn.files import read_json


def scores(made: dict) -> score.Scores:
    return score.score(index(), made, tables=small_world.tables())


@pytest.fixture(scope="module")
def halves() -> tuple[dict, score.Scores, score.Scores]:
    """(a document that misses every other box, its scores, scores of an empty one)."""

    def half(found: Detections) -> Detections:
        return Detections(found.boxes[::2], found.scores[::2], found.labels[::2])

    made = document(half)
    return made, scores(made), scores(document(lambda _: nothing()))


def records(n: int) -> list[dict]:
    loss = [{"step": float(i + 1), "loss/total": 9.0 / (i + 1), "loss/cls": 1.0, "lr": 1e-3} for i in range(n)]
    return [{**record, "grad_norm": float("inf" if i == 0 else 1 + i)} for i, record in enumerate(loss)]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def colour(name: str) -> np.ndarray:
    return np.array([int(name[i : i + 2], 16) for i in (1, 3, 5)])


def share(png: bytes, name: str) -> float:
    return float((np.abs(pixels(png) - colour(name)).max(axis=-1) < 6).mean())


@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK], ids=["light", "dark"])
def test_charts_are_drawn_in_the_theme(halves, theme):
    _, found, silent = halves
    for png in (
        plots.classes(found, theme), plots.training(records(120), theme),
        plots.comparison({"untrained": silent, "trained": found}, theme),
    ):  # fmt: skip
        height, width, _ = pixels(png).shape
        assert width > 1500 and height > 400
        assert share(png, theme.surface) > 0.5
    assert share(plots.comparison({"a": found, "b": found}, theme), theme.series[1]) > 0.005


def test_charts_of_a_silent_detector_and_of_a_run_without_losses_are_drawn(halves):
    _, _, silent = halves
    assert plots.classes(silent)
    assert plots.training([{"step": 1.0, "seconds": 2.0}])
    assert plots.training([{"step": 1.0, "eval/mAP": 0.1, "eval/NDS": 0.2}])


def test_a_frame_of_an_index_becomes_a_sample_that_projects_into_its_cameras():
    frame = index()[0]
    sample = draw.sample(frame, index().root, CLASS_NAMES)
    assert sample.camera_names == tuple(frame.cameras) and sample.token == frame.token
    np.testing.assert_allclose(sample.boxes[:, 2] + sample.boxes[:, 5] / 2, frame.boxes[:, 2], atol=1e-5)
    camera = frame.cameras["CAM_FRONT"]
    point = np.array([0.5, 12.0, -0.5, 1.0])  # lidar y is forward
    pixel = sample.image_from_base[0, 0] @ point
    by_hand = camera.intrinsics @ (camera.camera_from_lidar @ point)[:3]
    np.testing.assert_allclose(pixel[:2] / pixel[2], by_hand[:2] / by_hand[2], rtol=1e-4)
    assert pixel[2] > 0


class Page(html.parser.HTMLParser):
    """A page as a browser sees it: what it refers to, its text, its ids, and what its scripts hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources, self.text, self.ids, self.scripts, self.open = [], "", [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.sources += [value for name, value in attributes if name in ("src", "srcset", "href")]
        self.ids += [named["id"]] if "id" in named else []
        if tag not in ("meta", "img", "source", "input"):
            self.open.append(tag)
        self.scripts += [(named.get("type"), "")] if tag == "script" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        else:
            self.text += data

    @property
    def data(self) -> dict:
        """Of its one block of data, which is strict JSON."""
        (block,) = [text for kind, text in self.scripts if kind == "application/json"]
        return read_json(block.encode())

    @property
    def asked(self) -> set[str]:
        """Ids that its script asks for."""
        (script,) = [text for kind, text in self.scripts if kind is None]
        listed = re.search(r"for \(const id of \[(.*?)\]", script)
        return set(re.findall(r'(?:at|getElementById)\("([\w-]+)"\)', script)) | set(
            re.findall(r'"([\w-]+)"', listed[1])
        )


def test_report_folder_is_complete_and_its_page_stands_alone(halves, tmp_path):
    made, found, silent = halves
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss/total": 1.0 / i}) + "\n" for i in (1, 2)))
    out = tmp_path / "out"
    path = page.write(
        out, found, title="A <run>", index=index(), found=made, run_dir=run, num_frames=1, name="trained",
        config={"optimizer": {"lr": 1e-3}, "files": ["a & b"]}, others={"untrained": silent},
    )  # fmt: skip
    charts = {f"{name}.png" for name in ("classes", "comparison", "training", "worst")}
    assert set(os.listdir(out)) == charts | {"report.html", "summary.md", "metrics.json"}
    assert score.read(out / "metrics.json").nds == found.nds
    assert "| untrained" in (out / "summary.md").read_text()
    shown = Page(path.read_text())
    assert len(shown.sources) == 2 * 3 and all(s.startswith("data:image/") for s in shown.sources)
    assert len(shown.ids) == len(set(shown.ids)) and shown.asked == set(shown.ids)
    for text in (
        "A <run>",
        f"{found.nds:.3f}",
        "construction vehicle",
        "optimizer.lr",
        "0.001",
        '["a & b"]',
        "untrained",
        "scene-0003",
    ):
        assert text in shown.text
    assert shown.data["breakdown"] == read_json((out / "metrics.json").read_bytes())["breakdown"]
    _frames_are_whole(shown.data, made)


def _frames_are_whole(data: dict, made: dict) -> None:
    """The worst, the best and another key frame, with all that the page draws of them."""
    assert [one["why"] for one in data["frames"]] == ["worst 1", "best 1", "random 1"]
    assert len({one["token"] for one in data["frames"]}) == 3
    for one in data["frames"]:
        frame = index()[index().position(one["token"])]
        counted = [row for row in one["known"] if row[10] > browse.NOT_COUNTED]
        assert (len(counted), sum(row[10] >= 0 for row in counted)) == (one["annotated"], one["found"])
        assert len(one["detected"]) == len(made["results"][one["token"]])
        assert sum(row[11] for row in one["detected"]) == one["found"]
        points = np.frombuffer(base64.b64decode(one["points"]), "<i2").reshape(-1, 3) / 100
        assert 500 < len(points) <= browse.POINTS and np.abs(points[:, :2]).max() < 120
        assert [camera["name"] for camera in one["cameras"]] == list(draw.ORDER)
        for camera in one["cameras"]:  # a point lies where the camera's own calibration says, in small pixels
            small = Image.open(io.BytesIO(base64.b64decode(camera["image"].partition(",")[2])))
            assert list(small.size) == camera["size"]
            known = frame.cameras[camera["name"]]
            at = np.linalg.inv(known.camera_from_lidar) @ [0.4, 0.2, 9.0, 1.0]
            pixel, by_hand = (np.array(camera["matrix"]).reshape(3, 4) @ at), known.intrinsics @ [0.4, 0.2, 9.0]
            np.testing.assert_allclose(
                pixel[:2] / pixel[2] / small.size, by_hand[:2] / by_hand[2] / known.size[::-1], atol=1e-3
            )


def test_names_in_the_data_neither_end_the_pages_script_nor_begin_another(halves, tmp_path):
    made, found, _ = halves
    odd = "</script><script>alert(1)</script><!-- $x"
    renamed = dataclasses.replace(index(), frames=tuple(dataclasses.replace(frame, scene=odd) for frame in index()))
    shown = Page(page.write(tmp_path, found, index=renamed, found=made, num_frames=1).read_text())
    assert len(shown.scripts) == 2 and shown.data["frames"][0]["scene"] == odd and odd in shown.text


def test_the_pages_script_is_one(tmp_path):
    """As far as a parser tells: where node is installed."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    script = Path(page.__file__).with_name("report.js")
    assert subprocess.run([node, "--check", script], capture_output=True).returncode == 0


LEGENDS = """
class Element {
  constructor() { this.attributes = {}; this.dataset = {}; this.style = {}; this.children = []; this.names = new Set(); }
  setAttribute(name, value) { this.attributes[name] = value; if (name === "data-series") this.dataset.series = String(value); }
  append(...children) { this.children.push(...children.filter((child) => child instanceof Element)); }
  get classList() { return { remove: (name) => this.names.delete(name), toggle: (name, on = !this.names.has(name)) =>
    (this.names[on ? "add" : "delete"](name), on) }; }
  querySelectorAll() { return this.children.flatMap((c) => [c, ...c.querySelectorAll()]).filter((c) => "series" in c.dataset); }
}
const made = () => new Element(), found = { textContent: "{}" };
globalThis.document = { createElement: made, createElementNS: made, getElementById: () => found };
SCRIPT
const axes = { title: "", x: [0, 2, []], y: 1 }, bars = [0, 1, 0, 1].map((series, from) => ({ from, to: from + 1, value: 1, series }));
const lines = [0, 1].map(() => ({ dots: true, points: [[0, 0], [1, 1]] })), told = [];
for (const drawn of [chart({ ...axes, bars }), chart({ ...axes, lines })]) {
  const button = legend([["a"], ["b"]], drawn).children[1], all = drawn.querySelectorAll();
  const said = () => all.map((one) => one.dataset.series + (one.style.display || "") + [...one.names]).join(" ");
  for (const act of ["onclick", "onclick", "onpointerenter", "onpointerleave"]) { button[act](); told.push(said()); }
}
console.log(told.join("\\n"));
"""


def test_a_click_on_a_legend_hides_its_bars_lines_and_dots_and_the_pointer_lets_the_others_fade():
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    script = Path(page.__file__).with_name("report.js").read_text()
    charts = script[: script.index('const dashes = ["')]  # what follows looks for the page's places
    said = subprocess.run([node, "-e", LEGENDS.replace("SCRIPT", charts)], capture_output=True, text=True, check=True)
    of_bars = ["0 1none 0 1none", "0 1 0 1", "0faint 1 0faint 1", "0 1 0 1"]
    of_lines = ["0 0 0 1none 1none 1none", "0 0 0 1 1 1", "0faint 0faint 0faint 1 1 1", "0 0 0 1 1 1"]
    assert said.stdout.splitlines() == of_bars + of_lines


def test_report_with_scores_alone(halves, tmp_path):
    _, found, _ = halves
    shown = Page(page.write(tmp_path, found).read_text())
    assert set(os.listdir(tmp_path)) == {"classes.png", "report.html", "summary.md", "metrics.json"}
    assert shown.data["breakdown"] is None and set(shown.ids) == {"pr", "pr-distance", "data"}
    assert shown.data["scores"][0]["precision"] == [list(row) for row in found.classes[0].precision]


def test_report_refuses_a_file_and_scores_of_other_frames(halves, tmp_path):
    _, found, _ = halves
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file, so no folder"):
        page.write(tmp_path / "file", found)
    with pytest.raises(ValueError, match="before and this run were scored on different key frames"):
        page.write(tmp_path / "out", found, others={"before": dataclasses.replace(found, frames=99)})
    assert not (tmp_path / "out").exists()


def test_pictures_without_camera_images_show_the_view_from_above(tmp_path):
    frame = index()[0]
    missing = {name: dataclasses.replace(camera, path="gone.jpg") for name, camera in frame.cameras.items()}
    sample = draw.sample(dataclasses.replace(frame, cameras=missing), index().root, CLASS_NAMES)
    found = annotations(frame)
    draw.draw(sample, found.boxes, found.scores, found.labels, tmp_path / "a.png")
    assert sample.image_paths == () and Image.open(tmp_path / "a.png").size[0] > 800
