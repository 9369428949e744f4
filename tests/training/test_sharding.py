"""Meshes, rules and derived shardings; specs are computed on abstract meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from training_fixtures import Stream, language_model

import flora_jax as flora
from flora_jax import training
from flora_jax.core.errors import ConfigError, RuleError, StructureError
from flora_jax.models.llama import Llama
from flora_jax.models.llama_config import LlamaConfig
from flora_jax.training import distributed, sharding


def abstract(**axes):
    return AbstractMesh(tuple(axes.values()), tuple(axes))


MESH = abstract(data=2, fsdp=2, tensor=2)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def llama(**changes):
    model = Llama(LlamaConfig.tiny(**changes))
    return jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    )


@pytest.mark.parametrize("scan", [True, False])
def test_llama_rules_fit_scanned_and_unrolled(scan):
    params = llama(scan_layers=scan, qkv_bias=True)
    specs = training.base_specs(params, MESH)
    block, lead = ("layers", (None,)) if scan else ("layers_0", ())
    assert specs["embed_tokens/embedding"] == P("tensor", "fsdp")
    assert specs["lm_head/kernel"] == P("fsdp", "tensor")
    assert specs[f"{block}/self_attn/q_proj/kernel"] == P(*lead, "fsdp", "tensor")
    assert specs[f"{block}/self_attn/q_proj/bias"] == P(*lead, "tensor")
    assert specs[f"{block}/mlp/down_proj/kernel"] == P(*lead, "tensor", "fsdp")
    assert specs["norm/scale"] == P(None)


def test_default_rules_drop_axes_that_the_mesh_lacks():
    specs = training.base_specs(llama(), abstract(data=4, fsdp=2))
    assert specs["layers/mlp/up_proj/kernel"] == P(None, "fsdp", None)
    assert specs["embed_tokens/embedding"] == P(None, "fsdp")


def test_own_rules_are_checked():
    params = {"q": {"kernel": shape(6, 4)}}
    assert training.base_specs(params, MESH, {"q/kernel": P("fsdp")})["q/kernel"] == P(None, "fsdp")
    with pytest.raises(StructureError, match=r"q/kernel: axis 0 of \(6, 4\) .* 4 parts"):
        training.base_specs(params, MESH, {"q/kernel": P(("data", "fsdp"), None)})
    with pytest.raises(ConfigError, match="q/kernel: unknown mesh axis 'tensr'; nearest: tensor"):
        training.base_specs(params, MESH, {"q/kernel": P("tensr")})
    with pytest.raises(StructureError, match="has more axes than shape"):
        training.base_specs(params, MESH, {"q/kernel": P(None, None, "fsdp")})
    with pytest.raises(RuleError, match="matches nothing; nearest paths: q/kernel"):
        training.base_specs(params, MESH, {"k/kernel": P("fsdp")})


def derive(kernel, adapter, base, specs=()):
    """``{name: PartitionSpec}`` of the adapter on one weight."""
    params = {"proj": {"kernel": kernel}}
    plan = flora.plan(params, {".*": adapter}, specs=specs)
    entry = plan["proj/kernel"]
    arrays = {name: s for name, s, _ in (*entry.train, *entry.frozen)}
    return {n: tuple(sharding.adapter_spec(entry, n, s, P(*base))) for n, s in arrays.items()}


def test_lora_follows_in_and_out():
    lora = flora.LoRA(rank=2)
    got = derive(shape(8, 16), lora, ("fsdp", "tensor"))
    assert got == {"a": ("fsdp", None), "b": (None, "tensor")}


def test_stack_axes_follow():
    params = {"layers": {"q": {"kernel": shape(4, 8, 16)}}}
    plan = flora.plan(params, {".*": flora.LoRA(rank=2)})
    (entry,) = plan
    spec = sharding.adapter_spec(entry, "b", (4, 2, 16), P("data", "fsdp", "tensor"))
    assert spec == P("data", None, "tensor")


def test_merged_axes_follow_the_major_one_only():
    spec = flora.KernelSpec.dense(1, 2)  # (D, heads, head size)
    rule, lora = {".*": spec}, flora.LoRA(rank=2)
    heads = derive(shape(8, 4, 6), lora, ("fsdp", "tensor", None), rule)
    assert heads == {"a": ("fsdp", None), "b": (None, "tensor")}
    inner = derive(shape(8, 4, 6), lora, ("fsdp", None, "tensor"), rule)
    assert inner["b"] == (None, None)


def test_batched_kernels_and_other_methods():
    experts = {".*": flora.KernelSpec.einsum("EBD,EDF->EBF")}
    lora = derive(shape(4, 8, 16), flora.LoRA(rank=2), ("data", "fsdp", "tensor"), experts)
    assert lora == {"a": ("data", "fsdp", None), "b": ("data", None, "tensor")}
    dora = derive(shape(8, 16), flora.DoRA(rank=2), ("fsdp", "tensor"))
    assert dora["m"] == ("tensor",)
    whole = derive(shape(8, 16), flora.Replace(), ("fsdp", "tensor"))
    assert whole == {"value": ("fsdp", "tensor")}


def test_state_shardings_cover_moments_and_low_bit_bases():
    loss, base, plan, adapters = language_model()
    mesh = training.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    for optimizer in (
        training.lora_plus(training.AdamW()),
        training.Adafactor(min_dim_size_to_factor=2),
    ):
        state = training.create_state(plan, adapters, optimizer)
        specs = training.base_specs(base, mesh)
        layout = training.state_shardings(state, plan, specs, mesh)
        assert jax.tree.structure(layout) == jax.tree.structure(state)
        placed = jax.device_put(state, layout)
        kernel = "layers/up_proj/kernel"
        assert layout.train[kernel]["a"].spec == P(None, "fsdp", None)
        assert layout.train[kernel]["b"].spec == P(None, None, "tensor")
        assert placed.step.sharding.spec == P()
    adam = training.create_state(plan, adapters, training.AdamW())
    layout = training.state_shardings(adam, plan, specs, mesh)
    assert layout.opt_state.inner_state[0].mu == layout.train
    quantized = flora.quantize(base, {"layers/.*": flora.Format("int4", block=16)})
    whole = training.base_shardings(quantized, mesh)
    jax.device_put(quantized, whole)
    leaf = whole["layers"]["up_proj"]["kernel"]
    assert {s.spec for s in jax.tree.leaves(leaf)} == {P(None, "fsdp", "tensor")}


def test_mesh_sizes():
    count = len(jax.devices())
    mesh = training.make_mesh({"data": -1, "tensor": 1})
    assert dict(mesh.shape) == {"data": count, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    for axes in ({"data": 7 * count}, {"data": -1, "tensor": 3 * count}):
        with pytest.raises(ConfigError, match=f"does not divide the {count} devices"):
            training.make_mesh(axes)
    for axes in ({}, {"a": -1, "b": -1}, {"a": 0}):
        with pytest.raises(ConfigError, match="at most one is -1"):
            training.make_mesh(axes)


def test_batch_goes_over_the_data_axes():
    assert training.batch_sharding(MESH).spec == P(("data", "fsdp"))
    assert training.batch_sharding(abstract(tensor=2)).spec == P()
    mesh = training.make_mesh({"data": -1})
    batch = distributed.global_batch(next(Stream()), training.batch_sharding(mesh))
    np.testing.assert_array_equal(batch["tokens"], next(Stream())["tokens"])


def test_initialize_needs_all_or_nothing():
    assert distributed.initialize(mode="off") is False
    assert distributed.initialize(processes=1, process=0, coordinator="x:1") is False
    with pytest.raises(ConfigError, match="go together"):
        distributed.initialize(processes=2)
    with pytest.raises(ConfigError, match="mode 'maybe'"):
        distributed.initialize(mode="maybe")
    in_a_shell = {"SLURM_NTASKS": "8"}
    assert distributed.launched_processes(in_a_shell) == 1
    assert distributed.launched_processes({"OMPI_COMM_WORLD_SIZE": "2"}) == 2
