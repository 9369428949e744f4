"""The two sides of ``flora bench peft``, each in a process of its own.

A worker reads commands from stdin and answers one JSON line each: ``step N`` runs N training
steps, ``matmul`` times the machine's own matrix product, ``quit`` ends. Model, batch and adapter
are the same on both sides; weights are random.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TARGETS = ("q_proj", "v_proj")
RATE = 1e-3
# One configuration a method, PEFT's defaults but for the rank of LoRA, DoRA and LoHa: ours, then
# PEFT's class and arguments. ``rank`` stands for the benchmark's own.
METHODS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "lora": ("LoRA", {"rank": "rank", "alpha": "rank"}, "LoraConfig", {"r": "rank"}),
    "dora": (
        "DoRA",
        {"rank": "rank", "alpha": "rank"},
        "LoraConfig",
        {"r": "rank", "use_dora": True},
    ),
    "oft": ("OFT", {"block_size": 32}, "OFTConfig", {"oft_block_size": 32}),
    "miss": ("MiSS", {"rank": 64}, "MissConfig", {"r": 64}),
    "vera": ("VeRA", {"rank": 256}, "VeraConfig", {"r": 256}),
    "loha": ("LoHa", {"rank": "rank", "alpha": "rank"}, "LoHaConfig", {"r": "rank"}),
}
ALPHA = {"LoraConfig": "lora_alpha", "LoHaConfig": "alpha"}


def configured(arguments: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """A method's arguments with the benchmark's rank filled in."""
    return {key: rank if value == "rank" else value for key, value in arguments.items()}


def flops_per_step(batch: int, length: int, shape: Mapping[str, Any] = SMOLLM2) -> float:
    """Floating-point operations that a LoRA step needs: forward, and backward to activations.

    Two products per frozen weight (x W, dy W^T), none for its gradient; the causal attention's
    full score matrix, twice in the backward; the adapters' own share is left out (under 1 %).
    """
    d, f = shape["hidden_size"], shape["intermediate_size"]
    head_dim = d // shape["num_attention_heads"]
    kv = shape["num_key_value_heads"] * head_dim
    weights = shape["num_hidden_layers"] * (2 * d * d + 2 * d * kv + 3 * d * f)
    weights += d * shape["vocab_size"]
    scores = 2 * shape["num_hidden_layers"] * batch * length * length * d
    return 2.0 * (2 * weights * batch * length + 3 * scores)


def peak_bytes() -> int:
    """This process's largest resident size so far (Linux), in bytes."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line")


def jax_side(settings: Mapping[str, Any]) -> tuple[Callable[[], None], Callable[[], float]]:
    """``(one step, matmul flop/s)`` of this package."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import flora_jax as flora
    from flora_jax import training
    from flora_jax.models import registry
    from flora_jax.models.llama import Llama
    from flora_jax.models.llama_config import LlamaConfig

    if settings.get("cache"):
        jax.config.update("jax_compilation_cache_dir", settings["cache"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    model = Llama(LlamaConfig(**SMOLLM2, remat=settings["remat"]))
    # Leaf by leaf, as a loader would: one program for all would need the memory twice.
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32))
    base = jax.tree.map(draw, registry.abstract(model))
    names = "|".join(TARGETS)
    name, arguments, _, _ = METHODS[settings["method"]]
    adapter = getattr(flora, name)(**configured(arguments, settings["rank"]))
    plan = flora.plan(base, {f"layers/self_attn/({names})/kernel": adapter})
    optimizer = training.AdamW(learning_rate=RATE)
    adapters = flora.init(plan, jax.random.key(1), base)
    state = training.create_state(plan, adapters, optimizer)
    loss = training.CausalLM(model=model, chunk=settings["chunk"])
    step = training.make_step(loss, plan, optimizer)
    size = (settings["batch"], settings["length"])
    tokens = np.random.default_rng(0).integers(0, SMOLLM2["vocab_size"], size).astype(np.int32)
    batch = {"tokens": tokens, "targets": tokens, "loss_mask": np.ones(size, np.float32)}

    def one() -> None:
        nonlocal state
        state, metrics = step(state, base, batch)
        jax.block_until_ready(metrics["loss"])

    x = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(lambda a: a @ a)

    def rate() -> float:
        return _rate(lambda: product(x).block_until_ready())

    return one, rate


def torch_side(settings: Mapping[str, Any]) -> tuple[Callable[[], None], Callable[[], float]]:
    """``(one step, matmul flop/s)`` of transformers + HF PEFT on torch's CPU."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2, attn_implementation="sdpa"))
    model.config.use_cache = False
    if settings["remat"] == "full":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    _, _, name, arguments = METHODS[settings["method"]]
    options = configured(arguments, settings["rank"])
    if name in ALPHA:
        options[ALPHA[name]] = settings["rank"]
    config = getattr(peft, name)(target_modules=list(TARGETS), **options)
    model = peft.get_peft_model(model, config)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    size = (settings["batch"], settings["length"])
    tokens = torch.randint(0, SMOLLM2["vocab_size"], size)

    def one() -> None:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        loss.item()

    x = torch.ones(2048, 2048)
    return one, lambda: _rate(lambda: x @ x)


def _rate(product: Callable[[], Any]) -> float:
    times = []
    for _ in range(4):
        started = time.perf_counter()
        product()
        times.append(time.perf_counter() - started)
    return 2.0 * 2048**3 / statistics.median(times[1:])


def main() -> None:
    """The worker's loop; ``argv[1]`` is the side, ``argv[2]`` its settings as JSON."""
    side, settings = sys.argv[1], json.loads(sys.argv[2])
    started = time.perf_counter()
    one, rate = {"jax": jax_side, "torch": torch_side}[side](settings)
    built = time.perf_counter()
    one()
    ready = {"build_seconds": built - started, "first_step_seconds": time.perf_counter() - built}
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "quit":
            break
        if word == "matmul":
            print(json.dumps({"flops_per_second": rate()}), flush=True)
            continue
        times = []
        for _ in range(int(rest[0])):
            started = time.perf_counter()
            one()
            times.append(time.perf_counter() - started)
        print(json.dumps({"seconds": times, "peak_bytes": peak_bytes()}), flush=True)


if __name__ == "__main__":
    main()
