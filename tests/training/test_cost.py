"""What adapters save: temporaries, no dense dW, no copy of the base; read off compiled programs."""

import re

import jax
import jax.numpy as jnp
import pytest
from training_fixtures import Stream, language_model

import flora_jax as flora
from flora_jax import training
from flora_jax.models.llama import Llama
from flora_jax.models.llama_config import LlamaConfig

pytestmark = pytest.mark.optimised

LORA = {"layers/self_attn/(q|v)_proj/kernel": flora.LoRA(rank=8, alpha=16.0)}
FULL = {".*": flora.Replace()}
MiB = 2**20


def lowered(rules, config, batch, length, **options):
    """``(step, state, base, batch)`` of shapes only: nothing is allocated."""
    model = Llama(config)
    base = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    )
    plan = flora.plan(base, rules)
    optimizer = training.AdamW()
    state = jax.eval_shape(
        lambda b: training.create_state(plan, flora.init(plan, jax.random.key(0), b), optimizer),
        base,
    )
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((batch, length), jnp.float32)
    step = training.make_step(training.CausalLM(model=model, chunk=32), plan, optimizer, **options)
    return step, state, base, {"tokens": ids, "targets": ids, "loss_mask": mask}


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_smollm2_lora_needs_less_than_full_fine_tuning():
    config = LlamaConfig.smollm2_135m()
    costs, base = {}, None
    for name, rules in (("lora", LORA), ("full", FULL)):
        step, state, base, batch = lowered(rules, config, 4, 64)
        costs[name] = training.compiled_cost(step, state, base, batch)
    lora, full = costs["lora"], costs["full"]
    assert lora["temp_bytes"] < 0.7 * full["temp_bytes"]
    assert lora["peak_bytes"] < 0.5 * full["peak_bytes"]
    assert lora["flops"] < 0.8 * full["flops"]
    # beside the base only the adapters, their moments and the batch are arguments
    assert lora["argument_bytes"] - nbytes(base) < 8 * MiB
    assert lora["output_bytes"] < 8 * MiB and lora["alias_bytes"] > 4 * MiB


def test_scanned_binding_does_not_copy_the_base():
    config = LlamaConfig.tiny(
        hidden_size=256, intermediate_size=512, num_hidden_layers=16, remat="full"
    )
    step, state, base, batch = lowered(LORA, config, 2, 16)
    cost = training.compiled_cost(step, state, base, batch)
    assert cost["temp_bytes"] < 0.15 * nbytes(base)


def dots_of_shape(text, shapes):
    """Matrix products in HLO text whose result has one of the shapes."""
    found = re.findall(r"= \w+\[([\d,]*)\][^=]*? (?:dot|custom-call)\(", text)
    return [s for s in found if tuple(map(int, filter(None, s.split(",")))) in shapes]


@pytest.mark.parametrize("name,rules", [("lora", None), ("full", {".*_proj/kernel": FULL[".*"]})])
def test_no_dense_gradient_in_the_compiled_lora_step(name, rules):
    loss, base, plan, adapters = language_model(rules)
    optimizer = training.SGD()
    state = training.create_state(plan, adapters, optimizer)
    batch = next(Stream(batch=3, length=5))  # 15 rows: no activation looks like a kernel
    step = training.make_step(loss, plan, optimizer)
    text = step.lower(state, base, batch).compile().as_text()
    kernels = {(16, 32), (32, 16), (2, 16, 32), (2, 32, 16)}
    assert bool(dots_of_shape(text, kernels)) == (name == "full")


def test_cost_of_a_known_program():
    x = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    cost = training.compiled_cost(jax.jit(lambda a, b: a @ b, donate_argnums=0), x, x)
    assert cost["argument_bytes"] == 2 * 128 * 128 * 4
    assert cost["output_bytes"] == 128 * 128 * 4
    assert 2 * 128**3 <= cost["flops"] < 2.1 * 128**3
    live = cost["argument_bytes"] + cost["output_bytes"] + cost["temp_bytes"]
    assert cost["peak_bytes"] == live - cost["alias_bytes"]
