"""Cases of ``flora bench kernels``: sparse-linear attention against attention over all keys."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.kernels.bench_spec import Case, Rival
from flora_jax.kernels.block_sparse_attention.arg_specs import BENCH, SMALL, Spec
from flora_jax.kernels.block_sparse_attention.bench import softmax
from flora_jax.kernels.costs import Work
from flora_jax.kernels.sla.api import sla
from flora_jax.kernels.sla.config import SLAConfig


def attend(cfg: SLAConfig, q: Any, k: Any, v: Any, kernel: Any, bias: Any) -> jax.Array:
    """``sla`` with its parameters as arguments."""
    return sla(q, k, v, {"kernel": kernel, "bias": bias}, cfg)


def work(spec: Spec, cfg: SLAConfig, backward: bool) -> Work:
    """The sparse branch's work, the products with block means, features and the projection."""
    sparse = spec.work(backward)
    rows, (n, m) = spec.batch * spec.heads, spec.blocks
    each = spec.length * 2 * spec.width**2
    linear = rows * (3 * each + (2 * n * m * spec.width**2 if cfg.variant != "main" else 0))
    means = rows * 2 * n * m * spec.width
    flops = sparse.flops + linear * (3 if backward else 1) + means
    return Work(flops=flops, bytes=sparse.bytes, unit=spec.dtype)


def cases() -> Iterable[Case]:
    """Two variants per length."""
    for spec in (*BENCH, SMALL):
        q, k, v, _ = spec.arguments()
        params = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((spec.width,) * 2, (spec.width,))]
        blocks = {"block_q": spec.block_q, "block_k": spec.block_k}
        for variant in ("main", "sla1"):
            cfg = SLAConfig(variant=variant, critical=spec.density, **blocks)
            yield Case(
                name=f"{variant} {spec.name}",
                function=functools.partial(attend, cfg),
                args=(q, k, v, *params),
                work=work(spec, cfg, backward=False),
                wrt=(0, 1, 2, 3, 4),
                gradient_work=work(spec, cfg, backward=True),
                rivals={"jax.nn": Rival(function=softmax, args=(q, k, v))},
                small=spec.small,
            )
