"""Entries to train (LIFT), directions to start from (EVA), a tenth of the numbers (Compacter)."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp

from flora_jax import config
from flora_jax.core import paths
from flora_jax.launch import pretrained
from flora_jax.launch.first_task import trained
from flora_jax.training.losses import Classification

SEEDS = range(3)
HEAD = "(classifier|head)/(kernel|bias)"
DENSE = "dense_[01]/kernel"
LINEAR = "layers/(attention/.*|mlp/fc[12])/kernel"
OUTPUTS = "layers/(attention/output/dense|mlp/fc2)/kernel"


@config.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyImageModel(pretrained.SmallImageModel):
    """A small model whose kernels got noise before its first task ended.

    Args:
      noise: deviation over the root mean square of each kernel.
      last: steps of the first task after it.
    """

    noise: float = 1.0
    last: int = 100

    def base(self, shape, num_classes):
        return _noisy(self, shape, num_classes)


@functools.lru_cache(maxsize=8)
def _noisy(source, shape, num_classes):
    params = pretrained.SmallImageModel.base(source, shape, num_classes)
    key = jax.random.key(source.seed)

    def one(path, leaf):
        if not path.endswith("kernel") or path.startswith(pretrained.HEADS):
            return leaf
        draw = jax.random.normal(jax.random.fold_in(key, zlib.crc32(path.encode())), leaf.shape)
        return leaf + source.noise * jnp.sqrt(jnp.mean(leaf**2)) * draw

    how = dataclasses.replace(source.pretraining, steps=source.last)
    model = pretrained.build(source.config, shape, how.data.num_classes)
    noisy = paths.map_with_path(one, params)
    return trained(Classification(model=model), noisy, how, source.seed)


def lift():
    """As many entries of both kernels as a LoRA of rank 2 has numbers, chosen by three scores."""
    model = {
        "train.model": "@NoisyImageModel()",
        "NoisyImageModel.config": "@MLPConfig()",
        "NoisyImageModel.pretraining": "@Pretraining()",
        "NoisyImageModel.seed": "%seed",
        "MLPConfig.sizes": (64, 256, 256, 10),
    }
    whole = {**model, "train.rules": {DENSE: "@Replace()", HEAD: "@Replace()"}}
    groups = {f"{HEAD}/.*": "@head/AdamW()", ".*": "@LIFT()"}
    sparse = {**whole, "Groups.rules": groups, "LIFT.learning_rate": "@Cosine()", "rate": 3e-3}
    sparse |= {"LIFT.rank": 2, "LIFT.filter_rank": 8, "LIFT.refresh": 50}
    for score in ("lowrank", "magnitude", "random"):
        yield {**sparse, "LIFT.score": score}
    low_rank = {"train.rules": {DENSE: "@LoRA()", HEAD: "@Replace()"}}
    yield {**model, **low_rank, "LoRA.rank": 2, "LoRA.alpha": 4.0, "rate": 1e-2}
    yield {**whole, "rate": 1e-3}


def eva():
    """The same rank budget on every kernel of the blocks, at two rates."""
    for rate in (3e-3, 1e-2):
        for name in ("LoRA", "EVA"):
            yield {
                "train.rules": {LINEAR: f"@{name}()", HEAD: "@Replace()"},
                f"{name}.rank": 2,
                f"{name}.alpha": 4.0,
                "rate": rate,
            }


def compacter():
    """Bottlenecks of 16 and 32 after both sublayers, dense and as Kronecker products."""
    for width in (16, 32):
        for name, rate in (("Bottleneck", 3e-3), ("Compacter", 1e-1)):
            rules = {OUTPUTS: f"@{name}()", HEAD: "@Replace()"}
            yield {"train.rules": rules, f"{name}.bottleneck": width, "rate": rate}


def settings():
    yield from lift()
    yield from eva()
    yield from compacter()


def sweep():
    for seed in SEEDS:
        for setting in settings():
            yield {**setting, "seed": seed}
