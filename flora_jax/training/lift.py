"""LIFT: AdamW on the entries of a weight that are largest after a low-rank approximation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax.core import linalg, paths
from flora_jax.core.adapter import PRNG
from flora_jax.core.errors import ConfigError, PlanError
from flora_jax.core.initialize import over_stack, path_keys
from flora_jax.core.registry import register
from flora_jax.core.spec import KernelSpec, Stored, infer
from flora_jax.training.optim import Optimizer

SCORES = ("lowrank", "magnitude", "random", "gradient")
EXACT_UP_TO = 1024  # the smaller side up to which svd="auto" is an exact decomposition


class LIFTState(NamedTuple):
    """``count``: finished updates; the rest like the parameters, ``[*stack, B k]`` each.

    ``index`` is int32, ascending, into the flattened unstacked array; ``mu`` and ``nu`` are the
    float32 moments of those entries.
    """

    count: jax.Array
    index: Any
    mu: Any
    nu: Any


@dataclasses.dataclass(frozen=True)
class Layout(Stored):
    """How a trained array is cut into matrices, and how many entries of each one are trained."""

    path: str
    spec: KernelSpec
    shape: tuple[int, ...]
    k: int

    @property
    def matrices(self) -> int:
        """Matrices of one unstacked kernel: experts or groups, else 1."""
        return self.spec.sizes(self.kernel_shape)[0]

    @property
    def count(self) -> int:
        """Trained entries of the whole array."""
        return self.k * self.matrices * math.prod(self.stack)

    def per_kernel(self, f: Any) -> Any:
        """``f`` of unstacked arrays, over the stack."""
        return over_stack(f, len(self.stack))


@register(
    "LIFT",
    family="optimizer",
    paper="LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for "
    "Reasoning-Focused Supervised Fine-Tuning",
    arxiv="2506.00772",
    parameters="min((in + out) rank, in out)",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LIFT(Optimizer):
    """AdamW on ``k`` entries of each weight: the largest of its approximation of low rank.

    ``M = top_k |W_r|``, ``W_r = U_r S_r V_r^T`` of the current ``W [in, out]`` in float32,
    ``k = min((in + out) rank, in out)``: the count of a LoRA of that rank. Only ``W[M]`` moves;
    everything else keeps its bits. Moments are length-k vectors beside int32 indices. The mask
    is renewed inside the jitted step: entries that stay keep their moments, new ones start at 0,
    dropped ones are forgotten (their values stay), the step count of the bias correction goes on.

    It acts on any tree of arrays of two axes or more: ``Replace`` leaves of a plan, on a mesh too.
    Stacks of scanned layers, experts and groups are masked matrix by matrix, convolutions as
    ``[window x in, out]``. Norms and biases have no mask: give them another optimizer, or None,
    with :class:`Groups`. The paper leaves them, embeddings and the head frozen.

    Args:
      learning_rate, weight_decay, decay: see :class:`Optimizer`; only trained entries decay.
      b1, b2, eps: of Adam, ``m / (sqrt(v) + eps)`` with both bias-corrected.
      rank: sets ``k`` (the paper's LoRA-equivalent rank).
      filter_rank: of the approximation ``W_r``; at most ``min(in, out)``.
      refresh: a new mask each so many steps.
      select: ``largest`` entries, or ``smallest`` as the released code has it.
      score: ``lowrank``; for comparisons ``magnitude`` (``|W|``), ``gradient`` (``|dL/dW|`` of the
        step) or ``random`` (drawn again at every refresh).
      svd: ``exact``, ``randomized`` (a sketch of ``2 filter_rank`` columns from a fixed key) or
        ``auto``: randomised where the smaller side exceeds 1024 and four times ``filter_rank``.
      iterations: power iterations of the randomised SVD.
      seed: of the sketch and of random masks.
      specs: ordered ``{path regex: KernelSpec}`` for weights whose layout the name does not tell.

    Cadence: the first step makes the first mask; step t (from 1) makes a new one when
    ``t % refresh == 0``, from the weights as the step finds them. That is the released code's
    refresh after step t when ``(t + 1) % refresh == 0``.

    Source: arXiv 2506.00772; zihanghliu/LIFT as read. Where they differ the paper is followed: the
    released configurations select the smallest entries (``select="smallest"``), their weight
    decay changes a copy and has no effect (here it acts), their eps is not bias-corrected.

    >>> lift = LIFT(rank=128)
    >>> w = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    >>> lift.moves({"q_proj": {"kernel": w}})
    {'q_proj/kernel': 1048576}
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-6
    rank: int = 128
    filter_rank: int = 64
    refresh: int = 400
    select: str = "largest"
    score: str = "lowrank"
    svd: str = "auto"
    iterations: int = 2
    seed: int = 0
    specs: Any = ()

    def __post_init__(self):
        for name, choices in (
            ("select", ("largest", "smallest")),
            ("score", SCORES),
            ("svd", ("auto", "exact", "randomized")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"LIFT.{name}={getattr(self, name)!r} is not one of {', '.join(choices)}"
                )
        for name in ("rank", "filter_rank", "refresh"):
            if getattr(self, name) < 1:
                raise ConfigError(f"LIFT.{name}={getattr(self, name)} must be at least 1")
        object.__setattr__(self, "specs", paths.Rules.of(self.specs).items)

    def layouts(self, params: Any) -> dict[str, Layout]:
        """``{path: layout}`` of every array.

        Raises:
          PlanError: an array without two axes, of an unknown layout, or too small for
            ``filter_rank``; names the path.
        """
        flat = paths.flatten(params)
        given = paths.Rules.of(self.specs).match(flat)
        return {path: self._layout(path, tuple(x.shape), given) for path, x in flat.items()}

    def _layout(
        self, path: str, shape: tuple[int, ...], given: Mapping[str, KernelSpec]
    ) -> Layout:
        # a Replace leaf is called <weight>/value
        spec = given.get(path) or infer(path.removesuffix("/value"), shape)
        if spec.kind == "vector" and spec.ndim == 2:
            spec = KernelSpec.dense(stack_ndim=spec.stack_ndim)
        kernel = shape[len(spec.stack_shape(shape)) :]
        if spec.kind in ("vector", "other"):
            raise PlanError(
                f"{path}: LIFT masks matrices, this array is {kernel}; give it another optimizer "
                "or None with Groups, or say its layout with LIFT(specs=)"
            )
        _, n_in, n_out = spec.sizes(kernel)
        if self.score == "lowrank" and self.filter_rank > min(n_in, n_out):
            raise PlanError(
                f"{path}: LIFT.filter_rank={self.filter_rank} exceeds min(in, out) of a "
                f"{n_in}x{n_out} weight"
            )
        if math.prod(kernel) >= 2**31:
            raise PlanError(f"{path}: {kernel} has more entries than int32 indices reach")
        return Layout(path, spec, shape, min((n_in + n_out) * self.rank, n_in * n_out))

    def moves(self, params: Any) -> dict[str, int]:
        return {path: layout.count for path, layout in self.layouts(params).items()}

    def transform(self, learning_rate, mask):
        def init(params: Any) -> LIFTState:
            layouts = self.layouts(params)

            def start(path: str, _: Any) -> jax.Array:
                layout = layouts[path]
                first = jnp.arange(layout.k * layout.matrices, dtype=jnp.int32)
                return jnp.broadcast_to(first, (*layout.stack, *first.shape))

            index = paths.map_with_path(start, params)
            mu, nu = (jax.tree.map(lambda i: jnp.zeros(i.shape), index) for _ in range(2))
            return LIFTState(jnp.zeros((), jnp.int32), index, mu, nu)

        def update(grads: Any, state: LIFTState, params: Any = None) -> tuple[Any, LIFTState]:
            if params is None:
                raise ConfigError("LIFT masks the weights themselves: update needs params")
            layouts = self.layouts(params)
            due = (state.count == 0) | ((state.count + 1) % self.refresh == 0)
            state = jax.lax.cond(
                due, lambda s: self._renew(layouts, grads, s, params), lambda s: s, state
            )
            return self._adam(layouts, grads, state, params, learning_rate, mask)

        return optax.GradientTransformation(init, update)

    def _renew(self, layouts: Any, grads: Any, state: LIFTState, params: Any) -> LIFTState:
        """New masks, and the moments of the entries that stay."""

        def choose(path: str, w: jax.Array, g: jax.Array) -> jax.Array:
            layout = layouts[path]
            root = jax.random.key(self.seed, impl=PRNG)
            if self.score == "random":
                root = jax.random.fold_in(root, state.count)
            keys = path_keys(root, path.removesuffix("/value"), layout.stack)
            pick = lambda w, g, key: self._choose(layout, w, g, key)  # noqa: E731
            return layout.per_kernel(pick)(w, g, keys)

        index = paths.map_with_path(choose, params, grads)

        def carry(path: str, moment: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
            size = math.prod(layouts[path].kernel_shape)
            one = lambda m, old, new: jnp.zeros(size).at[old].set(m)[new]  # noqa: E731
            return layouts[path].per_kernel(one)(moment, old, new)

        mu = paths.map_with_path(carry, state.mu, state.index, index)
        nu = paths.map_with_path(carry, state.nu, state.index, index)
        return LIFTState(state.count, index, mu, nu)

    def _choose(self, layout: Layout, w: jax.Array, g: jax.Array, key: jax.Array) -> jax.Array:
        """Ascending flat indices ``[B k]`` of the chosen entries of one unstacked kernel."""
        spec, shape = layout.spec.unstacked(), w.shape
        batch, n_in, n_out = spec.sizes(shape)
        canonical = lambda x: spec.canonical(x).reshape(batch, n_in, n_out)  # noqa: E731
        matrices = canonical((g if self.score == "gradient" else w).astype(jnp.float32))
        if self.score == "random":
            score = jax.random.uniform(key, matrices.shape)
        elif self.score == "lowrank":
            keys = jax.random.split(key, batch)
            score = jnp.abs(jax.vmap(self._approximate)(matrices, keys))
        else:
            score = jnp.abs(matrices)
        score = score if self.select == "largest" else -score
        # top_k puts the lower of two equal entries first: ties do not depend on the device
        _, chosen = jax.lax.top_k(score.reshape(batch, -1), layout.k)
        stored = canonical(jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape))
        return jnp.sort(jnp.take_along_axis(stored.reshape(batch, -1), chosen, axis=1).reshape(-1))

    def _approximate(self, w: jax.Array, key: jax.Array) -> jax.Array:
        large = min(w.shape) > max(EXACT_UP_TO, 4 * self.filter_rank)
        if self.svd == "exact" or (self.svd == "auto" and not large):
            return linalg.svd(w).truncate(self.filter_rank).dense()
        options = {"oversample": self.filter_rank, "iterations": self.iterations}
        return linalg.randomized_svd(w, self.filter_rank, key, **options).dense()

    def _adam(
        self, layouts: Any, grads: Any, state: LIFTState, params: Any, rate: Any, mask: Any
    ) -> tuple[Any, LIFTState]:
        """Updates that are zero outside the masks, and the next state."""
        count = state.count + 1
        take = lambda path, x, i: (  # noqa: E731
            layouts[path].per_kernel(lambda x, i: x.reshape(-1)[i])(x, i).astype(jnp.float32)
        )
        g = paths.map_with_path(take, grads, state.index)
        mu = jax.tree.map(lambda m, g: (1 - self.b1) * g + self.b1 * m, state.mu, g)
        nu = jax.tree.map(lambda v, g: (1 - self.b2) * g**2 + self.b2 * v, state.nu, g)

        def one(path: str, w: jax.Array, i: jax.Array, m: jax.Array, v: jax.Array, decays: bool):
            change = (m / (1 - self.b1**count)) / (jnp.sqrt(v / (1 - self.b2**count)) + self.eps)
            if decays:
                change = change + self.weight_decay * take(path, w, i)
            change = (-rate * change).astype(w.dtype)
            # w + (-0.0) has the bits of every w; w + 0.0 would turn a -0.0
            empty = jnp.full(math.prod(layouts[path].kernel_shape), -0.0, w.dtype)
            put = lambda u, i: (  # noqa: E731
                empty.at[i].set(u, indices_are_sorted=True, unique_indices=True)
            )
            return layouts[path].per_kernel(put)(change, i).reshape(w.shape)

        decays = jax.tree.map(lambda _: False, params) if mask is None else mask
        updates = paths.map_with_path(one, params, state.index, mu, nu, decays)
        return updates, LIFTState(count, state.index, mu, nu)
