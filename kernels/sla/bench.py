"""Cases of ``flora bench kernels``: sparse-linear attention against attention over all keys.

Arguments are as the projections of a layer leave them, see ``block_sparse_attention.bench``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.kernels.bench_spec import Case, Rival
from flora_jax.kernels.block_sparse_attention.arg_specs import BENCH, SMALL, Spec
from flora_jax.kernels.block_sparse_attention.bench import flat, over_all
from flora_jax.kernels.costs import Work
from flora_jax.kernels.sla.api import sla
from flora_jax.kernels.sla.config import SLAConfig


def attend(spec: Spec, cfg: SLAConfig, q: Any, k: Any, v: Any, kernel: Any, bias: Any) -> jax.Array:
    """``sla`` of flat arguments, with its parameters as arguments."""
    q, k, v = (x.reshape(a.shape) for x, a in zip((q, k, v), spec.arguments()))
    return flat(sla(q, k, v, {"kernel": kernel, "bias": bias}, cfg))


def work(spec: Spec, cfg: SLAConfig, backward: bool) -> Work:
    """The sparse branch's work, the products with block means, features and the projection."""
    sparse = spec.work(backward)
    rows, (n, m) = spec.batch * spec.heads, spec.blocks
    each, square = spec.length * 2 * spec.width**2, 2 * spec.width**2
    if cfg.variant == "main":
        # State and numerator; the gradient needs no numerator, but two products for each of them.
        # The projection is one of states.
        linear = (
            (5 * each + 3 * spec.width * square) if backward else 2 * each + spec.width * square
        )
    else:
        linear = (3 * each + n * m * square) * (3 if backward else 1)
    means = rows * 2 * n * m * spec.width
    flops = sparse.flops + rows * linear + means
    return Work(flops=flops, bytes=sparse.bytes, unit=spec.dtype)


def cases() -> Iterable[Case]:
    """Two variants per length."""
    for spec in (*BENCH, SMALL):
        arrays = [flat(x) for x in spec.arguments()[:3]]
        params = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((spec.width,) * 2, (spec.width,))]
        blocks = {"block_q": spec.block_q, "block_k": spec.block_k}
        for variant in ("main", "sla1"):
            cfg = SLAConfig(variant=variant, critical=spec.density, **blocks)
            yield Case(
                name=f"{variant} {spec.name}",
                function=functools.partial(attend, spec, cfg),
                args=(*arrays, *params),
                work=work(spec, cfg, backward=False),
                wrt=(0, 1, 2, 3, 4),
                gradient_work=work(spec, cfg, backward=True),
                rivals={
                    "jax.nn": Rival(function=functools.partial(over_all, spec), args=tuple(arrays))
                },
                small=spec.small,
            )
