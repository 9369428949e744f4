"""Products with 4- and 8-bit weights: see docs/kernels.md."""

from flora_jax.kernels.low_bit_matmul.api import low_bit_matmul as low_bit_matmul
from flora_jax.kernels.low_bit_matmul.blocks import Blocks as Blocks
from flora_jax.kernels.low_bit_matmul.packing import LowBit as LowBit
from flora_jax.kernels.low_bit_matmul.packing import Rows as Rows
from flora_jax.kernels.low_bit_matmul.packing import from_qarray as from_qarray
from flora_jax.kernels.low_bit_matmul.packing import from_qarrays as from_qarrays
from flora_jax.kernels.low_bit_matmul.packing import low_bit as low_bit
from flora_jax.kernels.low_bit_matmul.packing import pack as pack
from flora_jax.kernels.low_bit_matmul.packing import quantize as quantize
from flora_jax.kernels.low_bit_matmul.packing import quantize_rows as quantize_rows
from flora_jax.kernels.low_bit_matmul.packing import unpack as unpack
