"""What flags can be, for command lines whose help must not wait for torch: importing this imports none of it."""

from collections.abc import Iterable
from typing import Annotated, Literal

from tyro.constructors import PrimitiveConstructorSpec

from bevfn import catalogue

Precision = Literal["fp32", "fp16", "bf16"]
Backend = Literal["inductor", "aot_eager", "eager", "torchair", "npugraph-ex"]
TrainBackend = Literal["auto", Backend]
Scale = Literal["published", "mini"]
Logger = Literal["wandb", "mlflow"]
Augmented = Literal["flip", "flip-scale"]
QUESTIONS = """select floor-div floor-div-small compare mul-wrap sxpy maximum clip reduce-max cumsum cast-narrow cast-wide
index-add scatter-add gather sort hf32-off hf32-on batch-norm batch-norm-fused batch-norm-fp32 batch-norm-grad-fp32
batch-norm-fp16 batch-norm-grad-fp16 batch-norm-rows"""
"""names of `ascend.questions`"""


def one_of(names: Iterable[str]) -> PrimitiveConstructorSpec[str]:
    """For the annotation of a str that is one of `names`: `model: Annotated[str, one_of(NETWORKS)]`. A `Literal` would write a
    list of names a second time."""
    choices = tuple(names)
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
        choices=choices,
    )


# Of a command line: the names are the choices, and strings to everybody else.
Experiment = Annotated[str, one_of(catalogue.EXPERIMENTS)]
ModelName = Annotated[str, one_of(catalogue.MODELS)]
