"""The image as weights, as tokens, and not at all; seeds outermost."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flora_jax import config
from flora_jax.adapters import perceptual
from flora_jax.adapters.prompts import VirtualRows
from flora_jax.core.adapter import Adapter
from flora_jax.core.registry import register

SEEDS = range(3)
GENERATOR = {"tokens": 16, "features": 4, "width": 64, "depth": 2, "heads": 4}
TOKENS = {"embed_tokens/embedding": "@ImageTokens()"}
WEIGHTS = {"layers/self_attn/(q|k|v|o)_proj/kernel": "@LoRA()"}


@config.register
@register("ImageTokens", family="experiment", paper="", arxiv="", mergeable=False)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTokens(Adapter):
    """What VLoRA is compared with: its generator makes tokens before the text, not weights.

    ``rows`` virtual rows ``prompt + made`` of the embedding table for each row of the batch, made
    by a generator as wide and deep as one of VLoRA's (a query a token), or by one linear map of all
    features.
    """

    rows: int = 4
    projector: str = "queries"
    tokens: int = 16
    features: int = 4
    width: int = 64
    depth: int = 2
    heads: int = 4
    ratio: int = 4

    kinds = ("embedding",)
    pooled = True
    per_example = True

    @property
    def sizes(self):
        return perceptual.Sizes(
            self.tokens, self.features, self.width, self.depth, self.heads, self.ratio
        )

    def virtual_rows(self):
        return self.rows

    def init(self, key, spec, base):
        return {"prompt": jnp.zeros((self.rows, base.shape[1]))}, {}

    def pool(self, key, entries):
        (entry,) = entries
        if self.projector == "linear":
            n_in, n_out = self.tokens * self.features, self.rows * entry.shape[1]
            return {"kernel": jax.random.normal(key, (n_in, n_out)) / n_in**0.5}, {}
        visual, own = jax.random.split(key)
        made = perceptual.init_generator(own, self.sizes, self.rows, entry.shape[1], 1)
        made |= perceptual.init_visual(visual, self.sizes)
        return made, {}

    def generate(self, pool, features, entries):
        if self.projector == "linear":
            flat = features.reshape(len(features), -1) @ pool["kernel"]
            return {entries[0].path: {"made": flat.reshape(len(features), self.rows, -1)}}
        z = perceptual.visual_tokens(pool, features)
        own = {name: array for name, array in pool.items() if not name.startswith("visual.")}
        made = perceptual.generate_factors(own, z, self.heads, 1)[..., 0]
        return {entries[0].path: {"made": made}}

    def operator(self, params, spec, ctx):
        return ctx.base + VirtualRows(params["prompt"] + params["made"], ctx.shape[0])


def settings():
    vlora = {f"VLoRA.{name}": value for name, value in GENERATOR.items()}
    yield {"adapter": "@VLoRA()", "VLoRA.rank": 4, **vlora}
    yield {"adapter": "@LoRA()", "LoRA.rank": 4}
    for projector in ("queries", "linear"):
        tokens = {f"ImageTokens.{name}": value for name, value in GENERATOR.items()}
        tokens |= {"ImageTokens.rows": 4, "ImageTokens.projector": projector}
        yield {"train.rules": TOKENS, **tokens}
        yield {"train.rules": TOKENS | WEIGHTS, "LoRA.rank": 4, **tokens}


def sweep():
    for seed in SEEDS:
        for setting in settings():
            yield {**setting, "seed": seed}
