"""Foreign Linen models: run unmodified ``flax.linen`` layers on kernels that are weight leaves.

:func:`intercept` is a ``flax.linen.intercept_methods`` context: a layer of ``flax.linen`` whose
stored kernel is a weight leaf goes through our dispatch, everything else runs Flax's own code.
Leaves are read with ``get_variable``; ``self.param`` would compare the layer's shape with the first
array inside the leaf.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flora_jax.core.errors import FloraError, PlanError, StructureError
from flora_jax.core.leaf import WeightLeaf
from flora_jax.linen import foreign


def _numerics(module: Any) -> foreign.Numerics:
    promote = lambda *arrays: module.promote_dtype(*arrays, dtype=module.dtype)
    preferred = getattr(module, "preferred_element_type", None)
    return foreign.Numerics(promote, getattr(module, "precision", None), preferred)


def stored(module: nn.Module, name: str) -> Any:
    """The stored value of a parameter, unboxed, or None."""
    if not module.has_variable("params", name):
        return None
    return nn.meta.unbox(module.get_variable("params", name))


def _bias(module: Any) -> Any:
    if not module.use_bias:
        return None
    bias = stored(module, "bias")
    if bias is None:
        raise StructureError("the layer has use_bias=True and no stored bias")
    return bias


def sizes(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _dense(module: Any, kernel: WeightLeaf, inputs: Any) -> jax.Array:
    foreign.refuse(dot_general=module.dot_general, dot_general_cls=module.dot_general_cls)
    features = (module.features,)
    return foreign.dense_general(
        inputs, kernel, _bias(module), _numerics(module), features=features
    )


def _dense_general(module: Any, kernel: WeightLeaf, inputs: Any) -> jax.Array:
    foreign.refuse(dot_general=module.dot_general, dot_general_cls=module.dot_general_cls)
    return foreign.dense_general(
        inputs,
        kernel,
        _bias(module),
        _numerics(module),
        features=sizes(module.features),
        axis=sizes(module.axis),
        batch=len(sizes(module.batch_dims)),
    )


def _einsum(
    module: Any, kernel: WeightLeaf, inputs: Any, einsum_str: str | None = None
) -> jax.Array:
    equation = nn.merge_param("einsum_str", module.einsum_str, einsum_str)
    return foreign.einsum(inputs, kernel, _bias(module), _numerics(module), equation=equation)


def _conv(module: Any, kernel: WeightLeaf, inputs: Any) -> jax.Array:
    if not module.shared_weights:
        raise PlanError("a locally connected layer (ConvLocal) takes no adapter")
    foreign.refuse(
        mask=module.mask,
        conv_general_dilated=module.conv_general_dilated,
        conv_general_dilated_cls=module.conv_general_dilated_cls,
    )
    return foreign.conv(
        inputs,
        kernel,
        _bias(module),
        _numerics(module),
        features=module.features,
        size=sizes(module.kernel_size),
        strides=module.strides,
        padding=module.padding,
        input_dilation=module.input_dilation,
        kernel_dilation=module.kernel_dilation,
        groups=module.feature_group_count,
    )


def _conv_transpose(module: Any, kernel: WeightLeaf, inputs: Any) -> jax.Array:
    foreign.refuse(mask=module.mask, transpose_kernel=module.transpose_kernel)
    return foreign.conv_transpose(
        inputs,
        kernel,
        _bias(module),
        _numerics(module),
        features=module.features,
        size=sizes(module.kernel_size),
        strides=module.strides,
        padding=module.padding,
        kernel_dilation=module.kernel_dilation,
    )


def _embed_setup(module: Any, table: WeightLeaf) -> None:
    foreign.check_shape(table, (module.num_embeddings, module.features))
    module.embedding = table


def _embed(module: Any, table: WeightLeaf, inputs: Any) -> jax.Array:
    scalar = jnp.zeros((), table.dtype)
    (scalar,) = module.promote_dtype(scalar, dtype=module.dtype, inexact=False)
    return foreign.embed(inputs, table, scalar.dtype)


def _attend(module: Any, table: WeightLeaf, query: Any) -> jax.Array:
    promote = lambda query, table, _: (*module.promote_dtype(query, table, dtype=module.dtype), _)
    return foreign.embed_attend(query, table, foreign.Numerics(promote))


def method(wrapped: Any) -> Any:
    """The function under Flax's wrapper: what ``InterceptorContext.orig_method`` is a partial of.

    Keyed by function, not by class: a subclass reaches it through ``super()`` or inheritance, and
    a subclass that overrides it runs its own code.
    """
    return wrapped.__wrapped__


_LAYERS: dict[Any, tuple[str, Callable[..., Any]]] = {
    method(nn.Dense.__call__): ("kernel", _dense),
    method(nn.DenseGeneral.__call__): ("kernel", _dense_general),
    method(nn.Einsum.__call__): ("kernel", _einsum),
    method(nn.Conv.__call__): ("kernel", _conv),
    method(nn.ConvTranspose.__call__): ("kernel", _conv_transpose),
    method(nn.Embed.setup): ("embedding", _embed_setup),
    method(nn.Embed.__call__): ("embedding", _embed),
    method(nn.Embed.attend): ("embedding", _attend),
}


def _dispatch(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    name, layer = _LAYERS.get(getattr(context.orig_method, "func", None), (None, None))
    kernel = None if name is None else stored(module, name)
    if not isinstance(kernel, WeightLeaf):
        return next_fun(*args, **kwargs)
    try:
        return layer(module, kernel, *args, **kwargs)
    except FloraError as error:
        path = "/".join((*module.path, name))
        raise type(error)(f"{path}: {error}") from None


@contextlib.contextmanager
def intercept() -> Iterator[None]:
    """Within it, ``flax.linen`` layers take kernels that are weight leaves (adapted, low-bit ...).

    Covers Dense, DenseGeneral, Einsum, Conv, ConvTranspose, Embed (call and ``attend``) and what
    is made of them (attention, LSTM cells), under jit, grad, ``nn.scan``, ``nn.remat`` and
    ``nn.vmap``. Layers with plain kernels run Flax's own code. A custom ``dot_general`` or
    convolution, a kernel mask, ``transpose_kernel`` and ConvLocal raise with an adapted kernel, and
    so does any layer that is not one of these.

    >>> import flora_jax as flora
    >>> model, x = nn.Dense(4), jnp.ones((2, 3))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> plan = flora.plan(params, {"kernel": flora.LoRA(rank=2)})
    >>> bound = flora.bind(params, flora.init(plan, jax.random.key(1), params), plan)
    >>> with intercept():
    ...     model.apply({"params": bound}, x).shape
    (2, 4)
    """
    with nn.intercept_methods(_dispatch):
        yield
