"""ConvShareViT: the linear layers of a transformer as convolutions over each token's own map."""

from __future__ import annotations

import dataclasses

import jax

from flora_jax.core import ops
from flora_jax.core.errors import ConfigError, unknown
from flora_jax.core.leaf import Weight
from flora_jax.core.registry import register

PADDINGS = ("valid", "same")


@register(
    "ConvShare",
    family="projection",
    paper="ConvShareViT: Enhancing Vision Transformers with Convolutional Attention Mechanisms "
    "for Free-Space Optical Accelerators",
    arxiv="2504.11517",
    parameters="window^2 (C_in / side^2) maps",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvShare:
    """A projection whose kernel is shared by all tokens and slides over each token's own map.

    A token ``[C]`` is ``C / side^2`` maps ``[side, side, maps]``, row by row, maps last; the
    kernel ``[window, window, maps_in, maps_out]`` convolves them and the result is read off in the
    same order. ``valid`` with ``window = side`` gives one number a kernel: exactly a dense layer,
    whose weights the kernels are. A smaller window gives ``(side - window + 1)^2`` numbers a
    kernel, ``same`` gives ``side^2``: doubly Toeplitz matrices of ``window^2`` numbers.

    The source's text was not seen; one map a token is from its abstract, several maps (for the MLP)
    are ours.

    Args:
      side: of a token's map.
      window: of the kernel.
      padding: ``valid`` or ``same`` (zeros outside).

    >>> ConvShare(side=8, window=3, padding="same").kernel_shape(64, 256)
    (3, 3, 1, 4)
    """

    side: int
    window: int
    padding: str = "valid"

    def __post_init__(self):
        if self.padding not in PADDINGS:
            raise ConfigError(unknown("padding", self.padding, PADDINGS))
        if not 1 <= self.window <= self.side:
            raise ConfigError(f"window={self.window} must be between 1 and side={self.side}")

    @property
    def numbers(self) -> int:
        """Outputs of one kernel on one map."""
        side = self.side if self.padding == "same" else self.side - self.window + 1
        return side * side

    def kernel_shape(self, inputs: int, outputs: int) -> tuple[int, int, int, int]:
        """``[window, window, maps_in, maps_out]``.

        Raises:
          ConfigError: the maps do not divide the widths.
        """
        area = self.side**2
        if inputs % area:
            raise ConfigError(f"side={self.side}: maps of {area} do not divide {inputs} inputs")
        if outputs % self.numbers:
            raise ConfigError(f"kernels of {self.numbers} numbers do not divide {outputs} outputs")
        return self.window, self.window, inputs // area, outputs // self.numbers

    def apply(self, x: jax.Array, kernel: Weight, bias: jax.Array | None = None) -> jax.Array:
        """``[..., C_in] -> [..., C_out]``; the bias has a number for each kernel."""
        maps = x.reshape(-1, self.side, self.side, x.shape[-1] // self.side**2)
        y = ops.conv(maps, kernel, padding=self.padding.upper())
        y = y if bias is None else y + bias.astype(y.dtype)
        return y.reshape(*x.shape[:-1], -1)
