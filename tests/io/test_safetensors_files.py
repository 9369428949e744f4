"""safetensors: round trips of every dtype, shards, and files that are not what they claim."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.core.errors import FormatError
from flora_jax.io import safetensors as sf
from flora_jax.io.files import atomic

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8, np.bool_]


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(dtype, tmp_path):
    tensors = {
        "matrix": np.arange(12).reshape(3, 4).astype(dtype),
        "turned": np.arange(12).reshape(3, 4).astype(dtype).T,
        "scalar": np.asarray(3).astype(dtype),
        "empty": np.zeros((0, 5), dtype),
    }
    sf.save(tmp_path, tensors)
    files = sf.TensorFiles(tmp_path)
    assert set(files) == set(tensors)
    for name, array in tensors.items():
        assert files.dtype(name) == array.dtype
        assert files.shape(name) == array.shape
        np.testing.assert_array_equal(files[name], array)


def test_shards_and_index(tmp_path):
    tensors = {f"t{i}": np.full((10,), i, np.float32) for i in range(5)}
    sf.save(tmp_path, tensors, max_shard_bytes=80)
    assert len(list(tmp_path.glob("model-0000?-of-00003.safetensors"))) == 3
    assert json.loads((tmp_path / sf.INDEX).read_text())["metadata"]["total_size"] == 200
    files = sf.TensorFiles(tmp_path)
    for name, array in tensors.items():
        np.testing.assert_array_equal(files[name], array)
    with pytest.raises(FormatError, match="overwrite"):
        sf.save(tmp_path, tensors)
    sf.save(tmp_path, tensors, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == [sf.SINGLE]


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
BAD = {
    "truncated": (GOOD, b"1234"),
    "extra bytes": (GOOD, b"123456789"),
    "shape forged": ({"a": {**GOOD["a"], "shape": [3]}}, b"12345678"),
    "huge shape": ({"a": {**GOOD["a"], "shape": [2**62, 2**62]}}, b"12345678"),
    "offsets reversed": ({"a": {**GOOD["a"], "data_offsets": [8, 0]}}, b"12345678"),
    "unknown dtype": ({"a": {**GOOD["a"], "dtype": "F33"}}, b"12345678"),
    "not json": (b"{nonsense", b""),
    "not an object": (b"[1, 2]", b""),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_files(name, tmp_path):
    write(tmp_path / "x.safetensors", *BAD[name])
    with pytest.raises(FormatError, match="x.safetensors"):
        sf.read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("data", [b"", b"1234", struct.pack("<Q", 2**63) + b"{}"])
def test_malformed_lengths(data, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(FormatError):
        sf.read_header(tmp_path / "x.safetensors")


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 200), flip=st.integers(0, 119), bit=st.integers(0, 7))
def test_damage_is_an_error_or_harmless(cut, flip, bit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    sf.save_one(folder / "a.safetensors", {"a": np.ones(3, np.float32), "b": np.ones(2, np.int8)})
    data = bytearray((folder / "a.safetensors").read_bytes())
    data[flip % len(data)] ^= 1 << bit
    (folder / "a.safetensors").write_bytes(data[: max(len(data) - cut, 0)] if cut % 2 else data)
    try:
        files = sf.TensorFiles(folder / "a.safetensors")
    except FormatError:
        return
    for name in files:
        assert files[name].shape == files.shape(name)


def test_folders_that_hold_no_checkpoint(tmp_path):
    with pytest.raises(FormatError, match="neither"):
        sf.TensorFiles(tmp_path)
    write(tmp_path / "other.safetensors", GOOD, b"12345678")
    with pytest.raises(FormatError, match="other.safetensors"):
        sf.TensorFiles(tmp_path)
    (tmp_path / sf.INDEX).write_text('{"weight_map": {"z": "other.safetensors"}}')
    with pytest.raises(FormatError, match="promises 'z'"):
        sf.TensorFiles(tmp_path)
    (tmp_path / sf.INDEX).write_text('{"weight_map": {"z": "../other.safetensors"}}')
    with pytest.raises(FormatError, match="outside"):
        sf.TensorFiles(tmp_path)
    (tmp_path / sf.INDEX).write_text('{"weight_map": {"z": "gone.safetensors"}}')
    with pytest.raises(FormatError, match="no such file"):
        sf.TensorFiles(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
