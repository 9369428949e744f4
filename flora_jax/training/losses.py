"""Losses ``loss(bound, batch, rng, train) -> (sum, weight, aux)``: sums, so that batches add up.

``bound`` is the parameter tree with its adapters (``flora_jax.bind``), ``aux`` a dict of sums that
the step divides by ``weight`` too. A mean is formed once, at the end, over everything summed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.core.errors import ConfigError, unknown
from flora_jax.data.virtual import with_prompt

Sums = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


class Loss(Protocol):
    """What :func:`flora_jax.training.make_step` and the evaluators call.

    A loss may also say which rows of activations count, for starts that depend on data:
    ``positions(batch, trained=True or False) -> 0/1``, e.g. ``[B, T]``.
    """

    def __call__(self, bound: Any, batch: Mapping[str, Any], rng: Any, train: bool) -> Sums: ...


def token_losses(
    logits: jax.Array, targets: jax.Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each position: ``-(1-e) log p[t] - e/V sum_v log p[v] + z (log Z)^2``.

    Args:
      logits: ``[..., V]``; the arithmetic is float32.
      targets: ``[...]`` int.
      label_smoothing: ``e`` of the formula.
      z_loss: ``z`` of the formula (PaLM, arXiv 2204.02311).

    Returns:
      ``(loss, nll)``, both ``[...]``; ``nll`` is the plain ``-log p[t]``.

    >>> loss, nll = token_losses(jnp.zeros((2, 4)), jnp.array([0, 3]))
    >>> bool(jnp.allclose(loss, jnp.log(4.0)))
    True
    """
    return _cross_entropy(logits, targets, label_smoothing, z_loss)


# Autodiff would scatter into a second array of logits' size for the picked entries and sweep the
# vocabulary several times; written out, the gradient is one fused pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cross_entropy(logits, targets, e, z):
    return _cross_entropy_forward(logits, targets, e, z)[0]


def _cross_entropy_forward(logits, targets, e, z):
    wide = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(wide, axis=-1)
    nll = log_z - jnp.take_along_axis(wide, targets[..., None], axis=-1)[..., 0]
    loss = nll
    if e:
        loss = (1.0 - e) * nll + e * (log_z - jnp.mean(wide, axis=-1))
    if z:
        loss = loss + z * jnp.square(log_z)
    return (loss, nll), (logits, targets, log_z)


def _cross_entropy_backward(e, z, saved, cotangents):
    logits, targets, log_z = saved
    g_loss, g_nll = cotangents
    on_p = g_loss * (1.0 + 2.0 * z * log_z) + g_nll
    on_target = g_loss * (1.0 - e) + g_nll
    p = jnp.exp(logits.astype(jnp.float32) - log_z[..., None])
    hit = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    g = p * on_p[..., None] - jnp.where(hit, on_target[..., None], 0.0)
    if e:
        g = g - (e / logits.shape[-1]) * g_loss[..., None]
    return g.astype(logits.dtype), np.zeros(targets.shape, jax.dtypes.float0)


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def is_top(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """1.0 where no logit exceeds the target's (an argmax over a vocabulary is far slower)."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (picked >= jnp.max(logits, axis=-1)).astype(jnp.float32)


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """``[B, T, ...] -> [ceil(T / size), B, size, ...]``, zero-padded; B stays whole."""
    pad = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def chunked_cross_entropy(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    chunk: int | None = 128,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Sums:
    """Masked vocabulary cross-entropy without ever holding logits ``[B, T, V]``.

    Positions go through the head ``chunk`` at a time in a rematerialised ``lax.scan`` body, so the
    peak is ``[B, chunk, V]`` in the forward and in the backward pass. Chunks run over T and
    not over B*T: per-example adapters keep their batch axis and a sharded batch stays in place.

    Args:
      head: ``[B, t, D] -> [B, t, V]`` logits.
      hidden: ``[B, T, D]``.
      targets, mask: ``[B, T]`` int and float; ``mask`` weighs each position.
      chunk: positions at a time; None computes all logits at once.
      label_smoothing, z_loss: see :func:`token_losses`.

    Returns:
      ``(sum, weight, aux)`` with sums ``nll`` and ``accuracy`` in ``aux``.

    Raises:
      ConfigError: ``chunk`` is not positive.
    """
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk={chunk}: the positions per chunk must be at least 1, or None")

    def sums(h: jax.Array, t: jax.Array, m: jax.Array) -> jax.Array:
        logits = head(h)
        loss, nll = token_losses(logits, t, label_smoothing=label_smoothing, z_loss=z_loss)
        right = is_top(jax.lax.stop_gradient(logits), t)
        # where, not a product: Inf at a masked position must not make the sum NaN
        return jnp.stack([jnp.sum(jnp.where(m > 0, m * v, 0.0)) for v in (loss, nll, right)])

    mask = mask.astype(jnp.float32)
    if chunk is None or chunk >= hidden.shape[1]:
        total = sums(hidden, targets, mask)
    else:
        body = jax.checkpoint(sums, prevent_cse=False)
        xs = tuple(_chunks(x, chunk) for x in (hidden, targets, mask))
        init = jnp.zeros((3,), jnp.float32)
        total, _ = jax.lax.scan(lambda carry, x: (carry + body(*x), None), init, xs)
    return total[0], jnp.sum(mask), {"nll": total[1], "accuracy": total[2]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLM:
    """Next-token cross-entropy of a decoder; batch keys ``tokens, targets, loss_mask`` ``[B, T]``.

    Optional batch keys: ``positions`` and ``segment_ids`` ``[B, T]`` of packed rows.

    Args:
      model: ``model.apply({"params": p}, tokens, positions=, segment_ids=, output="hidden")`` gives
        ``(hidden, cache)`` and ``model.apply(..., hidden, method="head")`` gives logits.
      chunk: positions per chunk of the head; None for the plain form.
      label_smoothing, z_loss: see :func:`token_losses`.
    """

    model: Any
    chunk: int | None = 128
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def positions(self, batch: Mapping[str, Any], *, trained: bool) -> jax.Array:
        """1 where a token counts ``[B, T]``: those trained on, or all but padding."""
        real = batch["segment_ids"] > 0 if "segment_ids" in batch else batch["tokens"] >= 0
        mask = batch.get("loss_mask") if trained else None
        return (real if mask is None else mask > 0).astype(jnp.float32)

    def __call__(self, bound, batch, rng, train) -> Sums:
        variables = {"params": bound}
        batch = with_prompt(bound, batch)
        hidden, _ = self.model.apply(
            variables,
            batch["tokens"],
            positions=batch.get("positions"),
            segment_ids=batch.get("segment_ids"),
            output="hidden",
        )
        targets = batch["targets"]
        mask = batch.get("loss_mask")
        return chunked_cross_entropy(
            lambda h: self.model.apply(variables, h, method="head"),
            hidden,
            targets,
            jnp.ones(targets.shape, jnp.float32) if mask is None else mask,
            chunk=self.chunk,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """Cross-entropy of whole answers: each row of a language-model batch counts once.

    ``loss = -sum_t log p(target_t)`` over the row's masked positions. ``accuracy`` is the share of
    rows whose every target is the likeliest token: what greedy decoding writes word for word.

    Args:
      model: a decoder, as for :class:`CausalLM`.
    """

    model: Any

    def __call__(self, bound, batch, rng, train) -> Sums:
        batch = with_prompt(bound, batch)
        logits, _ = self.model.apply(
            {"params": bound},
            batch["tokens"],
            positions=batch.get("positions"),
            segment_ids=batch.get("segment_ids"),
        )
        asked = batch["loss_mask"] > 0
        _, nll = token_losses(logits, batch["targets"])
        rows = jnp.any(asked, axis=1)
        right = rows & jnp.all((is_top(logits, batch["targets"]) > 0) | ~asked, axis=1)
        total = jnp.sum(jnp.where(asked, nll, 0.0))
        count = lambda flags: jnp.sum(flags.astype(jnp.float32))
        return total, count(rows), {"nll": total, "accuracy": count(right)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """How far linear attention is from softmax: ``sum xent_weight xent + mse_weight mse``.

    Means over layers, heads and tokens; padding (segment 0, or mask 0) does not count.

    Args:
      model: its attention is ``flora_jax.attention.Distil``.
      inputs: batch keys that an encoder takes, in order; none for a decoder.
      xent: weight of the cross-entropy of the attention weights; Hedgehog's loss is this alone.
      mse: weight of the heads' outputs' squared error; LoLCATs recommends 1000 with xent 0.
    """

    model: Any
    inputs: tuple[str, ...] = ()
    xent: float = 1.0
    mse: float = 0.0

    def __call__(self, bound, batch, rng, train) -> Sums:
        report = (self._of_encoder if self.inputs else self._of_decoder)(bound, batch)
        if report is None:
            raise ConfigError("Distillation needs a model with attention=Distil(student=...)")
        means = {name: each.mean(axis=0) for name, each in report.items()}
        real = self._real(batch, means["xent"])
        sums = {name: jnp.sum(real * each) for name, each in means.items()}
        loss = self.xent * sums["xent"] + self.mse * sums["mse"]
        return loss, jnp.sum(real), sums

    def _of_decoder(self, bound: Any, batch: Mapping[str, Any]) -> Any:
        return self.model.apply(
            {"params": bound},
            batch["tokens"],
            positions=batch.get("positions"),
            segment_ids=batch.get("segment_ids"),
            output="hidden",
        )[1]

    def _of_encoder(self, bound: Any, batch: Mapping[str, Any]) -> Any:
        inputs = inputs_of(batch, self.inputs)
        return self.model.apply({"params": bound}, *inputs, output="reports")

    def _real(self, batch: Mapping[str, Any], like: jax.Array) -> jax.Array:
        """1 for a token ``[B, T]``, 0 for padding."""
        if not self.inputs:
            segments = batch.get("segment_ids")
            return jnp.ones_like(like) if segments is None else (segments != 0).astype(like.dtype)
        rows = (weights_of(batch, like) > 0).astype(like.dtype)[:, None]
        mask = batch["mask"].astype(like.dtype) if "mask" in self.inputs else jnp.ones_like(like)
        return rows * mask


def inputs_of(batch: Mapping[str, Any], keys: tuple[str, ...]) -> list[Any]:
    for key in keys:
        if key not in batch:
            raise ConfigError(unknown("batch key", key, batch))
    return [batch[key] for key in keys]


def weights_of(batch: Mapping[str, Any], like: jax.Array) -> jax.Array:
    """Per-example weights ``[B]``: the batch's ``weight`` (0 for padding rows) or ones."""
    weight = batch.get("weight")
    return jnp.ones(like.shape[:1], jnp.float32) if weight is None else weight.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """Softmax cross-entropy of ``model(*inputs) [B, C]`` against integer labels ``[B]``.

    Args:
      model: a Linen module, or anything with ``apply({"params": p}, *inputs)``.
      inputs: batch keys passed to the model in order.
      label: batch key of the labels; an optional key ``weight`` weighs the examples.
      label_smoothing: mass spread evenly over the classes.
    """

    model: Any
    inputs: tuple[str, ...] = ("image",)
    label: str = "label"
    label_smoothing: float = 0.0

    def positions(self, batch: Mapping[str, Any], *, trained: bool) -> jax.Array:
        """1 where a row ``[B]``, or a token ``[B, T]`` of a masked text, is not padding."""
        weight = (weights_of(batch, batch[self.label]) > 0).astype(jnp.float32)
        if "mask" not in self.inputs:
            return weight
        return batch["mask"].astype(jnp.float32) * weight[:, None]

    def __call__(self, bound, batch, rng, train) -> Sums:
        batch = with_prompt(bound, batch)
        *inputs, labels = inputs_of(batch, (*self.inputs, self.label))
        logits = self.model.apply({"params": bound}, *inputs)
        weight = weights_of(batch, labels)
        loss, nll = token_losses(logits, labels, label_smoothing=self.label_smoothing)
        right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        aux = {"nll": jnp.sum(weight * nll), "accuracy": jnp.sum(weight * right)}
        return jnp.sum(weight * loss), jnp.sum(weight), aux


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression:
    """Mean over outputs of ``(y - t)^2`` (or Huber's loss), summed over the batch.

    Args:
      model: a Linen module, or anything with ``apply({"params": p}, *inputs)``.
      inputs: batch keys passed to the model in order.
      target: batch key of the targets, of the output's shape up to trailing axes of size one.
      huber: the width of Huber's quadratic part; None is the squared error.
    """

    model: Any
    inputs: tuple[str, ...] = ("x",)
    target: str = "y"
    huber: float | None = None

    def positions(self, batch: Mapping[str, Any], *, trained: bool) -> jax.Array:
        """1 where a row ``[B]`` is not padding."""
        return (weights_of(batch, batch[self.target]) > 0).astype(jnp.float32)

    def __call__(self, bound, batch, rng, train) -> Sums:
        *inputs, target = inputs_of(batch, (*self.inputs, self.target))
        y = self.model.apply({"params": bound}, *inputs).astype(jnp.float32)
        if y.size != target.size:
            raise ConfigError(
                f"target {self.target!r} {target.shape} does not fit output {y.shape}"
            )
        error = y - target.reshape(y.shape).astype(jnp.float32)
        each = jnp.square(error)
        if self.huber is not None:
            size = jnp.abs(error)
            each = jnp.where(size <= self.huber, 0.5 * each, self.huber * (size - 0.5 * self.huber))
        weight = weights_of(batch, y)
        rows = each.reshape(each.shape[0], -1)
        absolute = jnp.mean(jnp.abs(error).reshape(rows.shape), axis=1)
        aux = {"mae": jnp.sum(weight * absolute)}
        return jnp.sum(weight * jnp.mean(rows, axis=1)), jnp.sum(weight), aux
