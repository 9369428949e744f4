"""Low-bit weights: formats, the QArray leaf and path-rule quantisation."""

from flora_jax.quant.formats import Format as Format
from flora_jax.quant.qarray import QArray as QArray
from flora_jax.quant.qarray import dequantize as dequantize
from flora_jax.quant.qarray import quantize as quantize
from flora_jax.quant.qarray import quantize_array as quantize_array
