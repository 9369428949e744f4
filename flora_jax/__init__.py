"""flora_jax: parameter-efficient training as arithmetic on parameter pytrees."""

import importlib as _importlib
from typing import Any as _Any

from flora_jax import adapters as adapters
from flora_jax import attention as attention
from flora_jax.adapters import EVA as EVA
from flora_jax.adapters import IA3 as IA3
from flora_jax.adapters import KORE as KORE
from flora_jax.adapters import MASA as MASA
from flora_jax.adapters import NOLA as NOLA
from flora_jax.adapters import OFT as OFT
from flora_jax.adapters import Bone as Bone
from flora_jax.adapters import Bottleneck as Bottleneck
from flora_jax.adapters import Compacter as Compacter
from flora_jax.adapters import DoRA as DoRA
from flora_jax.adapters import FLoRA as FLoRA
from flora_jax.adapters import Hydra as Hydra
from flora_jax.adapters import LoHa as LoHa
from flora_jax.adapters import LoKr as LoKr
from flora_jax.adapters import LoRA as LoRA
from flora_jax.adapters import MiSS as MiSS
from flora_jax.adapters import OLoRA as OLoRA
from flora_jax.adapters import PiSSA as PiSSA
from flora_jax.adapters import PrefixTuning as PrefixTuning
from flora_jax.adapters import PromptTuning as PromptTuning
from flora_jax.adapters import Replace as Replace
from flora_jax.adapters import SoKA as SoKA
from flora_jax.adapters import SVFit as SVFit
from flora_jax.adapters import VeRA as VeRA
from flora_jax.adapters import VLoRA as VLoRA
from flora_jax.adapters import spectral_ranks as spectral_ranks
from flora_jax.adapters.eva import eva as eva
from flora_jax.core.bind import bind as bind
from flora_jax.core.bind import materialize as materialize
from flora_jax.core.bind import rebase as rebase
from flora_jax.core.bind import split as split
from flora_jax.core.calibrate import calibrate as calibrate
from flora_jax.core.initialize import combine as combine
from flora_jax.core.initialize import init as init
from flora_jax.core.initialize import partition as partition
from flora_jax.core.observe import observe as observe
from flora_jax.core.plan import Plan as Plan
from flora_jax.core.plan import plan as plan
from flora_jax.core.registry import methods as methods
from flora_jax.core.spec import KernelSpec as KernelSpec
from flora_jax.engine import AdapterBank as AdapterBank
from flora_jax.engine import combine_adapters as combine_adapters
from flora_jax.engine import extract_lora as extract_lora
from flora_jax.engine import pad_rank as pad_rank
from flora_jax.engine import requantize as requantize
from flora_jax.engine import to_lora as to_lora
from flora_jax.quant import Format as Format
from flora_jax.quant import QArray as QArray
from flora_jax.quant import dequantize as dequantize
from flora_jax.quant import quantize as quantize

__version__ = "0.1.0"

# Submodules that need more than jax and numpy: imported when first named.
_LAZY = ("io", "linen", "nnx", "models", "data", "training", "evaluation", "config")
# Functions of such modules.
_FUNCTIONS = {"convert_attention": "models.convert", "graft": "models.convert"}


def __getattr__(name: str) -> _Any:
    if name in _FUNCTIONS:
        return getattr(_importlib.import_module(f"flora_jax.{_FUNCTIONS[name]}"), name)
    if name in _LAZY:
        return _importlib.import_module(f"flora_jax.{name}")
    raise AttributeError(f"module 'flora_jax' has no attribute {name!r}")
