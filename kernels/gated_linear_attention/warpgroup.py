"""The machine of :mod:`tiles64` on a Hopper GPU: a warpgroup and tiles in shared memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flora_jax.kernels import hopper
from flora_jax.kernels.gated_linear_attention import tiles64
from flora_jax.kernels.gated_linear_attention.tiles64 import SIDE

WGMMA = plgpu.Layout.WGMMA


class Machine:
    """What :mod:`tiles64` asks for, by a warpgroup."""

    def __init__(self) -> None:
        iota = partial(plgpu.broadcasted_iota, jnp.int32, (SIDE, SIDE), layout=WGMMA)
        self.index = iota(0), iota(1)

    def product(self, *pairs: tuple[Any, Any], start: Array | None = None) -> Array:
        def add(acc: Any) -> None:
            for x, y in pairs:
                plgpu.wgmma(acc, x, y)

        def body(acc: Any) -> Array:
            add(acc)
            return acc[...]

        if start is None:
            return pl.run_scoped(body, plgpu.ACC((SIDE, SIDE), jnp.float32))
        return pl.run_state(add)(plgpu.ACC.init(start))

    def loop(self, count: int, body: Callable[..., Any], carry: Any) -> Any:
        # Unrolled, the compiler keeps the masks of all levels in registers.
        cast = lambda x: plgpu.layout_cast(x, WGMMA)
        return lax.fori_loop(0, count, body, jax.tree.map(cast, carry))

    def turn(self, tile: Any) -> Any:
        return plgpu.transpose_ref(tile, (1, 0))

    def read(self, tile: Any) -> Array:
        return hopper.load(tile, WGMMA).astype(jnp.float32)

    def write(self, tile: Any, x: Array) -> None:
        store(tile, x.astype(jnp.bfloat16))

    def along(self, vector: Any) -> Array:
        return lax.broadcast_in_dim(hopper.load(vector, WGMMA.reduce(0)), (SIDE, SIDE), [1])


def store(tile: Any, x: Array) -> None:
    """Into shared memory, for all that read it next."""
    # The first: other warps of the group may still multiply what the tile held before.
    plgpu.commit_smem()
    tile[...] = x
    plgpu.commit_smem()


def meet(barrier: Any) -> None:
    """All warpgroups have come here, and what they stored is to be seen."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def decay_gate(m: Machine, logs: Sequence[Any], pair: tiles64.Pair) -> tiles64.Gate:
    """From a chunk's log-decays in shared memory, one array or none.

    ``pair`` is room for the halves of its numbers.
    """
    if not logs:
        return tiles64.NoGate()
    if len(logs[0].shape) == 1:
        return tiles64.HeadGate(logs[0])
    pair.write(m, hopper.load(logs[0], WGMMA))
    return tiles64.ChannelGate(pair)
