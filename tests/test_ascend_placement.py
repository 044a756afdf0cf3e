"""Where an A2 runs a node: by our facts, and by the tables of an installed CANN, in their public format (CANN itself is not here)."""

import json

import pytest

from bevfn.ascend import opp, placement
from bevfn.ascend.placement import Tensor, place

OWN = placement.own_tables()


def tensors(dtypes, **other):
    return tuple(None if name == "-" else Tensor(name, **other) for name in dtypes.split())


def where(kind, operands, results, tables=OWN):
    return place(tables, kind, tensors(operands), tensors(results))


@pytest.mark.parametrize(
    "kind, operands, results, expected, said",
    [
        ("SelectV2", "bool int32 int32", "int32", "AI Core", ""),
        ("Add", "float16 float32", "float32", "AI Core", ""),
        ("ConcatV2", "bool bool bool int32", "bool", "AI Core", ""),
        ("InplaceIndexAdd", "float32 int32 float32 -", "float32", "AI Core", ""),
        (
            "ScatterElements",
            "float16 int64 float16",
            "float16",
            "AI Core",
            "",
        ),  # our rewrite took it for an AI CPU type
        ("ScatterElements", "int64 int64 int64", "int64", "AI CPU", "no AI Core kernel for int64"),
        ("Conv2DBackpropFilter", "float16 int32 float16", "float32", "AI Core", ""),
        ("Cast", "uint8", "bool", "AI CPU", "no AI Core kernel for uint8 bool"),
        ("Cast", "float32", "float32", "GE", ""),
        ("Sort", "int64", "int64 int32", "AI CPU", "no AI Core kernel for int64 int32"),
        ("RightShift", "int64 int64", "int64", "AI CPU", "no AI Core kernel"),
        ("BevfnLinearAssignment", "float32 bool", "int64", "AI CPU", "accepted: "),
        ("Sxpy", "float32 float32 float32", "float32", "none", "in no list of kernels"),
        ("LogicalAnd", "uint8 uint8", "uint8", "none", "no kernel takes uint8"),
        ("Reshape", "float64 int64", "float64", "GE", ""),
        ("HcomAllReduce", "float32", "float32", "HCCL", ""),
        ("NoSuchType", "float32", "float32", "unknown", "not in a2.json"),
    ],
)
def test_facts(kind, operands, results, expected, said):
    found = where(kind, operands, results)
    assert found.place == expected and said in found.reason and bool(found.reason) == bool(said)


def test_a_cast_is_of_floats_to_higher_precision_and_never_the_other_way():
    assert where("LayerNormGradV3", "float16 float16 float16 float16 float16", "float16 float32 float32").casts == (
        "float16 to float32",
        "float16 to float32",
    )
    assert where("Conv2DBackpropFilter", "float16 int32 float16", "float16").casts == ("float32 to float16",)
    constant = (*tensors("float32"), *tensors("float16", constant=True))  # cast once, while GE compiles
    assert place(OWN, "SigmoidGrad", constant, tensors("float32")) == placement.Placed("AI Core")
    assert where("AvgPoolV2Grad", "float32 float32 float32 int64", "float32").place == "none"  # float16 is less


@pytest.mark.parametrize("constant", [False, True])
def test_an_integer_is_cast_for_no_kernel(constant):
    """Neither an index nor a constant size."""
    for kind, before, size, after, result in (
        ("Conv2DBackpropFilter", "float16", "int64", "float16", "float32"),
        ("LayerNormV4", "float32", "int64", "float32 float32", "float32 float32 float32"),
        ("TopKV2", "float32", "int64", "", "float32 int32"),
        ("Range", "int64", "int32", "int64", "int64"),
    ):
        operands = (*tensors(before), *tensors(size, constant=constant), *tensors(after))
        found = place(OWN, kind, operands, tensors(result))
        assert found.place in ("none", "AI CPU") and "int64" in found.reason and not found.casts, kind
        if kind != "Range":
            operands = (*tensors(before), *tensors("int32", constant=constant), *tensors(after))
            assert place(OWN, kind, operands, tensors(result)).place == "AI Core", kind


def test_every_fact_has_a_source_and_reads_as_a_rule():
    facts = placement.facts()
    dtypes = {*placement.HIGHER, *placement.HIGHER.values()}
    for name, fact in facts["types"].items():
        assert fact["source"] in facts["sources"], name
        dtypes |= {dtype for column in OWN.core[name].columns for dtype in column} if "core" in fact else set()
        assert set(fact) <= {"core", "cpu", "becomes", "source"}
    assert {facts[engine]["source"] for engine in ("ge", "hccl")} <= set(facts["sources"])
    assert all(dtype.strip("0123456789") in ("float", "bfloat", "int", "uint", "bool") for dtype in dtypes), dtypes
    assert set(facts["accepted"]) <= set(OWN.cpu)


def column(name, dtypes, formats="", kind="required"):
    made = {"name": name, "dtype": dtypes, "paramType": kind}
    return {**made, "format": formats} if formats else made


CORE = {
    "Add": {
        "input0": {"name": "x1"},
        "input1": {"name": "x2"},
        "output0": {"name": "y"},
        "dynamicFormat": {"flag": "true"},
    },
    "ConcatD": {"input0": {"name": "x", "paramType": "dynamic"}, "output0": {"name": "y"}},
    "Mine": {"input0": {"name": "x"}, "output0": {"name": "y"}},
    "Abs": {"input0": column("x", "bfloat16,float16,float"), "output0": column("y", "bfloat16,float16,float")},
    "Pack": {"input0": column("x", "float,int8", "ND,ND", "dynamic"), "output0": column("y", "float,int8", "ND,ND")},
    "Conv2DBackpropFilter": {
        "input0": column("x", "float16,float", "NC1HWC0,NC1HWC0"),
        "input1": column("filter_size", "int32,int32", "ND,ND"),
        "input2": column("out_backprop", "float16,float", "NC1HWC0,NC1HWC0"),
        "output0": column("y", "float,float", "FRACTAL_Z,FRACTAL_Z"),
    },
}
CPU = {
    "Sort": {
        "input0": {"name": "x", "type": "DT_FLOAT,DT_INT64"},
        "output0": {"name": "y1", "type": "DT_FLOAT,DT_INT64"},
    },
    "Pack": {"dynamic_input0": {"name": "x", "type": "DT_BF16"}, "output0": {"name": "y", "type": "DT_BF16"}},
}


@pytest.fixture
def cann(tmp_path):
    """A folder with tables as CANN writes them, of a few types."""

    def write(core, chip="ascend910b"):
        built_in = tmp_path / "opp" / "built-in" / "op_impl"
        table = built_in / "ai_core" / "tbe" / "config" / chip / f"aic-{chip}-ops-info.json"
        table.parent.mkdir(parents=True)
        table.write_text(core if isinstance(core, str) else json.dumps(core))
        cpu = built_in / "aicpu" / "aicpu_kernel" / "config"
        cpu.mkdir(parents=True)
        (cpu / "aicpu_kernel.json").write_text(json.dumps(CPU))
        (cpu / "host_cpu_kernel.json").write_text(json.dumps({"Abs": {"input0": {"name": "x", "type": "DT_INT64"}}}))
        return tmp_path

    return write


def test_an_installed_canns_tables_decide(cann):
    folder = cann(CORE)
    package = folder / "opp" / "vendors" / "bevfn" / "op_impl" / "cpu" / "config"
    package.mkdir(parents=True)
    (package / "mine.json").write_text(
        json.dumps({"BevfnLinearAssignment": {"input0": {"name": "c", "type": "DT_FLOAT"}}})
    )
    tables = opp.read(folder)
    assert opp.read(folder / "opp").core == tables.core  # either folder
    for kind, operands, results, expected in (
        ("Abs", "float32", "float32", "AI Core"),
        ("Abs", "int64", "int64", "none"),  # the host's list is for constants
        ("Pack", "int8 int8 int8", "int8", "AI Core"),
        ("Pack", "bfloat16 bfloat16", "bfloat16", "AI Core with a cast"),
        ("Sort", "int64", "int64", "AI CPU"),
        ("Add", "int32 int32", "int32", "AI Core"),  # the table leaves its dtypes open, our facts do not
        ("StridedSliceV2", "bool int64 int64 int64 int64", "bool", "none"),  # nothing that it could become
        ("Mine", "float32", "float32", "unknown"),
        ("Exp", "float32", "float32", "none"),  # not installed here, whatever our facts say
        ("BevfnLinearAssignment", "float32", "float32", "AI CPU"),
    ):
        assert where(kind, operands, results, tables).place == expected, kind
    assert tables.facts == {"Add"}
    images = (Tensor("float16", "NCHW"), Tensor("int32"), Tensor("float16", "NCHW"))
    assert place(tables, "Conv2DBackpropFilter", images, tensors("float32")).layout
    assert not where("Abs", "float32", "float32", tables).layout


def operand(**fields):
    return {"input0": {"name": "x", **fields}}


@pytest.mark.parametrize(
    "core, chip, said",
    [
        (
            CORE,
            "ascend310p",
            r"no table for ascend910b, but tables of ascend310p; install the kernels package of Atlas A2",
        ),
        (
            "[1]",
            "ascend910b",
            r"ops-info.json is not a table of operators \(it is no object of types\); install CANN again",
        ),
        ("{", "ascend910b", r"ops-info.json is not a table of operators"),
        ({}, "ascend910b", r"ops-info.json is not a table of operators \(no type is in it\); install CANN again"),
        ({"Add": None}, "ascend910b", r"ops-info.json is not a table of operators \(Add is no object\)"),
        ({"Add": []}, "ascend910b", r"\(Add is no object\)"),
        ({"Add": 3}, "ascend910b", r"\(Add is no object\)"),
        ({"Add": {}}, "ascend910b", r"\(Add has neither operands nor results\)"),
        ({"Add": {"input0": "x"}}, "ascend910b", r"not a table of operators \(input0 of Add is no object\)"),
        ({"Add": {"output0": None}}, "ascend910b", r"\(output0 of Add is no object\)"),
        ({"Add": operand(dtype=None)}, "ascend910b", r"\(dtype of input0 of Add is None, and not names separated by"),
        ({"Add": operand(dtype=["float"])}, "ascend910b", r"\(dtype of input0 of Add is \['float'\], and not names"),
        ({"Add": operand(dtype=3)}, "ascend910b", r"\(dtype of input0 of Add is 3, and not names"),
        ({"Add": operand(dtype="float,")}, "ascend910b", r"\(dtype of input0 of Add is 'float,', and not names"),
        ({"Add": operand(dtype="float", format=3)}, "ascend910b", r"\(format of input0 of Add is 3, and not names"),
    ],
)
def test_tables_of_another_chip_or_none_are_one_sentence(cann, core, chip, said):
    with pytest.raises(ValueError, match=said):
        opp.read(cann(core, chip))


def test_an_entry_of_the_ai_cpu_that_cannot_be_read_is_one_sentence(cann):
    folder = cann(CORE)
    file = folder / "opp/built-in/op_impl/aicpu/aicpu_kernel/config/aicpu_kernel.json"
    for table, said in (
        ({}, "no type is in it"),
        ({"Sort": None}, "Sort is no object"),
        ({"Sort": {"input0": 3}}, "input0 of Sort is no object"),
        (
            {"Sort": {"input0": {"type": ["DT_FLOAT"]}}},
            r"type of input0 of Sort is \['DT_FLOAT'\], and not names separated by commas",
        ),
        ({"Sort": {}}, "Sort has neither operands nor results"),
    ):
        file.write_text(json.dumps(table))
        with pytest.raises(ValueError, match=rf"aicpu_kernel.json is not a table of operators \({said}\); install"):
            opp.read(folder)


def test_a_cann_without_a_list_of_ai_cpu_kernels_is_one_sentence(cann):
    folder = cann(CORE)
    (folder / "opp/built-in/op_impl/aicpu/aicpu_kernel/config/aicpu_kernel.json").unlink()  # host_cpu_kernel.json stays
    with pytest.raises(
        ValueError, match=r"--opp .* has no list of AI CPU kernels .*; install CANN's toolkit with them"
    ):
        opp.read(folder)


def test_an_entry_that_says_no_dtypes_is_open(cann):
    """A missing dtype leaves it to the kernel; lists of unequal length do not say what belongs together; MemSet clears memory."""
    uneven = {"input0": column("x", "float,int8"), "output0": column("y", "float")}
    tables = opp.read(cann({"MemSet": {"attr": {"list": "sizes"}}, "Mine": operand(), "Abs": uneven}))
    assert "MemSet" in tables.open and "Mine" in tables.open and not tables.open & tables.core.keys()
    assert tables.facts == {"Abs"}


def test_a_folder_without_cann_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"--opp .* has no built-in/op_impl; give CANN's toolkit folder, or its opp"):
        opp.read(tmp_path)
    (tmp_path / "opp/built-in/op_impl").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has no table for ascend910b; install the kernels package of Atlas A2"):
        opp.read(tmp_path)
