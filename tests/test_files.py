"""JSON as every reader takes it, and reading it however it is broken."""

import json

import numpy as np
import pytest

from bevfn import files


def test_numbers_that_json_lacks_are_written_as_words_that_float_reads():
    value = {"a": [1.5, float("nan")], "b": {"c": (float("inf"), -float("inf"))}, "d": np.float64("nan")}
    text = files.to_json(value)
    assert json.loads(text) == {"a": [1.5, "nan"], "b": {"c": ["inf", "-inf"]}, "d": "nan"}
    assert float(json.loads(text)["b"]["c"][1]) == -float("inf")


def test_what_json_can_say_comes_back():
    value = {"a": [1, 2.5, None, True, "é"], "b": {}}
    assert files.read_json(files.to_json(value, indent=1)) == value


def test_other_objects_are_refused():
    with pytest.raises(TypeError):
        files.to_json({"a": object()})


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e400",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"\xff",
        b"1" * 5000,
    ],
)
def test_whatever_is_broken_is_a_value_error(text):
    with pytest.raises(ValueError):
        files.read_json(text)
