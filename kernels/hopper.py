"""What the kernels for Hopper GPUs (Pallas Mosaic GPU) share: tiles and a ring of buffers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flora_jax.kernels import costs, dispatch
from flora_jax.kernels.manual_axes import together

MEMORY = 220 << 10
"""Bytes of shared memory per program; the device has 227 KiB."""
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
FLOAT_TRANSFORMS = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


def kernel(
    body: Any,
    types: Any,
    scratch: Any,
    grid: Mapping[str, int],
    warpgroups: int,
    *,
    work: costs.Work,
    approximate: bool = True,
) -> Callable[..., Any]:
    """``body(*inputs, *outputs, *scratch)`` over a grid of programs; ``wg`` names the warpgroup.

    Args:
      work: what all programs do, for the compiled cost; bytes are those that they copy, also when
        the device's cache will have them.
      approximate: the device's fast exponentials and the like, which lose a few bits.
    """
    mode = dispatch.interpret_mode()
    run = plgpu.kernel(
        body,
        out_type=types,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=approximate),
        **({"interpret": mode} if mode else {}),
    )

    def call(*inputs: Array) -> Any:
        with costs.declared(work):
            # Inside of `shard_map` plgpu.kernel's results do not vary over devices by themselves.
            return together(run(*inputs), inputs)[0]

    return call


def tiles(*shape: int, dtype: Any) -> Any:
    """Shared memory that the matrix unit reads: rows of 64 times n numbers of 16 bits.

    What may reach past the end of an array is stored from here: copies of swizzled tiles stop at
    the end of each axis, those of plain memory only at the end of the array.
    """
    return plgpu.SMEM(shape, dtype, transforms=TRANSFORMS)


def float_tiles(*shape: int) -> Any:
    """Shared memory for float32 tiles; they are copied and read, never multiplied."""
    return plgpu.SMEM(shape, jnp.float32, transforms=FLOAT_TRANSFORMS)


def whole(x: Array, block: int) -> Array:
    """``x [B, T, ...]`` as kernels may copy it by blocks of tokens, of which the last may be short.

    A copy into :func:`tiles` is zero behind the end, one from there is cut off: so does the device,
    tile by tile of 8 tokens. jax's interpreter refuses such copies; there the zeros are in ``x``.
    """
    missing = -x.shape[1] % (block if dispatch.interpret_mode() else TRANSFORMS[0].tiling[0])
    return jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2))) if missing else x


def load(ref: Any, layout: Any, *, shared: bool = True) -> Array:
    """An array in registers, from shared memory, or else the device's (slow: for small ones)."""
    # jax 0.10 takes an index, which jax 0.12 has no argument for.
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *index, layout=layout, optimized=shared)


def zeros(*shape: int) -> Array:
    """A float32 tile of zeros in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Buffers in shared memory that one warpgroup fills and the others empty.

    Attributes:
      buffers: ``[slots, ...]`` references, filled together.
      full: barriers, one per slot: all copies into it have arrived.
      free: barriers, one per slot: every reader has handed it back.
      slots: number of slots.
      loaded: readers load some of them into registers, not only multiply what they hold: the copies
        that overwrite those, of another kind of access to memory, need a fence after the loads.
    """

    buffers: Sequence[Any]
    full: Any
    free: Any
    slots: int
    loaded: bool

    def fill(
        self, count: Any, sources: Callable[[Any], Sequence[Any]], registers: int | None = 40
    ) -> None:
        """Copies in ``sources(t)`` for every step ``t < count``; the copying warpgroup's part.

        Args:
          registers: what it keeps, so that others may have more; None: what it has.
        """
        if registers is not None:
            plgpu.set_max_registers(registers, action="decrease")

        def copy(t: Any, slot: Any) -> None:
            for source, buffer in zip(sources(t), self.buffers):
                plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.full.at[slot])

        @pl.loop(0, count)
        def _(t: Any) -> None:
            slot = lax.rem(t, jnp.array(self.slots, t.dtype))
            pl.when(t >= self.slots)(lambda: plgpu.barrier_wait(self.free.at[slot]))
            copy(t, slot)

    def each(self, count: Any, body: Callable[..., Any], carry: Any) -> Any:
        """``carry = body(t, buffers, carry)`` for every step; a reading warpgroup's part."""

        def step(t: Any, carry: Any) -> Any:
            slot = lax.rem(t, jnp.array(self.slots, t.dtype))
            plgpu.barrier_wait(self.full.at[slot])
            carry = body(t, [buffer.at[slot] for buffer in self.buffers], carry)
            if self.loaded:
                plgpu.commit_smem()
            plgpu.barrier_arrive(self.free.at[slot])
            return carry

        return lax.fori_loop(0, count, step, carry)


def ring_barriers(copies: int, readers: int, slots: int) -> tuple[Any, Any]:
    """``full`` and ``free`` of a :class:`Ring` whose slots take this many copies."""
    return (
        plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
        plgpu.Barrier(num_arrivals=readers, num_barriers=slots),
    )


def slots(fixed: int, each: int, steps: int) -> int:
    """Slots of a ring: as many as shared memory holds beside ``fixed`` bytes, at most 4."""
    return max(1, min(4, steps, (MEMORY - fixed) // each))
