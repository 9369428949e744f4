"""The layout of every kernel of a foreign Linen model, read from its layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from flora_jax.core import paths
from flora_jax.core.errors import PlanError, StructureError
from flora_jax.core.spec import KernelSpec
from flora_jax.linen import foreign
from flora_jax.linen.intercept import method, sizes, stored


def _dense(module: Any, ndim: int) -> KernelSpec:
    return KernelSpec.dense()


def _dense_general(module: Any, ndim: int) -> KernelSpec:
    batch, n_out = len(sizes(module.batch_dims)), len(sizes(module.features))
    return foreign.dense_general_spec(batch, ndim - batch - n_out, n_out)


def _einsum(module: Any, ndim: int, equation: str | None = None) -> KernelSpec:
    return KernelSpec.einsum(nn.merge_param("einsum_str", module.einsum_str, equation))


def _conv(module: Any, ndim: int) -> KernelSpec:
    if not module.shared_weights:
        return foreign.no_spec(ndim)
    return KernelSpec.conv(ndim - 2, groups=module.feature_group_count)


def _conv_transpose(module: Any, ndim: int) -> KernelSpec:
    if module.transpose_kernel:
        return foreign.no_spec(ndim)
    return KernelSpec.conv(ndim - 2, transpose=True)


def _embed(module: Any, ndim: int) -> KernelSpec:
    return KernelSpec.embedding()


_SPECS: dict[Any, tuple[str, Callable[..., KernelSpec]]] = {
    method(nn.Dense.__call__): ("kernel", _dense),
    method(nn.DenseGeneral.__call__): ("kernel", _dense_general),
    method(nn.Einsum.__call__): ("kernel", _einsum),
    method(nn.Conv.__call__): ("kernel", _conv),
    method(nn.ConvTranspose.__call__): ("kernel", _conv_transpose),
    method(nn.Embed.__call__): ("embedding", _embed),
    method(nn.Embed.attend): ("embedding", _embed),
}


def _recorder(found: dict[str, tuple[KernelSpec, tuple[int, ...]]]) -> Callable[..., Any]:
    """An interceptor that notes each layer's spec and its kernel's shape inside any scan."""

    def record(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        out = next_fun(*args, **kwargs)
        name, spec = _SPECS.get(getattr(context.orig_method, "func", None), (None, None))
        if name is not None:
            module = context.module
            shape = tuple(stored(module, name).shape)
            # Only Einsum has a second argument: the equation of this call.
            extra = (*args[1:], *(kwargs[k] for k in ("einsum_str",) if k in kwargs))
            path = "/".join((*module.path, name))
            one = (spec(module, len(shape), *extra), shape)
            if found.setdefault(path, one) != one:
                raise PlanError(f"{path}: one kernel, two layouts: {found[path][0]} and {one[0]}")
        return out

    return record


def _abstract_init(model: nn.Module, args: Any, kwargs: Any, rngs: Any, found: Any) -> Any:
    """The shapes of the parameters that ``model.init`` would make; fills ``found``."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

    def init(*values: Any) -> Any:
        filled = list(leaves)
        for i, value in zip(arrays, values):
            filled[i] = value
        args, kwargs = jax.tree.unflatten(tree, filled)
        key = jax.random.key(0)
        streams = dict.fromkeys(("params", "dropout", *rngs), key)
        with nn.intercept_methods(_recorder(found)):
            return model.init(streams, *args, **kwargs)

    return jax.eval_shape(init, *(leaves[i] for i in arrays))["params"]


def specs(
    model: nn.Module, *args: Any, rngs: tuple[str, ...] = (), **kwargs: Any
) -> Mapping[str, KernelSpec]:
    """``{regex: KernelSpec}`` of every kernel that ``model.init(key, *args, **kwargs)`` makes.

    The model is traced, nothing is computed. The keys match one path each, so the result can be
    given to ``flora.plan(params, rules, specs=...)`` as it is; leading axes that ``nn.scan`` or
    ``nn.vmap`` added to a kernel are its ``stack_ndim``.

    Args:
      args, kwargs: of the model's call (or of ``method=``); arrays or ShapeDtypeStructs.
      rngs: names of random streams that the call needs beside ``params`` and ``dropout``.

    Raises:
      PlanError: a kernel is stacked along an axis that is not the first, or used in two layouts.

    >>> model = nn.DenseGeneral((2, 4))
    >>> specs(model, jax.ShapeDtypeStruct((5, 3), "float32"))["kernel"].out_axes
    (1, 2)
    """
    found: dict[str, tuple[KernelSpec, tuple[int, ...]]] = {}
    params = _abstract_init(model, args, kwargs, rngs, found)
    shapes = {path: tuple(leaf.shape) for path, leaf in paths.flatten(params).items()}
    out: dict[str, KernelSpec] = {}
    for path, (spec, shape) in found.items():
        boxed = path not in shapes
        whole = shapes.get(f"{path}/value" if boxed else path)
        if whole is None:
            raise StructureError(f"{path}: the layer's kernel is not among the parameters")
        pattern = re.escape(path) + ("(/value)?" if boxed else "")
        out[pattern] = foreign.stacked(path, spec, whole, shape)
    return foreign.exact_first(out)
