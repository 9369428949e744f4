"""The protocol of attention variants: hyper-parameters, parameters, a state and one function.

A variant is a frozen dataclass, registered with ``family="attention"``. It implements
:meth:`Variant.whole` and, where it generates text, :meth:`Variant.init_state` and
:meth:`Variant.extend`; callers use :meth:`Variant.attend`, which checks what it is given.

Arrays: ``q [B, T, N, H]``, ``k, v [B, S, K, H]``; query head n reads key head ``n // (N // K)``.
Sums, normalisers and recurrent states are float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax

from flora_jax.attention.masks import CAUSAL, Causal, Full, Mask, Prefix, Sliding
from flora_jax.core.errors import ConfigError, unknown
from flora_jax.core.registry import lookup, name_of

MODES = ("train", "prefill", "decode")
NO_SEGMENT = -2
"""Segment of a place before a row's first token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a variant must know of its layer.

    Args:
      heads, kv_heads: N and K.
      dim: H, of a head.
      width: C, of the layer's input.
    """

    heads: int
    kv_heads: int
    dim: int
    width: int

    @property
    def group(self) -> int:
        """Query heads that read one key head."""
        return self.heads // self.kv_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the layer has besides its queries, keys and values, for variants that read it.

    Args:
      x: the layer's input ``[B, T, C]``.
      q, k: queries and keys before the rotation.
      rotate: the rotary embedding at these tokens' positions, ``[B, T, n, H] -> [B, T, n, H]``;
        None in a model without.
      grid: ``(h, w)`` when the last ``h * w`` tokens are an image's patches, row by row.
    """

    x: jax.Array
    q: jax.Array
    k: jax.Array
    rotate: Callable[[jax.Array], jax.Array] | None = None
    grid: tuple[int, int] | None = None


class KeyValuePrefix(NamedTuple):
    """Keys and values ``[1 or B, P, K, H]``; ``on [B, P]`` which a row has, None for all."""

    k: jax.Array
    v: jax.Array
    on: jax.Array | None


class Dropout(NamedTuple):
    """Of the attention probabilities."""

    rate: float
    key: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The keyword arguments of one :meth:`Variant.attend`, which explains them."""

    mask: Mask
    mode: str
    positions: jax.Array | None
    segment_ids: jax.Array | None
    valid: jax.Array | None
    scale: float | None
    prefix: KeyValuePrefix | None
    dropout: Dropout | None
    inputs: Inputs | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Base class of attention variants.

    Class attributes:
      masks: classes of masks that it is defined for.
      generates: whether it has a state, so that a model may write text with it.
      takes: of the optional arguments ``segment_ids``, ``valid``, ``prefix``, ``dropout``,
        ``scale``, those that it is defined for; the others must be None (``valid``: in training).
      needs: fields of :class:`Inputs` that it reads.
    """

    masks: ClassVar[tuple[type[Mask], ...]] = (Causal, Full)
    generates: ClassVar[bool] = True
    takes: ClassVar[tuple[str, ...]] = ("segment_ids", "valid", "prefix", "scale")
    needs: ClassVar[tuple[str, ...]] = ()

    def check(self, sizes: Sizes) -> None:
        """Raise ConfigError when the variant does not fit a layer."""

    def init(self, key: jax.Array, sizes: Sizes, dtype: Any) -> dict[str, Any]:
        """Its own parameters, a tree of arrays by name; none by default.

        They lie beside the layer's projections, and may be adapted or quantised like any weight:
        read them through ``flora_jax.core.ops``.
        """
        return {}

    def init_state(
        self, sizes: Sizes, batch: int, max_len: int, dtype: Any, mask: Mask = CAUSAL
    ) -> dict[str, jax.Array]:
        """The state of a sequence of no tokens, of static shape.

        Args:
          max_len: the longest sequence that will be asked for.
          dtype: of stored keys and values; sums are float32.
          mask: of the layer; a sliding window needs no more keys than it holds.
        """
        raise NotImplementedError

    def whole(
        self, params: Any, q: jax.Array, k: jax.Array, v: jax.Array, call: Call
    ) -> jax.Array:
        """Attention over whole sequences: ``[B, T, N, H]`` in q's dtype."""
        raise NotImplementedError

    def report(self, params: Any, q: jax.Array, k: jax.Array, v: jax.Array, call: Call) -> Any:
        """What a training loss may want to know of the layer, besides its output; None for most."""
        return None

    def extend(
        self, params: Any, q: jax.Array, k: jax.Array, v: jax.Array, state: Any, call: Call
    ) -> tuple[jax.Array, Any]:
        """Attention of the next tokens of sequences that a state stands for, and the new state."""
        raise NotImplementedError

    def attend(
        self,
        params: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        mask: Mask = CAUSAL,
        mode: str = "train",
        state: Any = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        valid: jax.Array | None = None,
        scale: float | None = None,
        prefix: KeyValuePrefix | None = None,
        dropout: Dropout | None = None,
        inputs: Inputs | None = None,
    ) -> tuple[jax.Array, Any]:
        """``(out [B, T, N, H], new state)``; in training the :meth:`report` in the state's place.

        Args:
          params: of :meth:`init`.
          q, k, v: of these tokens only, ``[B, T, N, H]`` and ``[B, T, K, H]``, rotated already.
          mask: Causal, Sliding, Prefix or Full.
          mode: ``train`` (whole sequences, no state), ``prefill`` (the next tokens of each
            sequence, as many as one likes, any number of times), ``decode`` (one token each).
          state: of :meth:`init_state` or of the last call; with prefill and decode.
          positions: ``[B, T]`` places of these tokens in their sequences, each row counting on
            from where its state ends; with prefill and decode.
          segment_ids: ``[B, T]`` of sequences packed into rows, in training: contiguous runs; a
            token sees its own segment and segment -1.
          valid: ``[B, T]``, true for a token and false for padding, which nobody sees and which
            never enters a state; with prefill and decode it must lie at the end of a row.
          scale: of the scores; the variant's own by default.
          prefix: keys and values before all others, which every query sees; not in the state.
          dropout: of the attention probabilities.
          inputs: what the layer has besides, for variants that read it.

        Raises:
          ConfigError: something that the variant is not defined for.
        """
        call = Call(
            mask=mask,
            mode=mode,
            positions=positions,
            segment_ids=segment_ids,
            valid=valid,
            scale=scale,
            prefix=prefix,
            dropout=dropout,
            inputs=inputs,
        )
        self._check_call(call, state)
        if mode == "train":
            return self.whole(params, q, k, v, call), self.report(params, q, k, v, call)
        return self.extend(params, q, k, v, state, call)

    def _check_call(self, call: Call, state: Any) -> None:
        name = name_of(self)
        if call.mode not in MODES:
            raise ConfigError(unknown("mode", call.mode, MODES))
        if not isinstance(call.mask, self.masks):
            known = ", ".join(m.__name__ for m in self.masks)
            raise ConfigError(f"{name} takes {known} masks, not {call.mask}")
        for option in ("segment_ids", "valid", "prefix", "dropout", "scale"):
            given = getattr(call, option) is not None
            if given and option not in self.takes and (option, call.mode) not in _STATE_NEEDS:
                raise ConfigError(f"{name} is not defined with {option}")
        for field in self.needs:
            if getattr(call.inputs, field, None) is None:
                raise ConfigError(f"{name} reads the layer's {field}: give inputs")
        if call.mode == "train":
            return
        if not self.generates:
            raise ConfigError(f"{name} has no state: it cannot generate")
        if state is None or call.positions is None:
            raise ConfigError(f"mode={call.mode!r} needs a state and positions")
        if call.segment_ids is not None:
            raise ConfigError("a state holds one sequence per row: segment_ids must be None")

    def to_json(self) -> dict[str, Any]:
        """``{"method": name, field: value ...}`` with every field."""
        plain = lambda value: value.to_json() if isinstance(value, Variant) else value
        fields = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"method": name_of(self), **fields}


_STATE_NEEDS = (("valid", "prefill"), ("valid", "decode"))
ANY_MASK = (Causal, Sliding, Prefix, Full)


def from_json(data: Mapping[str, Any]) -> Variant:
    """The inverse of :meth:`Variant.to_json`.

    Raises:
      ConfigError: unknown variant or field.
    """
    fields = dict(data)
    cls = lookup("attention", fields.pop("method", "?"))
    known = {f.name for f in dataclasses.fields(cls)}
    for name in fields:
        if name not in known:
            raise ConfigError(f"{cls.__name__}: " + unknown("field", name, known))
    return cls(**{name: _field(value) for name, value in fields.items()})


def _field(value: Any) -> Any:
    if isinstance(value, Mapping) and "method" in value:
        return from_json(value)
    return tuple(value) if isinstance(value, list) else value
