"""The devkit's scores of detectors that are right, wrong in one way, or silent; tables; and which frames went best."""

import dataclasses
import json
import math

import numpy as np
import pytest
import small_world
from small_world import annotations, document, index, nothing

from bevfn.data.reading import CLASS_NAMES
from bevfn.evaluation import frame_quality, results, score, tables
from bevfn.evaluation.results import Detections


def scores(made: dict, of=None) -> score.Scores:
    return score.score(of or index(), made, tables=small_world.tables())


def edited(change) -> score.Scores:
    """Scores of the annotations after change(boxes [n,9]) in place."""

    def apply(found: Detections) -> Detections:
        boxes = found.boxes.copy()
        change(boxes)
        return Detections(boxes, found.scores, found.labels)

    return scores(document(apply))


@pytest.fixture(scope="module")
def perfect() -> score.Scores:
    return scores(document())


def present(found: score.Scores) -> list[score.ClassScore]:
    return [c for c in found.classes if c.annotated]


def test_annotations_score_as_perfect(perfect):
    assert len(present(perfect)) >= 6 and perfect.frames == 3 and perfect.split == "val"
    for c in present(perfect):
        assert c.ap == pytest.approx(1.0), c.name
        assert c.ap_at == pytest.approx((1.0,) * 4)
        for name in ("ATE", "ASE", "AOE", "AVE"):  # attributes: what stands may be parked or stopped, a guess
            assert math.isnan(c.errors[name]) or c.errors[name] < 0.01, (c.name, name)
    absent = len(perfect.classes) - len(present(perfect))
    assert perfect.mean_ap == pytest.approx(1 - absent / 10)
    errors = sum(max(0.0, 1 - value) for value in perfect.errors.values())
    assert perfect.nds == pytest.approx((5 * perfect.mean_ap + errors) / 10)
    assert list(perfect.headline) == ["NDS", "mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE"]


def test_each_error_sees_its_own_mistake_and_no_other(perfect):
    def backwards(boxes):
        boxes[:, 6] += np.pi

    def swapped(boxes):
        boxes[:, [3, 4]] = boxes[:, [4, 3]]

    def shifted(boxes):
        boxes[:, 0] += 0.4

    def faster(boxes):
        boxes[:, 7] += 2.0

    for change, moved in ((backwards, {"AOE"}), (swapped, {"ASE"}), (shifted, {"ATE"}), (faster, {"AVE", "AAE"})):
        worse = edited(change)
        for name, value in worse.errors.items():
            if name in moved:
                assert value > perfect.errors[name] + 0.05, (change.__name__, name)
            else:
                assert value == pytest.approx(perfect.errors[name], abs=0.02), (change.__name__, name)
        assert worse.nds < perfect.nds
    cars = {c.name: c for c in edited(backwards).classes}
    assert cars["car"].errors["AOE"] == pytest.approx(np.pi, abs=0.01)
    assert cars["barrier"].errors["AOE"] < 0.01  # a barrier has no front
    assert math.isnan(cars["traffic_cone"].errors["AOE"])


def test_boxes_too_far_off_are_not_found():
    def shifted(boxes):
        boxes[:, 1] += 1.5

    found = edited(shifted)
    for c in present(found):
        assert c.ap_at[0] < 0.5 and c.ap_at[3] >= c.ap_at[2] >= c.ap_at[1] >= c.ap_at[0]


def test_a_silent_detector_scores_nothing():
    found = scores(document(lambda _: nothing()))
    assert found.headline == {"NDS": 0.0, "mAP": 0.0, "mATE": 1.0, "mASE": 1.0, "mAOE": 1.0, "mAVE": 1.0, "mAAE": 1.0}


def test_some_key_frames_of_a_split_can_be_scored_alone(perfect):
    some = dataclasses.replace(index(), frames=(index()[1],))
    found = {index()[1].token: annotations(index()[1])}
    part = scores(results.format(found, some, class_names=CLASS_NAMES, meta=small_world.META), of=some)
    assert part.frames == 1
    assert all(c.ap == pytest.approx(1.0) for c in present(part))
    assert 0 < sum(c.annotated for c in part.classes) < sum(c.annotated for c in perfect.classes)


def test_a_results_file_scores_as_its_document(tmp_path, perfect):
    results.write(tmp_path / "results.json", document())
    out = tmp_path / "new" / "scores.json"
    assert score.score(index(), tmp_path / "results.json", tables=small_world.tables(), out=out).nds == perfect.nds
    assert repr(score.read(out)) == repr(perfect)  # by text: NaN differs from itself
    assert json.loads(out.read_text())["classes"]["traffic_cone"]["AOE"] is None


def test_nothing_of_the_devkit_is_printed_or_left_behind(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores(document())
    assert capfd.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_results_of_other_key_frames_are_refused():
    made = document()
    first, *_ = made["results"]
    without = {**made, "results": {t: e for t, e in made["results"].items() if t != first}}
    with pytest.raises(ValueError, match=f"the results have no key frame {first}"):
        scores(without)
    foreign = {**made, "results": {**made["results"], "elsewhere": []}}
    with pytest.raises(ValueError, match="split 'val' has no key frame elsewhere"):
        scores(foreign)


def test_a_split_is_its_key_frames_whatever_it_is_called(perfect):
    for split in ("mini_val", "train", "my split", "test"):  # another version's, one of other scenes, nobody's
        own = scores(document(), of=dataclasses.replace(index(), split=split))
        assert own.split == split and own.nds == perfect.nds and own.frames == 3


def test_tables_that_have_other_key_frames_are_one_sentence():
    frames = tuple(dataclasses.replace(frame, token=frame.token[::-1]) for frame in index())
    found = {frame.token: annotations(frame) for frame in frames}
    other = dataclasses.replace(index(), frames=frames)
    with pytest.raises(ValueError, match=r"the devkit cannot score these key frames of v1.0-trainval \(KeyError"):
        scores(results.format(found, other, class_names=CLASS_NAMES, meta=small_world.META), of=other)


def test_splits_that_cannot_be_scored_are_one_sentence():
    bare = tuple(dataclasses.replace(frame, names=("",) * len(frame.names)) for frame in index())
    with pytest.raises(ValueError, match=r"split 'test' have no annotations .* submit the results file of test"):
        scores(document(), of=dataclasses.replace(index(), split="test", frames=bare))
    with pytest.raises(ValueError, match=r"the devkit cannot load version v9.9"):
        score.tables(dataclasses.replace(index(), version="v9.9"))


def test_foreign_score_files_say_so(tmp_path, perfect):
    with pytest.raises(ValueError, match=r"gone.json does not exist"):
        score.read(tmp_path / "gone.json")
    score.write(tmp_path / "half.json", perfect)
    (tmp_path / "half.json").write_bytes((tmp_path / "half.json").read_bytes()[:500])
    (tmp_path / "other.json").write_text("[]")
    for name in ("half", "other"):
        with pytest.raises(ValueError, match=rf"{name}.json is no file of scores .*evaluate again"):
            score.read(tmp_path / f"{name}.json")


def test_the_summary_names_numbers_and_absent_classes(perfect):
    text = tables.summary(perfect, "A title")
    assert text.startswith("## A title\n") and "| class" in text and "AVE [m/s]" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines[:3]}) == len({len(line) for line in lines[3:]}) == 1
    assert max(map(len, lines)) <= 80  # columns of a terminal
    for c in perfect.classes:
        if not c.annotated:
            assert f"Not annotated here, so AP 0 and errors 1 in every mean: {c.name}" in text


def test_a_comparison_marks_the_best_of_each_row(perfect):
    silent = scores(document(lambda _: nothing()))
    text = tables.compare({"untrained": silent, "trained": perfect})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    head, _, *numbers = rows
    assert head == ["", "untrained", "trained"] and len(numbers) == 7 + sum(c.annotated > 0 for c in perfect.classes)
    assert all("**" not in first and second.startswith("**") for _, first, second in numbers)
    assert [numbers[0][2], numbers[1][2]] == [
        "**" + tables.number(value) + "**" for value in (perfect.nds, perfect.mean_ap)
    ]
    with pytest.raises(ValueError, match="at least one"):
        tables.compare({})
    with pytest.raises(ValueError, match="a and b were scored on different key frames"):
        tables.compare({"a": perfect, "b": dataclasses.replace(perfect, frames=2)})


@pytest.mark.parametrize("width", [30, 80, 160])
def test_a_comparison_of_many_fits_the_terminal(perfect, width):
    names = [f"runs/search/trial_{number:03}" for number in range(9)] + ["a" * 200 + "z"]
    lines = tables.compare(dict.fromkeys(names, perfect), width).splitlines()
    tables_of = [line for line in lines if line.startswith("|")]
    wide = max(map(len, tables_of))
    assert wide <= max(width, 50) and (width < 50 or wide > width - 30)
    shown = "".join(tables_of)
    assert shown.count("| NDS") == shown.count("| mAAE") and "z |" in shown
    assert width < 80 or all(shown.count(name) == 1 for name in names[:9])


def test_frames_are_ranked_by_what_was_found():
    order = [frame.token for frame in index()]
    share = dict(zip(order, (0.5, 1.0, 0.2)))
    found = {}
    for frame in index():
        whole = annotations(frame)
        n = round(share[frame.token] * len(whole.scores))
        found[frame.token] = Detections(whole.boxes[:n], whole.scores[:n], whole.labels[:n])
    made = results.format(found, index(), class_names=CLASS_NAMES, meta=small_world.META)
    ranking = frame_quality.rank(index(), made)
    assert [c.token for c in ranking.frames] == [order[1], order[0], order[2]]
    assert ranking.frames[0].f1 == 1.0 and ranking.frames[0].found == ranking.frames[0].annotated
    best, worst = ranking.ends(5)
    assert [c.token for c in best] == [order[1], order[0]] and [c.token for c in worst] == [order[2]]


def test_the_threshold_keeps_false_alarms_out():
    def noisy(found: Detections) -> Detections:
        false = found.boxes.copy()
        false[:, :2] += 100.0 * np.sign(false[:, :2])  # out of range: never counted
        near = found.boxes[:4].copy()
        near[:, 0] += 5.0
        return Detections(
            np.concatenate([found.boxes, false, near]), np.r_[found.scores, found.scores, [0.1] * 4],
            np.r_[found.labels, found.labels, found.labels[:4]],
        )  # fmt: skip

    ranking = frame_quality.rank(index(), document(noisy))
    assert ranking.score_threshold == pytest.approx(0.5)
    assert all(c.found == c.predicted == c.annotated for c in ranking.frames)


def test_ranking_without_detections_has_every_frame_at_zero():
    ranking = frame_quality.rank(index(), document(lambda _: nothing()))
    assert len(ranking.frames) == 3 and all(c.f1 == 0.0 and c.annotated > 0 for c in ranking.frames)
