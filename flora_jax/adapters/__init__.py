"""Weight adapters: one file per family, each registers itself."""

from flora_jax.adapters.bottleneck import Bottleneck as Bottleneck
from flora_jax.adapters.compacter import Compacter as Compacter
from flora_jax.adapters.dora import DoRA as DoRA
from flora_jax.adapters.eva import EVA as EVA
from flora_jax.adapters.flora import FLoRA as FLoRA
from flora_jax.adapters.hydra import Hydra as Hydra
from flora_jax.adapters.ia3 import IA3 as IA3
from flora_jax.adapters.kore import KORE as KORE
from flora_jax.adapters.loha import LoHa as LoHa
from flora_jax.adapters.lokr import LoKr as LoKr
from flora_jax.adapters.lora import LoRA as LoRA
from flora_jax.adapters.masa import MASA as MASA
from flora_jax.adapters.miss import Bone as Bone
from flora_jax.adapters.miss import MiSS as MiSS
from flora_jax.adapters.nola import NOLA as NOLA
from flora_jax.adapters.oft import OFT as OFT
from flora_jax.adapters.pissa import OLoRA as OLoRA
from flora_jax.adapters.pissa import PiSSA as PiSSA
from flora_jax.adapters.prompts import PrefixTuning as PrefixTuning
from flora_jax.adapters.prompts import PromptTuning as PromptTuning
from flora_jax.adapters.replace import Replace as Replace
from flora_jax.adapters.soka import SoKA as SoKA
from flora_jax.adapters.spectra import spectral_ranks as spectral_ranks
from flora_jax.adapters.svfit import SVFit as SVFit
from flora_jax.adapters.vera import VeRA as VeRA
from flora_jax.adapters.vlora import VLoRA as VLoRA
