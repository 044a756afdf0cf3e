"""Pytrees: names, alignment, and errors that name the path."""

from dataclasses import dataclass

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from bevfn import tree


@tree.register
@dataclass
class Pair:
    left: Tensor
    right: Tensor | None


def example() -> dict:
    return {
        "head": {"norms": [{"weight": torch.ones(3)}, {"weight": torch.zeros(2)}]},
        "pair": Pair(torch.arange(4), None),
    }


def test_paths_are_dotted_through_dicts_lists_and_dataclasses_and_none_is_no_leaf():
    assert list(tree.flatten(example())) == ["head.norms.0.weight", "head.norms.1.weight", "pair.left"]
    assert [leaf.numel() for leaf in tree.leaves(example())] == [3, 2, 4]
    assert tree.num_elements(example()) == 9


def test_unflatten_inverts_flatten_in_any_order():
    flat = tree.flatten(example())
    again = tree.unflatten(dict(reversed(flat.items())), example())
    assert tree.diff(again, example()) == []
    assert isinstance(again["pair"], Pair) and again["pair"].right is None
    assert all(again_leaf is leaf for again_leaf, leaf in zip(tree.leaves(again), flat.values()))


def test_unflatten_names_missing_and_unknown_paths():
    flat = tree.flatten(example())
    flat["head.typo"] = flat.pop("pair.left")
    with pytest.raises(ValueError, match=r"missing: pair\.left; unknown: head\.typo"):
        tree.unflatten(flat, example())


def test_diff_prints_both_shapes_and_dtypes():
    other = example()
    other["head"]["norms"][0]["weight"] = torch.ones(4, 2, dtype=torch.float16)
    other["pair"].right = torch.ones(1)
    lines = tree.diff(example(), other)
    assert "head.norms.0.weight: float32 [3] in the first, float16 [4, 2] in the second" in lines
    assert "pair.right: float32 [1] only in the second" in lines and len(lines) == 2


def test_map_aligns_by_name_not_by_the_order_of_keys():
    a, b = {"x": torch.ones(1), "y": torch.zeros(1)}, {"y": torch.full((1,), 5.0), "x": torch.full((1,), 7.0)}
    assert {k: float(v) for k, v in tree.map(torch.add, a, b).items()} == {"x": 8.0, "y": 5.0}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"x": torch.ones(1), "y": torch.ones(3)}, r"y: float32 \[3\] only in the second"),
        ({"x": [torch.ones(1)], "y": None}, r"x: float32 \[1\] only in the first; x\.0"),
        ({"x": None, "y": None}, r"x: float32 \[1\] only in the first"),
    ],
)
def test_map_over_trees_of_another_structure_names_the_difference(other, message):
    with pytest.raises(ValueError, match=message):
        tree.map(torch.add, {"x": torch.ones(1), "y": None}, other)


def test_cast_leaves_integers_alone():
    half = tree.cast(example(), torch.float16)
    assert [str(leaf.dtype) for leaf in tree.leaves(half)] == ["torch.float16", "torch.float16", "torch.int64"]


def test_everything_traces_as_one_graph():
    def f(a, b):
        flat = {name: leaf * 2 for name, leaf in tree.flatten(a).items()}
        return tree.map(lambda x, y: x + y, tree.unflatten(flat, a), b)

    a = example()
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(compiled(a, a)), tree.leaves(f(a, a))))


def test_unzip_parts_parameters_from_states_and_leaves_out_what_has_none():
    one, two, three = (torch.full((1,), float(i)) for i in range(3))
    made = {"a": ({"w": one}, {"s": two}), "b": {"w": three}, "c": [({"w": one}, {}), {"w": two}], "d": [{"w": one}]}
    params, state = tree.unzip(made)
    assert params == {"a": {"w": one}, "b": {"w": three}, "c": [{"w": one}, {"w": two}], "d": [{"w": one}]}
    assert state == {"a": {"s": two}, "c": [{}]}
    assert tree.unzip({"w": one}) == ({"w": one}, {})


def test_a_static_field_is_structure_and_an_absent_one_stays_absent():
    @tree.register(static=("kind",))
    @dataclass(frozen=True)
    class Node:
        kind: str
        x: Tensor
        y: Tensor | None = None

    one = Node("a", torch.ones(2))
    assert tree.map(lambda x: 2 * x, one).kind == "a" and tree.map(lambda x: 2 * x, one).y is None
    assert list(tree.flatten(one)) == ["x"] and tree.unflatten({"x": torch.zeros(2)}, one).kind == "a"
    structures = [pytree.tree_structure(node) for node in (one, Node("a", torch.zeros(3)), Node("b", torch.ones(2)))]
    assert structures[0] == structures[1] != structures[2]
    compiled = torch.compile(
        lambda node: tree.map(lambda x: x + (node.kind == "a"), node), backend="eager", fullgraph=True
    )
    assert [compiled(node).x.sum().item() for node in (one, Node("b", torch.ones(2)))] == [4.0, 2.0]
