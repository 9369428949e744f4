"""Sparse deltas: exact both ways, small files, and no delta on another base."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flora_jax as flora
from flora_jax import io
from flora_jax.core.errors import FormatError, StructureError
from flora_jax.io import safetensors


def base():
    rng = np.random.default_rng(0)
    f = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "layers": {"q": {"kernel": f(2, 6, 4)}, "norm": {"scale": jnp.ones((2, 6), jnp.bfloat16)}},
        "head": {"kernel": f(6, 3).at[0, 0].set(0.0)},
    }


def changed():
    params = base()
    q = params["layers"]["q"]["kernel"].at[1, 2, 3].set(9.0).at[0, 0, 1].set(jnp.nan)
    head = params["head"]["kernel"].at[0, 0].set(-0.0)
    return {"layers": {**params["layers"], "q": {"kernel": q}}, "head": {"kernel": head}}


def bits(tree):
    return jax.tree.map(lambda x: np.asarray(x).view(f"u{x.dtype.itemsize}").tolist(), tree)


def test_only_what_changed_and_exactly(tmp_path):
    delta = io.sparse_delta(base(), changed())
    assert {p: e.indices.tolist() for p, e in delta.items()} == {
        "head/kernel": [0],  # 0.0 became -0.0: bits, not values
        "layers/q/kernel": [1, 24 + 2 * 4 + 3],
    }
    assert bits(io.apply_delta(base(), delta)) == bits(changed())
    io.save_delta(tmp_path / "d.safetensors", base(), delta)
    loaded = io.load_delta(tmp_path / "d.safetensors", base())
    assert bits(io.apply_delta(base(), loaded)) == bits(changed())
    files = safetensors.TensorFiles(tmp_path / "d.safetensors")
    assert sum(files[name].size for name in files) == 2 * 3
    assert files["layers/q/kernel/indices"].dtype == np.int32
    assert io.sparse_delta(base(), base()) == {}


def test_low_bit_weights_may_stand_by_but_not_change():
    low = flora.quantize(base(), {"head/kernel": flora.Format("int8", block=3)})
    params = {**low, "layers": changed()["layers"]}
    assert list(io.sparse_delta(low, params)) == ["layers/q/kernel"]
    other = flora.quantize(
        jax.tree.map(lambda x: 2 * x, base()), {"head/kernel": flora.Format("int8", block=3)}
    )
    with pytest.raises(StructureError, match="head/kernel: a QArray has no sparse delta"):
        io.sparse_delta(low, {**params, "head": other["head"]})


def test_another_tree_is_refused(tmp_path):
    with pytest.raises(StructureError, match="layers/.* is only in the base"):
        io.sparse_delta(base(), {"head": base()["head"]})
    with pytest.raises(StructureError, match="head/kernel: bfloat16"):
        half = {**base(), "head": {"kernel": base()["head"]["kernel"].astype(jnp.bfloat16)}}
        io.sparse_delta(base(), half)
    delta = io.sparse_delta(base(), changed())
    with pytest.raises(StructureError, match="the base has no 'head/kernel'"):
        io.apply_delta({"layers": base()["layers"]}, delta)
    with pytest.raises(StructureError, match=r"head/kernel: index 99 is outside of shape \(6, 3\)"):
        io.apply_delta(base(), {"head/kernel": io.sparse.Entries(np.array([99]), np.ones(1, "f4"))})
    path = tmp_path / "d.safetensors"
    io.save_delta(path, base(), delta)
    other = base()
    other["head"]["kernel"] = other["head"]["kernel"].at[5, 2].add(1e-3)
    with pytest.raises(FormatError, match="head/kernel is a change of another base"):
        io.load_delta(path, other)


def _entry(indices, values=None):
    values = np.ones(len(indices), np.float32) if values is None else values
    return {"head/kernel/indices": np.asarray(indices, np.int32), "head/kernel/values": values}


@pytest.mark.parametrize(
    "tensors,changes,message",
    [
        (_entry([1]), {"format": "x"}, "format 'x' version '1' is not flora_jax.sparse_delta"),
        (_entry([1]), {"version": "2"}, "version '2' is not"),
        (_entry([1]), {"shapes": "3"}, "no shapes or checksums"),
        (_entry([1]), {"base_crc32": "{}"}, "no shapes or checksums"),
        (_entry([3, 1]), {}, "indices must ascend within the 18 entries"),
        (_entry([1, 1]), {}, "indices must ascend"),
        (_entry([18]), {}, "indices must ascend"),
        (_entry([-1]), {}, "indices must ascend"),
        (_entry([1, 2], np.ones(1, np.float32)), {}, r"\(2,\) indices for \(1,\) values"),
        ({**_entry([1]), "y/values": np.ones(1)}, {}, "y/values is not in shapes"),
        ({"head/kernel/values": np.ones(1)}, {}, "head/kernel/indices is missing"),
    ],
)
def test_malformed_files(tmp_path, tensors, changes, message):
    metadata = {
        "format": "flora_jax.sparse_delta",
        "version": "1",
        "shapes": json.dumps({"head/kernel": [6, 3]}),
        "base_crc32": json.dumps({"head/kernel": 1}),
        **changes,
    }
    safetensors.save_one(tmp_path / "d.safetensors", tensors, metadata)
    with pytest.raises(FormatError, match=message):
        io.load_delta(tmp_path / "d.safetensors", base())
