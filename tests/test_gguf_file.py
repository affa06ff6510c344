"""GGUF files are read as the library of llama.cpp reads them, only faster, and damaged ones are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from qlora_sft.gguf_file import read_gguf


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a value of every type, and tensors with rows that are packed and rows that are not."""
    path = tmp_path_factory.mktemp("gguf") / "all.gguf"
    writer = GGUFWriter(path, "llama")
    for kind, value in (
        ("uint8", 200), ("int8", -3), ("uint16", 60000), ("int16", -300), ("uint32", 2**32 - 1), ("int32", -(2**31)),
        ("float32", 0.25), ("uint64", 2**63), ("int64", -(2**40)), ("float64", 1e-300), ("bool", True),
    ):  # fmt: skip
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.add_string("a.string", "Straße 東京")
    for name, items in (("texts", ["a", "", "ö b"]), ("numbers", [3, -1]), ("floats", [0.5, -2.0]), ("flags", [True])):
        writer.add_array(f"a.{name}", items)
    weights = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    for kind in (GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0):
        writer.add_tensor(kind.name, quantize(weights, kind), raw_dtype=kind)
    writer.add_tensor("F32", weights)
    writer.add_tensor("a vector", weights[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_is_read_as_the_library_reads_it(written: Path) -> None:
    ours, theirs = read_gguf(written), GGUFReader(written)
    wanted = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.fields == wanted
    assert len(wanted) == 17
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for our, their in zip(ours.tensors, theirs.tensors, strict=True):
        assert (our.tensor_type, list(our.shape)) == (their.tensor_type, their.shape.tolist())
        values = dequantize(our.data, our.tensor_type)
        np.testing.assert_array_equal(values, dequantize(their.data, their.tensor_type), strict=True)
    assert written.read_bytes()[ours.offsets["a.uint8"]] == 200


def test_a_file_that_ends_too_early_is_refused_wherever_it_is_cut(written: Path, tmp_path: Path) -> None:
    whole, cut = written.read_bytes(), tmp_path / "cut.gguf"
    for size in range(0, len(whole) - 64, 7):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"."):
            read_gguf(cut)


def test_what_is_no_gguf_or_one_of_another_time_is_refused(written: Path, tmp_path: Path) -> None:
    whole, other = written.read_bytes(), tmp_path / "other.gguf"
    for begin, message in ((b"GGML", "begin with GGUF"), (b"GGUF\x09\0\0\0", "version 9; known are 2 and 3")):
        other.write_bytes(begin + whole[len(begin) :])
        with pytest.raises(ValueError, match=message):
            read_gguf(other)
