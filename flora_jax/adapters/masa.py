"""MASA: the weights of all layers as mixtures of a few shared matrices (atoms)."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from flora_jax.core.adapter import Adapter, Params
from flora_jax.core.errors import PlanError, unknown
from flora_jax.core.linalg import svd
from flora_jax.core.operators import Matrix
from flora_jax.core.plan import Entry, Plan, make_entry
from flora_jax.core.registry import register

COEFFICIENTS = ("direct", "mlp")
STARTS = ("scaled", "depth", "pca")
NOISE = 0.02
_EXACT = lax.Precision.HIGHEST


@register(
    "MASA",
    family="adapter",
    paper="Share Your Attention: Transformer Weight Sharing via Matrix-based Dictionary Learning",
    arxiv="2508.04581",
    parameters="S in out + S L",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MASA(Adapter):
    """``W_l = sum_s c_ls D_s (+ U_l V_l)``: L layers of a scanned stack share S atoms.

    Trained: ``atoms [S, *kernel]`` and ``coefficients [L, S]`` float32, or, with
    ``coefficients="mlp"``, a layer embedding ``[L, e]`` and the three layers ``w1, b1, w2, b2, w3,
    b3`` that make the coefficients of it (:func:`fix_coefficients` drops them after training). The
    mixture replaces the base's kernel: it is formed once a step outside the scan, summed in
    float32 and cast to the base's dtype, so a step holds one copy of the stack. Not the identity at
    the start unless ``start="pca"`` and every group has as many atoms as layers.

    Args:
      atoms: S; with ``cuts`` of every group, or a tuple with one number a group.
      coefficients: ``direct`` or ``mlp``.
      start: ``scaled``: normal atoms of the base's root mean square over ``sqrt(S)`` and normal
        coefficients, so that the mixtures' variance is the base's; ``depth``: layer l of L starts
        at atom ``floor(l S / L)`` (plus a little of the others); ``pca``: the best orthonormal
        atoms for the base as it is (Matrix PCA), no training needed.
      cuts: first layers of the second, third ... group of consecutive layers; each group has atoms
        of its own (:func:`group_layers` finds them).
      rank: of a low-rank correction ``U_l V_l`` of each layer; with ``pca`` it is the part of the
        residual that matters most for the layer's inputs and needs the statistic ``gram`` (give it
        more for queries and outputs than for keys and values), with the others it starts at 0.
      embedding, hidden: widths of the layer embedding and of the MLP (GELU).

    Raises:
      PlanError: an unrolled model (no stack), cuts outside it, more atoms than layers.

    Source: arXiv 2508.04581 (the text; its code was not available). Widths and activation of the
    MLP, and both random starts, are inferred. Weight decay belongs on the atoms alone.
    """

    atoms: int | tuple[int, ...] = 4
    coefficients: str = "direct"
    start: str = "scaled"
    cuts: tuple[int, ...] = ()
    rank: int = 0
    embedding: int = 64
    hidden: int = 64

    whole_stack = True
    needs_base = True
    dim_names = {"atoms": (None, "kernel"), "u": (None, "in", None), "v": (None, None, "out")}

    @property
    def statistics(self) -> tuple[str, ...]:
        """What ``init`` reads of the layers' inputs."""
        return ("gram",) if self.rank and self.start == "pca" else ()

    def check(self, spec, shape):
        super().check(spec, shape)
        if self.coefficients not in COEFFICIENTS:
            raise PlanError(unknown("coefficients", self.coefficients, COEFFICIENTS))
        if self.start not in STARTS:
            raise PlanError(unknown("start", self.start, STARTS))
        if spec.stack_ndim != 1:
            raise PlanError(
                "MASA shares atoms over the layers of a scanned stack and this weight has "
                f"{spec.stack_ndim or 'no'} stack axes; scan the model's layers (scan_layers=True)"
            )
        if self.rank and (spec.batched or not 0 <= self.rank <= min(spec.canonical_shape(shape))):
            raise PlanError(f"rank={self.rank} does not fit a {spec.canonical_shape(shape)} weight")
        if self.statistics and spec.kind == "embedding":
            raise PlanError("a correction for one-hot inputs is not supported; take rank=0")

    def groups(self, layers: int) -> tuple[tuple[int, int, int], ...]:
        """``(first layer, end, atoms)`` of each group.

        Raises:
          PlanError: cuts that do not rise inside the stack, or more atoms than layers.
        """
        edges = (0, *self.cuts, layers)
        if any(a >= b for a, b in itertools.pairwise(edges)):
            raise PlanError(f"cuts={self.cuts} must rise inside 1..{layers - 1} of {layers} layers")
        count = len(edges) - 1
        each = self.atoms if isinstance(self.atoms, tuple) else (self.atoms,) * count
        if len(each) != count:
            raise PlanError(f"atoms={self.atoms} for {count} groups of layers")
        for (a, b), n in zip(itertools.pairwise(edges), each):
            if not 1 <= n <= b - a:
                raise PlanError(f"atoms={n} is outside 1..{b - a}, the layers {a}..{b - 1}")
        return tuple((a, b, n) for (a, b), n in zip(itertools.pairwise(edges), each))

    def init(self, key, spec, base, stats=None):
        layers = base.shape[0]
        stack = jnp.asarray(base, jnp.float32)
        keys = jax.random.split(key, 3)
        parts = []
        for a, b, n in self.groups(layers):
            parts.append(self._start(jax.random.fold_in(keys[0], a), stack[a:b], n))
        widest = max(c.shape[1] for _, c in parts)
        wide = [jnp.pad(c, ((0, 0), (0, widest - c.shape[1]))) for _, c in parts]
        target = jnp.concatenate(wide)
        train = {"atoms": jnp.concatenate([d for d, _ in parts])}
        if self.coefficients == "direct":
            train["coefficients"] = target
        else:
            train |= self._fitted_mlp(keys[1], target)
        if self.rank:
            residual = stack - self._mixed(train["atoms"], target)
            train |= self._correction(keys[2], residual, spec.unstacked(), stats)
        return train, {}

    def _start(self, key, stack, n):
        """Atoms ``[n, *kernel]`` and coefficients ``[layers, n]`` of one group."""
        if self.start == "pca":
            return matrix_pca(stack, n)
        layers = stack.shape[0]
        ka, kc = jax.random.split(key)
        atoms = jnp.sqrt(jnp.mean(stack**2)) * jax.random.normal(ka, (n, *stack.shape[1:]))
        noise = jax.random.normal(kc, (layers, n))
        if self.start == "scaled":
            return atoms / jnp.sqrt(n), noise
        return atoms, jax.nn.one_hot(jnp.arange(layers) * n // layers, n) + NOISE * noise

    def _fitted_mlp(self, key, target):
        """Embeddings and MLP that give the coefficients ``target [L, S]`` to begin with."""
        layers, width = target.shape
        if self.hidden < layers:
            raise PlanError(f"hidden={self.hidden} must be at least the {layers} layers")
        k = jax.random.split(key, 3)
        mlp = {
            "embedding": jax.random.normal(k[0], (layers, self.embedding)),
            "w1": jax.random.normal(k[1], (self.embedding, self.hidden)) / self.embedding**0.5,
            "b1": jnp.zeros(self.hidden),
            "w2": jax.random.normal(k[2], (self.hidden, self.hidden)) * (2 / self.hidden) ** 0.5,
            "b2": jnp.zeros(self.hidden),
        }
        last = jnp.linalg.lstsq(_hidden(mlp), target)[0]
        return {**mlp, "w3": last, "b3": jnp.zeros(width)}

    def _correction(self, key, residual, spec, stats):
        canonical = jax.vmap(spec.canonical)(residual)
        if stats is not None:
            fit = jax.vmap(lambda d, g: whitened_factors(d, g, self.rank))
            return dict(zip(("u", "v"), fit(canonical, stats["gram"])))
        layers, n_in, n_out = canonical.shape
        u = jax.random.normal(key, (layers, n_in, self.rank)) / n_in**0.5
        return {"u": u, "v": jnp.zeros((layers, self.rank, n_out))}

    def _mixed(self, atoms, coefficients):
        """``[L, *kernel]`` of ``atoms`` and ``coefficients``, group by group."""
        out, first = [], 0
        for a, b, n in self.groups(coefficients.shape[0]):
            out.append(
                jnp.tensordot(
                    coefficients[a:b, :n],
                    atoms[first : first + n],
                    1,
                    precision=_EXACT,
                    preferred_element_type=jnp.float32,
                )
            )
            first += n
        return jnp.concatenate(out)

    def spread(self, params, spec, base):
        value = self._mixed(params["atoms"], mixing(params))
        if self.rank:
            restore = lambda m: spec.unstacked().restore(m, base.shape[1:])
            value = value + jax.vmap(restore)(jnp.matmul(params["u"], params["v"]))
        return {"value": value.astype(base.dtype)}

    def operator(self, params, spec, ctx):
        # Only reached beside other adapters on the same weight: the change is dense by nature.
        return ctx.base + Matrix(spec.canonical(params["value"]) - ctx.base.dense())

    def value(self, params):
        return params["value"]


def _hidden(params: Params) -> jax.Array:
    """``[L, hidden]``: the MLP before its last layer."""
    h = params["embedding"]
    for w, b in (("w1", "b1"), ("w2", "b2")):
        h = jax.nn.gelu(jnp.dot(h, params[w], precision=_EXACT) + params[b], approximate=False)
    return h


def mixing(params: Params) -> jax.Array:
    """The coefficients ``[L, S]`` of either form."""
    if "coefficients" in params:
        return params["coefficients"]
    mixed = jnp.dot(_hidden(params), params["w3"], precision=_EXACT) + params["b3"]
    # Compiled on its own, so that fix_coefficients gives the same bits.
    return lax.optimization_barrier(mixed)


def fix_coefficients(plan: Plan, adapters: dict[str, Params]) -> tuple[Plan, dict[str, Params]]:
    """Plan and adapters with the coefficients themselves in place of the MLPs that made them.

    The adapted model is the same, bit for bit; what is left is ``S in out + S L`` a weight.
    """
    entries: list[Entry] = []
    out = dict(adapters)
    names = ("embedding", "w1", "b1", "w2", "b2", "w3", "b3")
    for entry in plan:
        adapter = entry.adapter
        if isinstance(adapter, MASA) and adapter.coefficients == "mlp":
            params = out[entry.path]
            kept = {n: a for n, a in params.items() if n not in names}
            out[entry.path] = {**kept, "coefficients": jax.jit(mixing)(params)}
            adapter = dataclasses.replace(adapter, coefficients="direct")
            entry = make_entry(entry.path, adapter, entry.spec, entry.shape, entry.dtype)
        entries.append(entry)
    return Plan(tuple(entries)), out


def matrix_pca(stack: jax.Array, atoms: int) -> tuple[jax.Array, jax.Array]:
    """The best S orthonormal atoms of matrices ``[L, ...]``, and each matrix's coefficients.

    With ``G = W W^T = V diag(e) V^T`` (``[L, L]``, W the matrices as rows, no mean subtracted):
    ``D = V_S^T W / sqrt(e_S)``, ``c = V_S sqrt(e_S)``. The squared error of the mixtures is the sum
    of the eigenvalues left out. The largest entry of each column of V is positive.

    Args:
      stack: ``[L, ...]``.
      atoms: S, at most L.

    Returns:
      ``atoms [S, ...]`` and ``coefficients [L, S]``, float32.

    >>> atoms, c = matrix_pca(jnp.array([[1.0, 0.0], [0.0, 2.0]]), 1)
    >>> atoms.tolist(), c.tolist()
    ([[0.0, 1.0]], [[0.0], [2.0]])
    """
    rows = stack.reshape(stack.shape[0], -1).astype(jnp.float32)
    gram = jnp.matmul(rows, rows.T, precision=_EXACT)
    values, vectors = jnp.linalg.eigh(gram)
    values, vectors = values[::-1][:atoms], vectors[:, ::-1][:, :atoms]
    top = jnp.take_along_axis(vectors, jnp.argmax(jnp.abs(vectors), axis=0)[None], axis=0)
    vectors = vectors * jnp.where(top < 0, -1.0, 1.0)
    # Of linearly dependent layers the last atoms are noise; the product stays exact.
    tiny = jnp.finfo(jnp.float32).eps * jnp.maximum(values[0], jnp.finfo(jnp.float32).tiny)
    root = jnp.sqrt(jnp.maximum(values, tiny))
    found = jnp.matmul(vectors.T, rows, precision=_EXACT) / root[:, None]
    return found.reshape(atoms, *stack.shape[1:]), vectors * root


def whitened_factors(
    residual: jax.Array, gram: jax.Array, rank: int, damping: float = 1e-6
) -> tuple[jax.Array, jax.Array]:
    """``u [in, r], v [r, out]``: the rank-r part of ``residual`` that matters most for the inputs.

    ``||X (R - u v)||_F`` is least over all of that rank: with ``X^T X = L L^T`` (Cholesky) it is
    ``||L^T (R - u v)||_F``, so ``L^T R`` is truncated by its SVD and un-whitened.

    Args:
      residual: ``R [in, out]``.
      gram: ``X^T X [in, in]``.
      rank: r.
      damping: of the mean diagonal of the gram matrix, added to its diagonal.
    """
    n = gram.shape[0]
    lift = damping * jnp.trace(gram) / n + jnp.finfo(jnp.float32).tiny
    root = jnp.linalg.cholesky(gram + lift * jnp.eye(n))
    found = svd(jnp.matmul(root.T, residual, precision=_EXACT)).truncate(rank)
    left = jax.scipy.linalg.solve_triangular(root.T, found.u * found.s, lower=False)
    return left, found.vt


def layer_divergences(logits: jax.Array) -> jax.Array:
    """``KL(p_l || p_{l+1})`` of consecutive layers ``[L - 1]`` from their logits ``[L, V]``.

    The logits are the final head's on each block's hidden state, averaged over the calibration
    tokens.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.exp(log_p[:-1]) * (log_p[:-1] - log_p[1:]), axis=-1)


def group_layers(divergences: jax.Array, groups: int) -> tuple[int, ...]:
    """Cuts of the stack into ``groups`` runs of layers, where consecutive layers differ most.

    Args:
      divergences: ``[L - 1]`` of :func:`layer_divergences`, concrete.
      groups: how many.

    Returns:
      The first layer of the second, third ... group, for ``MASA(cuts=)``.

    Raises:
      PlanError: more groups than layers.

    >>> group_layers(jnp.array([0.1, 3.0, 0.2, 1.0]), 3)
    (2, 4)
    """
    layers = len(divergences) + 1
    if not 1 <= groups <= layers:
        raise PlanError(f"groups={groups} is outside 1..{layers}, the number of layers")
    order = sorted(range(layers - 1), key=lambda i: (-float(divergences[i]), i))
    return tuple(sorted(i + 1 for i in order[: groups - 1]))
