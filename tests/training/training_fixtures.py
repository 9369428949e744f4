"""A tiny scanned language model, an MLP and deterministic data, shared by the training tests."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import flora_jax as flora
from flora_jax import training
from flora_jax.linen import layers

VOCAB, WIDTH = 64, 16


class Block(nn.Module):
    width: int
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, _):
        y = layers.Dense(2 * self.width, use_bias=False, dtype=self.dtype, name="up_proj")(x)
        y = nn.silu(y)
        y = layers.Dense(self.width, use_bias=False, dtype=self.dtype, name="down_proj")(y)
        return x + y + jnp.cumsum(y, axis=1) / 8, None


class TinyLM(nn.Module):
    """Causal through a cumulative sum; the decoder interface of the models, tied head."""

    vocab: int = VOCAB
    width: int = WIDTH
    depth: int = 2
    dtype: object = jnp.float32

    def setup(self):
        std = nn.initializers.normal(0.5)
        self.embed_tokens = layers.Embed(
            self.vocab, self.width, dtype=self.dtype, embedding_init=std
        )
        scan = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
        )
        self.layers = scan(self.width, self.dtype)

    def __call__(self, tokens, positions=None, segment_ids=None, cache=None, output="logits"):
        x, _ = self.layers(self.embed_tokens(tokens), None)
        return (x if output == "hidden" else self.head(x)), cache

    def head(self, hidden):
        return self.embed_tokens.attend(hidden)


class MLP(nn.Module):
    width: int = 32
    classes: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.relu(layers.Dense(self.width, name="hidden")(x))
        return layers.Dense(self.classes, name="out")(x)


class Stream:
    """Batches that depend on the position only; saves and restores it like a grain iterator."""

    def __init__(self, batch=8, length=12, vocab=VOCAB, limit=None, process=0, processes=1):
        self.at, self.limit = 0, limit
        self.batch, self.length, self.vocab = batch, length, vocab
        self.rows = slice(process * batch // processes, (process + 1) * batch // processes)

    def __iter__(self):
        return self

    def __next__(self):
        if self.limit is not None and self.at >= self.limit:
            raise StopIteration
        rng = np.random.default_rng([7, self.at])
        self.at += 1
        start = rng.integers(0, self.vocab, (self.batch, 1))
        tokens = (start + 3 * np.arange(self.length + 1)) % self.vocab
        mask = rng.random((self.batch, self.length)) < 0.8
        batch = {
            "tokens": tokens[:, :-1].astype(np.int32),
            "targets": tokens[:, 1:].astype(np.int32),
            "loss_mask": mask.astype(np.float32),
        }
        return {name: x[self.rows] for name, x in batch.items()}

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


RULES = {"layers/(up|down)_proj/kernel": flora.LoRA(rank=4, alpha=8.0, dropout=0.1)}


@functools.cache
def _base():
    return TinyLM().init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def language_model(rules=None, **kw):
    """``(loss, base, plan, adapters)`` of the tiny language model."""
    model, base = TinyLM(**kw), _base()
    plan = flora.plan(base, rules or RULES)
    adapters = flora.init(plan, jax.random.key(1), base)
    return training.CausalLM(model=model, chunk=4), base, plan, adapters
