"""Text generation: a static-shape cache, one jitted prefill and one jitted step or loop.

Prompts of different length lie left-aligned in one batch: row b's token t has position t, and what
a shorter row computes past its end is never seen and enters no state. Prompt and cache lengths are
rounded up, so that prompts of similar length share one compiled program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.core import ops
from flora_jax.core.errors import ConfigError

ROUND = 32
ENDED = -1
"""What a finished row yields."""

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    Args:
      temperature: 0 takes the most likely token.
      top_k: only the k most likely; 0 for all.
      top_p: only the fewest tokens whose probabilities reach p (Holtzman et al., arXiv 1904.09751),
        after temperature and ``top_k``; 1 for all.

    >>> Sampling(temperature=0.7, top_p=0.9).filters
    True
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature} must be 0 or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be in (0, 1]")

    @property
    def filters(self) -> bool:
        """Whether the distribution is cut."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def kind(self) -> str:
        """What is compiled; the numbers themselves are arguments."""
        return "greedy" if self.temperature == 0 else "cut" if self.filters else "full"

    def numbers(self) -> dict[str, jax.Array]:
        """The traced arguments of :func:`choose`."""
        return {
            "temperature": jnp.float32(self.temperature or 1.0),
            "top_k": jnp.int32(self.top_k or 2**30),
            "top_p": jnp.float32(self.top_p),
        }


def choose(
    logits: jax.Array, key: jax.Array, kind: str, numbers: dict[str, jax.Array]
) -> jax.Array:
    """Next tokens ``[B]`` from logits ``[B, V]``."""
    if kind == "greedy":
        return logits.argmax(axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / numbers["temperature"]
    if kind == "cut":
        ranked = jnp.sort(logits, axis=-1, descending=True)
        rank = jnp.arange(ranked.shape[-1])
        ranked = jnp.where(rank < numbers["top_k"], ranked, -jnp.inf)
        p = jax.nn.softmax(ranked, axis=-1)
        # A token stays while those before it have not reached top_p: the first one always does.
        stays = (jnp.cumsum(p, axis=-1) - p < numbers["top_p"]) & (p > 0)
        least = jnp.where(stays, ranked, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _head(model: nn.Module, params: Any, hidden: jax.Array) -> jax.Array:
    return model.apply({"params": params}, hidden, method="head")


@partial(jax.jit, static_argnames=("model", "kind", "max_len"))
def _prefill(model, params, tokens, lengths, key, kind, numbers, max_len):
    """Run the prompts ``[B, T]`` through the model and draw the first new token of each."""
    cache = model.init_cache(tokens.shape[0], max_len)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache = model.apply(
        {"params": params},
        tokens,
        positions=positions,
        cache=cache,
        output="hidden",
        valid=positions < lengths[:, None],
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    token = choose(_head(model, params, last), jax.random.fold_in(key, 0), kind, numbers)
    return {"cache": cache, "token": token, "position": lengths, "count": jnp.int32(1)}


def advance(
    model: nn.Module,
    params: Any,
    state: dict[str, Any],
    key: jax.Array,
    kind: str,
    numbers: dict[str, jax.Array],
) -> dict[str, Any]:
    """Feed every row its last token and draw the next: the body of a decoding loop.

    Args:
      state: ``cache`` (``model.init_cache(batch, max_len)``), the last ``token [B]`` of each row,
        its ``position [B]``, and ``count``, the draws so far; int32.
      key: of the sampling; a draw's own key is folded from it and ``count``.
      kind, numbers: of a :class:`Sampling`.

    Returns:
      the next state, of the same shapes.
    """
    hidden, cache = model.apply(
        {"params": params},
        state["token"][:, None],
        positions=state["position"][:, None],
        cache=state["cache"],
        output="hidden",
    )
    key = jax.random.fold_in(key, state["count"])
    token = choose(_head(model, params, hidden[:, 0]), key, kind, numbers)
    return {
        "cache": cache,
        "token": token,
        "position": state["position"] + 1,
        "count": state["count"] + 1,
    }


_step = jax.jit(advance, static_argnames=("model", "kind"), donate_argnames=("state",))


@partial(jax.jit, static_argnames=("model", "kind", "room"))
def _loop(model, params, state, key, kind, numbers, eos, limit, room):
    """Steps until every row has ended or has ``limit`` tokens; ``[B, room]`` new tokens."""
    out = jnp.full((state["token"].shape[0], room), ENDED, jnp.int32).at[:, 0].set(state["token"])
    done = jnp.isin(state["token"], eos)

    def going(carry):
        state, _, done = carry
        return (state["count"] < limit) & ~done.all()

    def body(carry):
        state, out, done = carry
        at = state["count"]
        state = advance(model, params, state, key, kind, numbers)
        out = out.at[:, at].set(jnp.where(done, ENDED, state["token"]))
        return state, out, done | jnp.isin(state["token"], eos)

    return jax.lax.while_loop(going, body, (state, out, done))[1]


def _round(n: int) -> int:
    return -(-n // ROUND) * ROUND


def _eos_ids(model: nn.Module, eos_id: int | Sequence[int] | None) -> np.ndarray:
    """The ids that end a row; those of the model's config when none are given."""
    ids = model.config.eos_token_id if eos_id is None else eos_id
    ids = () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
    return np.asarray(ids, np.int32)


def _check_ids(prompts: Sequence[Ids], vocabulary: int) -> None:
    low, high = min(map(min, prompts)), max(map(max, prompts))
    if low < 0 or high >= vocabulary:
        token = low if low < 0 else high
        raise ConfigError(f"a prompt has token {token}, the vocabulary {vocabulary}")


def _virtual_ids(params: Any) -> tuple[int, ...]:
    """The ids of a trained prompt (``PromptTuning``), which stand before every prompt's own."""
    ids, on = ops.virtual_rows(params) or ((), None)
    if on is not None and not np.all(on):
        raise ConfigError("rows with and without a trained prompt cannot generate in one batch")
    return ids


def _start(model, params, prompts, max_new_tokens, sampling, key):
    """Checked and padded prompts, run through the prefill."""
    if not len(prompts) or min(map(len, prompts)) == 0:
        raise ConfigError("generate needs at least one prompt, each with at least one token")
    _check_ids(prompts, model.config.vocab_size)
    prompts = [[*_virtual_ids(params), *prompt] for prompt in prompts]
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1")
    longest, limit = int(lengths.max()) + max_new_tokens, model.config.max_position_embeddings
    prefix = int(np.max(ops.prefix_start(params)))
    if longest + prefix > limit:
        behind = f" behind a prefix of {prefix}" if prefix else ""
        raise ConfigError(
            f"a prompt of {lengths.max()} and {max_new_tokens} new tokens{behind} do not fit into "
            f"max_position_embeddings={limit}"
        )
    tokens = np.zeros((len(prompts), _round(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    max_len = max(tokens.shape[1], _round(longest))
    return _prefill(model, params, tokens, lengths, key, sampling.kind, sampling.numbers(), max_len)


def generate(
    model: nn.Module,
    params: Any,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    eos_id: int | Sequence[int] | None = None,
    key: jax.Array | None = None,
) -> list[list[int]]:
    """New tokens of every prompt, in one compiled loop.

    Args:
      params: parameters, also bound ones (adapters, low-bit leaves).
      prompts: lists of token ids, of any lengths.
      eos_id: ids that end a row; default the model config's, ``()`` for none.
      key: for sampling; ``jax.random.key(0)`` by default.

    Returns:
      Per prompt the new tokens, with the ending one if there was one.

    Raises:
      ConfigError: an empty prompt, or more tokens than the model has positions.
    """
    sampling, key = sampling or Sampling(), jax.random.key(0) if key is None else key
    state = _start(model, params, prompts, max_new_tokens, sampling, key)
    out = _loop(
        model,
        params,
        state,
        key,
        sampling.kind,
        sampling.numbers(),
        _eos_ids(model, eos_id),
        jnp.int32(max_new_tokens),
        _round(max_new_tokens),
    )
    return [[int(t) for t in row if t != ENDED] for row in np.asarray(out)]


def stream(
    model: nn.Module,
    params: Any,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    eos_id: int | Sequence[int] | None = None,
    key: jax.Array | None = None,
) -> Iterator[np.ndarray]:
    """Like :func:`generate`, a step at a time: yields ``[B]`` tokens, ``-1`` for a finished row."""
    sampling, key = sampling or Sampling(), jax.random.key(0) if key is None else key
    eos, numbers = _eos_ids(model, eos_id), sampling.numbers()
    state = _start(model, params, prompts, max_new_tokens, sampling, key)
    done = np.zeros(len(prompts), bool)
    for count in range(max_new_tokens):
        if count:
            state = _step(model, params, state, key, sampling.kind, numbers)
        token = np.asarray(state["token"])
        yield np.where(done, ENDED, token)
        done |= np.isin(token, eos)
        if done.all():
            return


def generate_text(
    model: nn.Module, params: Any, tokenizer: Any, prompts: str | Sequence[str], **options: Any
) -> list[str]:
    """Continuations of texts; options as in :func:`generate`."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    return [tokenizer.decode(new) for new in generate(model, params, ids, **options)]


def stream_text(
    model: nn.Module, params: Any, tokenizer: Any, prompt: str | Ids, **options: Any
) -> Iterator[str]:
    """Pieces of the continuation of one text (or one list of ids, e.g. a chat) as they come."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    decoder = tokenizer.stream()
    for token in stream(model, params, [ids], **options):
        if piece := decoder.push(token[0]):
            yield piece
    if piece := decoder.flush():
        yield piece
