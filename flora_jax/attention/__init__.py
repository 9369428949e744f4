"""Attention variants behind one function; they know no module system."""

from flora_jax.attention.conv_share import ConvShare as ConvShare
from flora_jax.attention.distil import Distil as Distil
from flora_jax.attention.gla import GLA as GLA
from flora_jax.attention.hedgehog import Hedgehog as Hedgehog
from flora_jax.attention.hedgehog import LoLCATs as LoLCATs
from flora_jax.attention.inline import InLine as InLine
from flora_jax.attention.liger import Liger as Liger
from flora_jax.attention.linear import LinearAttention as LinearAttention
from flora_jax.attention.lit import LiT as LiT
from flora_jax.attention.masks import Causal as Causal
from flora_jax.attention.masks import Full as Full
from flora_jax.attention.masks import Mask as Mask
from flora_jax.attention.masks import Prefix as Prefix
from flora_jax.attention.masks import Sliding as Sliding
from flora_jax.attention.masks import visible as visible
from flora_jax.attention.quantum import QFWP as QFWP
from flora_jax.attention.quantum import QRNN as QRNN
from flora_jax.attention.quantum import QRNNReservoir as QRNNReservoir
from flora_jax.attention.softmax import Softmax as Softmax
from flora_jax.attention.types import Call as Call
from flora_jax.attention.types import Dropout as Dropout
from flora_jax.attention.types import Inputs as Inputs
from flora_jax.attention.types import KeyValuePrefix as KeyValuePrefix
from flora_jax.attention.types import Sizes as Sizes
from flora_jax.attention.types import Variant as Variant
from flora_jax.attention.types import from_json as from_json
