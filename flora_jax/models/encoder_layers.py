"""Pieces that the encoders (BERT, ViT) share: attention, activations, the stack of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.attention import ConvShare, Dropout, Full, Inputs, Sizes, Softmax, Variant
from flora_jax.core import ops
from flora_jax.core.errors import ConfigError, unknown
from flora_jax.linen.attention import FloraAttention
from flora_jax.linen.layers import Dense, PrefixDense, weight
from flora_jax.models.prefix import pair

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.checkpoint_dots,
    "dots_no_batch": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


POLICY = ("dtype", "param_dtype", "scan_layers", "remat")
"""Fields of a config that say how it is computed, not what: no file holds them."""


def check_choice(what: str, value: str, choices: Any) -> None:
    """Raises ConfigError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(unknown(what, value, choices))


def check_heads(hidden_size: int, heads: int) -> None:
    """Raises ConfigError unless the heads divide the width."""
    if hidden_size % heads:
        raise ConfigError(f"num_attention_heads={heads} does not divide hidden_size={hidden_size}")


def kernel_init(std: float | None) -> nn.initializers.Initializer:
    """Normal with the given deviation, or LeCun normal (``1/sqrt(in)``) for ``None``."""
    return nn.initializers.lecun_normal() if std is None else nn.initializers.normal(std)


@dataclasses.dataclass(frozen=True)
class Mode:
    """What a call asks of every submodule: dropout on, what every layer gives besides.

    Args:
      collect: the output of the model that it is for: ``layers`` or ``reports``; else nothing.
    """

    train: bool = False
    collect: str = ""

    def kept(self, x: jax.Array, report: Any) -> Any:
        """A layer's second result: its output, or what its attention reports (:class:`Variant`)."""
        return {"layers": x, "reports": report}.get(self.collect)


class TokenConv(nn.Module):
    """A :class:`ConvShare` projection: ``kernel [window,window,maps_in,maps_out]``, ``bias``."""

    features: int
    how: ConvShare
    use_bias: bool = True
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = self.how.kernel_shape(x.shape[-1], self.features)
        kernel = weight(self, "kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            bias = ops.value(weight(self, "bias", zeros, shape[-1:], self.param_dtype))
        return self.how.apply(x, kernel, bias)


def projection(how: ConvShare | None, features: int, **options: Any) -> nn.Module:
    """A dense layer, or what a configuration puts in its place."""
    return Dense(features, **options) if how is None else TokenConv(features, how, **options)


class SelfAttention(nn.Module):
    """Query, key and value projections and the attention itself, ``[B,T,D] -> [B,T,D]``.

    The second result is what the attention reports, for most variants None.

    Args:
      grid: ``(h, w)`` when the last ``h * w`` tokens are an image's patches.
      projection: what the three projections are in place of dense layers.
    """

    heads: int
    use_bias: bool
    dropout: float
    kernel_init: nn.initializers.Initializer
    param_dtype: Any
    train: bool
    variant: Variant = Softmax()
    grid: tuple[int, int] | None = None
    projection: ConvShare | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, Any]:
        options = {
            "use_bias": self.use_bias,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
        }

        def dense(name: str) -> tuple[jax.Array, Any]:
            if self.projection is None:
                return PrefixDense(x.shape[-1], name=name, **options)(x)
            return TokenConv(x.shape[-1], self.projection, name=name, **options)(x), None

        split = lambda y: y.reshape(*y.shape[:-1], self.heads, y.shape[-1] // self.heads)
        q = split(projection(self.projection, x.shape[-1], name="query", **options)(x))
        (k, k_prefix), (v, v_prefix) = dense("key"), dense("value")
        k, v = split(k), split(v)
        dropout = None
        if self.train and self.dropout:
            dropout = Dropout(self.dropout, self.make_rng("dropout"))
        dim, width = q.shape[-1], x.shape[-1]
        sizes = Sizes(heads=self.heads, kv_heads=self.heads, dim=dim, width=width)
        core = FloraAttention(self.variant, sizes, self.param_dtype, name="attention")
        out, report = core(
            q,
            k,
            v,
            mask=Full(),
            valid=mask,
            prefix=pair(self, k_prefix, v_prefix, self.heads),
            dropout=dropout,
            inputs=Inputs(x=x, q=q, k=k, grid=self.grid),
        )
        return out.reshape(x.shape), report


class AttentionOutput(nn.Module):
    """The projection after the heads, ``output/dense``: ``[B,T,D] -> [B,T,D]``."""

    kernel_init: nn.initializers.Initializer
    param_dtype: Any
    projection: ConvShare | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        how = {"param_dtype": self.param_dtype, "kernel_init": self.kernel_init}
        return projection(self.projection, x.shape[-1], name="dense", **how)(x)


def run_layers(
    block: type[nn.Module],
    length: int,
    x: jax.Array,
    *broadcast: Any,
    remat: str,
    scan: bool,
    **fields: Any,
) -> tuple[jax.Array, Any]:
    """``length`` blocks after one another: one scanned component ``layers``, or ``layers_0 ...``.

    A block maps ``(x, *broadcast) -> (x, y)``; the scanned parameters have a leading layer axis.

    Args:
      remat: a key of ``REMAT``, what the backward pass recomputes: nothing, all of a block, all
        but products (``dots``), all but products with a weight (``dots_no_batch``).

    Returns:
      The last ``x`` and the ``y`` stacked, ``None`` if they are ``None``.
    """
    if remat != "none":
        # Inside a scan nothing can be merged across iterations, so the barrier is not needed.
        block = nn.remat(block, policy=REMAT[remat], prevent_cse=not scan)
    if scan:
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=length,
        )
        return scanned(**fields, name="layers")(x, *broadcast)
    each = []
    for i in range(length):
        x, y = block(**fields, name=f"layers_{i}")(x, *broadcast)
        each.append(y)
    return x, jax.tree.map(lambda *y: jnp.stack(y), *each)


def read_labels(config: Mapping[str, Any]) -> int:
    """``num_labels`` of a ``config.json``: 0 unless its architecture classifies whole inputs.

    Hugging Face writes no ``num_labels`` and leaves the label names out when there are two.

    >>> read_labels({"architectures": ["BertForSequenceClassification"]})
    2
    """
    heads = ("SequenceClassification", "ImageClassification")
    if not any(name.endswith(heads) for name in config.get("architectures") or ()):
        return 0
    return int(config.get("num_labels") or len(config.get("id2label") or (0, 1)))


def write_labels(num_labels: int) -> dict[str, Any]:
    """The label names of a ``config.json``, from which ``num_labels`` is read."""
    names = [f"LABEL_{i}" for i in range(num_labels)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
