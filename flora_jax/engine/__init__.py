"""Several adapters on one base: combine, convert, extract, serve, merge into low bits."""

from flora_jax.engine.bank import AdapterBank as AdapterBank
from flora_jax.engine.combine import combine_adapters as combine_adapters
from flora_jax.engine.convert import to_lora as to_lora
from flora_jax.engine.extract import extract_lora as extract_lora
from flora_jax.engine.ranks import pad_rank as pad_rank
from flora_jax.engine.requantize import requantize as requantize
