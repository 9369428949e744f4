"""The ids of a trained prompt before the tokens of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from flora_jax.core import ops

COMMON = -1
"""Segment of tokens that every segment of their row sees."""


def with_prompt(bound: Any, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch with the prompt of a bound model (``PromptTuning``) before its tokens.

    ``tokens [B, T] -> [B, P + T]``; no loss falls on the prompt; positions count it. In a row of
    packed texts every text sees the prompt, as if it stood there alone behind it. Rows that choose
    an adapter without a prompt (``flora.bind(rows=)``) do not see it and start at position 0.
    Without a prompt the batch comes back as it is.

    Args:
      bound: the bound parameters.
      batch: ``tokens`` and, if present, ``targets, loss_mask, positions, segment_ids, mask,
        token_types``, all ``[B, T]``; other keys stay.
    """
    prompt = ops.virtual_rows(bound)
    if prompt is None or "tokens" not in batch:
        return batch
    ids, on = prompt
    rows, length = batch["tokens"].shape
    new = dict(batch)
    if "targets" in new and new.get("loss_mask") is None:
        new["loss_mask"] = jnp.ones((rows, length), jnp.float32)
    here = jnp.ones((rows, 1), bool) if on is None else on[:, None]
    if on is not None:
        new.setdefault("positions", jnp.arange(length)[None])
        if "mask" not in new:
            new.setdefault("segment_ids", jnp.ones((rows, length), jnp.int32))
    if "positions" in new:
        new["positions"] = new["positions"] + len(ids) * here
    before = {
        "tokens": jnp.array(ids)[None],
        "positions": jnp.arange(len(ids))[None],
        "segment_ids": jnp.where(here, COMMON, 0),
        "mask": here,
        **dict.fromkeys(("targets", "loss_mask", "token_types"), jnp.zeros((1, 1))),
    }
    for name in before.keys() & new.keys():
        first = jnp.broadcast_to(before[name], (rows, len(ids)))
        new[name] = jnp.concatenate([first.astype(new[name].dtype), new[name]], axis=1)
    return new
