"""Flags whose choices are computed: a `Literal` would write a list of names a second time."""

from collections.abc import Iterable

from tyro.constructors import PrimitiveConstructorSpec


def one_of(names: Iterable[str]) -> PrimitiveConstructorSpec[str]:
    """For the annotation of a str that is one of `names`: `model: Annotated[str, one_of(NETWORKS)]`."""
    choices = tuple(names)
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
        choices=choices,
    )
