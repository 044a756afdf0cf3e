"""torch's .pth without torch.load: the same tensors from both forms, nothing called, nothing made that is not there."""

import io
import itertools
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from fuzz import bounded
from torch import Tensor

from bevfn import upstream

DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
          torch.bool, torch.complex64, torch.complex128)  # fmt: skip


def state() -> dict[str, Tensor]:
    """Every kind of tensor that a state dict can hold."""
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    found = {"a": base, "view": base[1:3, ::2], "turned": base.T, "tied": base, "none": torch.zeros(0, 3)}
    found |= {"scalar": torch.tensor(3), "last": base.reshape(-1)[-1:]}
    found |= {str(dtype)[6:]: torch.tensor([0, 1, 1]).to(dtype) for dtype in DTYPES}
    return found | {"channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}


@pytest.mark.parametrize("zipped", [True, False])
def test_both_forms_of_torch_give_the_same_tensors(tmp_path, zipped):
    saved = OrderedDict(state(), weight=torch.nn.Parameter(torch.ones(2)))
    saved._metadata = OrderedDict({"": {"version": 1}})
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read, wanted = upstream.read_state_dict(tmp_path / "a.pth"), torch.load(tmp_path / "a.pth", weights_only=True)
    assert list(read) == list(wanted)
    for name in wanted:
        assert read[name].dtype == wanted[name].dtype and torch.equal(read[name], wanted[name]), name
        assert not read[name].requires_grad
    assert read["a"].data_ptr() == read["tied"].data_ptr()


@pytest.mark.parametrize("zipped", [True, False])
def test_what_stands_beside_a_state_dict_is_read_over(tmp_path, zipped):
    parameter = torch.nn.Parameter(torch.randn(5))
    adam = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    adam.step()
    beside = {"optimizer": adam.state_dict(), "seen": {1, 2}, "size": torch.Size([1, 2]), "raw": bytearray(b"ab")}
    beside |= {"dtype": torch.float32, "text": b"bytes", "big": 2**70, "nested": [(1, [2.5, None, True])]}
    torch.save({**beside, "state_dict": state()}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert list(upstream.read_state_dict(tmp_path / "a.pth")) == list(state())


def test_a_flipped_bit_anywhere_in_a_zip_is_found_or_changes_nothing(tmp_path):
    path, draw = tmp_path / "a.pth", random.Random(0)
    torch.save(state(), path)
    whole, wanted = path.read_bytes(), upstream.read_state_dict(path)
    refused = 0
    for _ in range(300):
        place = draw.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        try:
            read = upstream.read_state_dict(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        # Padding between records, and what the zip says twice.
        assert list(read) == list(wanted) and all(torch.equal(read[name], wanted[name]) for name in wanted)
    assert refused > 50


@pytest.mark.parametrize("name", ["a.1", "a.2"])
def test_a_flipped_bit_in_a_tensor_is_named(tmp_path, name):
    path = tmp_path / "a.pth"
    torch.save({name: torch.zeros(1000)}, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(bytes(4000)) + 2000] ^= 1
    path.write_bytes(whole)
    with pytest.raises(
        ValueError, match=r"a\.pth is not a complete torch checkpoint \(Bad CRC-32 for file 'a/data/0'\)"
    ):
        upstream.read_state_dict(path)


# ------------------------------------------------------------------------------------------------ pickles by hand

NAME = b"X\x01\x00\x00\x00w"


def storage(count: bytes, key: bytes = b"0") -> bytes:
    """The persistent id of a float storage; `count` is the opcode of its number."""
    text = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX" + struct.pack("<I", len(key)) + key
    return text + b"X\x03\x00\x00\x00cpu" + count + b"tQ"


def tensor(of: bytes, size: bytes, stride: bytes, offset: bytes = b"K\x00") -> bytes:
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + of + offset + size + stride + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def number(value: int) -> bytes:
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def zipped(content: bytes, data: bytes = bytes(16), compression: int = zipfile.ZIP_STORED) -> bytes:
    """A .pth with this pickle and one storage."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr("a/byteorder", b"little")
        archive.writestr("a/data/0", data)
    return file.getvalue()


def one(value: bytes) -> bytes:
    """{"w": value}"""
    return b"}" + NAME + value + b"s"


FOUR, ONE = b"K\x04\x85", b"K\x01\x85"
DEEP = b"K\x01\x85" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))  # 2^60 when hashed
ASKING = {
    "3 GB of bytearray": b"\x80\x02c__builtin__\nbytearray\n" + number(3_000_000_000) + b"\x85R.",
    "a memo of 2^31 places": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "4 GB of text": b"\x80\x02X\xff\xff\xff\xff",
    "2^40 bytes of text": b"\x80\x04\x8d" + struct.pack("<Q", 2**40),
    "2^62 bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**62),
    "2^40 numbers in a zip": zipped(one(tensor(storage(number(2**40)), number(2**40) + b"\x85", ONE))),
    "2^40 numbers in 4": zipped(one(tensor(storage(b"K\x04"), number(2**40) + b"\x85", b"K\x00\x85"))),
    "numbers behind the storage": zipped(one(tensor(storage(b"K\x04"), FOUR, ONE, b"K\x01"))),
    "a negative stride": zipped(one(tensor(storage(b"K\x04"), FOUR, number(-1) + b"\x85", b"K\x03"))),
    "a shape of 2^2000": zipped(one(tensor(storage(b"K\x04"), (number(2**2000) * 2) + b"\x86", ONE))),
    "a shape that is none": zipped(one(tensor(storage(b"K\x04"), DEEP, ONE))),
    "another length of a storage": zipped(one(tensor(storage(b"K\x03"), b"K\x03\x85", ONE))),
    "a storage that is not there": zipped(one(tensor(storage(b"K\x04", b"../../0"), FOUR, ONE))),
    "a key that hashes for ever": zipped(b"}" + DEEP + b"Ns"),
    "ten million dicts": zipped(b"(" + b"}" * 10_000_000 + b"t"),
    "a compressed record": zipped(one(tensor(storage(b"J\x00\x00\x00\x10"), b"J\x00\x00\x00\x10\x85", ONE)),
                                  bytes(2**28), zipfile.ZIP_DEFLATED),
    "no end": b"\x80\x02}",
    "a stack that is empty": b"\x80\x02R.",
    "a list as a dict": zipped(b"]" + NAME + b"Ns"),
    "a call of a storage": zipped(one(storage(b"K\x04") + b")R")),
    "an old operation": b"\x80\x02I01\n.",
    "2^40 numbers in the old form": (
        pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
        + b"\x80\x02" + one(tensor(storage(number(2**40)), number(2**40) + b"\x85", ONE)) + b"."
        + b"\x80\x02]X\x01\x00\x00\x000a." + struct.pack("<q", 2**40) + bytes(16)
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ASKING)
def test_a_file_that_asks_for_more_than_it_holds_is_one_sentence_at_once(tmp_path, what):
    path = tmp_path / "a.pth"
    path.write_bytes(ASKING[what])
    outcome = bounded.run(lambda: upstream.read_state_dict(path), seconds=15, memory=2**29)
    assert outcome.refused and str(path) in outcome.out, outcome


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.load", "torch._utils._rebuild_sparse_tensor", "torch.FancyStorage"]
)
def test_what_is_no_tensor_and_no_log_is_named(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    (tmp_path / "a.pth").write_bytes(zipped(one(f"c{module}\n{attribute}\n)R".encode())))
    with pytest.raises(ValueError, match=f"holds a pickled {name} besides tensors"):
        upstream.read_state_dict(tmp_path / "a.pth")


def test_a_hand_made_file_is_read(tmp_path):
    """So that the refusals above are for what they say."""
    (tmp_path / "a.pth").write_bytes(
        zipped(one(tensor(storage(b"K\x04"), FOUR, ONE)), torch.arange(4.0).numpy().tobytes())
    )
    assert upstream.read_state_dict(tmp_path / "a.pth")["w"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("length", [2**40, 2**62, 2**63, 2**64 - 1])
def test_declared_lengths_of_safetensors_are_one_sentence(tmp_path, length):
    path: Path = tmp_path / "a.safetensors"
    header = f'{{"a":{{"dtype":"F32","shape":[{length // 4}],"data_offsets":[0,{length}]}}}}'.encode()
    whole = struct.pack("<Q", len(header)) + header
    for content in (struct.pack("<Q", length) + b"{}", whole, whole + bytes(64)):
        path.write_bytes(content)
        for read in (upstream.read_state_dict, upstream.read_imported):
            outcome = bounded.run(lambda: read(path), seconds=15, memory=2**29)  # noqa: B023
            assert outcome.refused and str(path) in outcome.out, outcome


def test_names_that_no_terminal_should_show_are_refused(tmp_path):
    for name, zip_form in itertools.product(("a\nb", "\x1b[31ma"), (True, False)):
        torch.save({name: torch.zeros(1)}, tmp_path / "a.pth", _use_new_zipfile_serialization=zip_form)
        with pytest.raises(ValueError, match="has an entry named"):
            upstream.read_state_dict(tmp_path / "a.pth")


# ------------------------------------------------------------------------------------------------ forms of other writers


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_later_pickle_protocols_are_read(tmp_path, zipped, protocol):
    tensors = state()
    beside = {
        "seen": {1, 2},
        "kept": frozenset("ab"),
        "raw": bytearray(b"ab"),
        "text": b"bytes",
        "long": "x" * 300,
        "big": 2**70,
    }
    saved = {
        **beside,
        "size": torch.Size([1, 2]),
        "state_dict": OrderedDict(tensors, w=torch.nn.Parameter(torch.ones(2))),
    }
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    read = upstream.read_state_dict(tmp_path / "a.pth")
    assert list(read) == [*tensors, "w"]
    assert all(torch.equal(read[name], leaf) for name, leaf in tensors.items())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ({("a", 1): torch.zeros(2)}, "a.pth has a dict with a tuple for a name, where bevfn reads text and numbers; save"),
        ({3: torch.zeros(2)}, "a.pth: an entry of the state dict is named 3, which is no text"),
        ({"w": torch.zeros(1).expand(4)}, r"a.pth has a tensor of \[4\] that repeats 1 numbers \(stride 0, as .*contiguous"),
        ({"w": torch.zeros(3, 1).expand(3, 2**20)}, r"of \[3, 1048576\] that repeats 3 numbers"),
    ],
)  # fmt: skip
def test_a_whole_file_in_a_form_that_is_not_read_is_not_called_incomplete(tmp_path, saved, says, zipped):
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=says) as error:
        upstream.read_state_dict(tmp_path / "a.pth")
    assert "complete" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [0, 1])
def test_an_operation_of_another_protocol_is_named(tmp_path, protocol, zipped):
    saved = {"w": torch.zeros(2)}
    torch.save(saved, tmp_path / "a.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"a.pth has the operation \w+ in its pickle, of protocol 0 or 1, which is not read; save its"
    ):
        upstream.read_state_dict(tmp_path / "a.pth")


def test_a_tensor_of_one_number_may_have_any_stride(tmp_path):
    torch.save({"w": torch.as_strided(torch.arange(6.0), (1, 3), (0, 2))}, tmp_path / "a.pth")
    assert upstream.read_state_dict(tmp_path / "a.pth")["w"].tolist() == [[0, 2, 4]]
