"""Foreign NNX models: swap their layers for dispatching ones, read the layout of their kernels."""

from __future__ import annotations

import re
from typing import Any

from flax import nnx

from flora_jax.core import paths
from flora_jax.core.errors import StructureError
from flora_jax.core.spec import KernelSpec
from flora_jax.linen import foreign
from flora_jax.nnx.functional import params
from flora_jax.nnx.layers import dispatching


def adapt(model: nnx.Module) -> nnx.Module:
    """A copy of the model whose Flax layers take kernels that are weight leaves.

    Every Linear, LinearGeneral, Einsum, Conv, ConvTranspose and Embed inside it (attention and
    recurrent cells are made of these; subclasses included) becomes an instance of a subclass that
    dispatches. Attributes, parameters and their paths stay, arrays are shared with the original,
    and plain kernels run Flax's own code. Layers stacked by ``nnx.vmap`` for ``nnx.scan`` too.

    Raises:
      StructureError: the model has no such layer.

    >>> model = adapt(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    >>> isinstance(model, nnx.Linear), sorted(params(model))
    (True, ['bias', 'kernel'])
    """
    model = nnx.clone(model)
    found = False
    for _, node in nnx.iter_graph(model):
        cls = dispatching(type(node)) if isinstance(node, nnx.Module) else None
        if cls is not None:
            # Modules refuse attribute writes inside another trace; the class is no state of theirs.
            object.__setattr__(node, "__class__", cls)
            found = True
    if not found:
        raise StructureError(f"{type(model).__name__} has no Flax layer with a kernel to adapt")
    return model


def _layout(layer: Any) -> tuple[str, KernelSpec, tuple[int, ...]] | None:
    """A layer's parameter name, spec and unstacked kernel shape; None for other modules."""
    match layer:
        case nnx.Linear():
            return "kernel", KernelSpec.dense(), (layer.in_features, layer.out_features)
        case nnx.LinearGeneral():
            batch, n_in, n_out = (
                tuple(layer.batch_axis.values()),
                layer.in_features,
                layer.out_features,
            )
            spec = foreign.dense_general_spec(len(batch), len(n_in), len(n_out))
            return "kernel", spec, (*batch, *n_in, *n_out)
        case nnx.Einsum() if layer.einsum_str is not None:
            return "kernel", KernelSpec.einsum(layer.einsum_str), tuple(layer.kernel_shape)
        case nnx.Conv():
            shape = tuple(layer.kernel_shape)
            return (
                "kernel",
                KernelSpec.conv(len(shape) - 2, groups=layer.feature_group_count),
                shape,
            )
        case nnx.ConvTranspose():
            shape = tuple(layer.kernel_shape)
            if layer.transpose_kernel:
                return "kernel", foreign.no_spec(len(shape)), shape
            return "kernel", KernelSpec.conv(len(shape) - 2, transpose=True), shape
        case nnx.Embed():
            return "embedding", KernelSpec.embedding(), (layer.num_embeddings, layer.features)
    return None


def specs(model: nnx.Module) -> dict[str, KernelSpec]:
    """``{regex: KernelSpec}`` of every kernel of a model's Flax layers, adapted or not.

    The keys match one path each: give the result to ``flora.plan(params, rules, specs=...)``.
    Leading axes that ``nnx.vmap`` added to a kernel are its ``stack_ndim``.

    Raises:
      PlanError: a kernel is stacked along an axis that is not the first.

    >>> specs(nnx.LinearGeneral(3, (2, 4), rngs=nnx.Rngs(0)))["kernel"].out_axes
    (1, 2)
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in paths.flatten(params(model)).items()}
    out: dict[str, KernelSpec] = {}
    for keys, node in nnx.iter_graph(model):
        layout = _layout(node)
        if layout is None:
            continue
        name, spec, shape = layout
        path = "/".join((*map(str, keys), name))
        # A variable shared by two layers is stored under one of them.
        if path in shapes:
            out[re.escape(path)] = foreign.stacked(path, spec, shapes[path], shape)
    return foreign.exact_first(out)
