"""A frame without tables is judged by recall; its token may be anything and never becomes a path."""

import dataclasses
import os

import small_frames
from small_world import nothing

from bevfn.data import infos
from bevfn.data.index import pack
from bevfn.evaluation import judge, score
from bevfn.files import read_json
from bevfn.synth import key_frame


def test_a_token_that_is_a_path_or_a_formula_stays_in_the_folder(tmp_path):
    key_frame.write_frame(tmp_path / "frame", image_size=(225, 400))
    index = infos.read(tmp_path / "frame" / "frame.json")
    token = "../../escaped\n\x1b[31m$\\frac"
    odd = dataclasses.replace(index, frames=pack([dataclasses.replace(index[0], token=token)]))
    out = tmp_path / "a" / "b" / "out"
    judged = judge.judge(odd, {token: nothing()}, small_frames.SMALL, out)
    assert sorted(os.listdir(tmp_path)) == ["a", "frame"] and sorted(os.listdir(tmp_path / "a" / "b")) == ["out"]
    (picture,) = set(os.listdir(out)) - {score.METRICS}
    assert picture == "%2E.%2F..%2Fescaped%0A%1B%5B31m%24%5Cfrac.png" and "\x1b" not in judged.text
    assert read_json((out / score.METRICS).read_bytes())["recall"] == judged.value == 0.0
