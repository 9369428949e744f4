"""Every ``peft_type`` that is read or written: one row each."""

from __future__ import annotations

from flora_jax.adapters import IA3, KORE, LoHa, LoKr, LoRA, VeRA
from flora_jax.io.peft_config import PeftType, check_lora, keys
from flora_jax.io.peft_export import export_ia3, export_lora, export_vera, tie_lora
from flora_jax.io.peft_lycoris import LycorisReader, check_lycoris, export_loha, export_lokr
from flora_jax.io.peft_methods import IA3Reader, LoRAReader, VeRAReader
from flora_jax.io.peft_miss import BONE, MISS
from flora_jax.io.peft_oft import OFT_TYPE

LORA = PeftType(
    name="LORA",
    # The last two lines steer initialisation, training or a parallel launch; the saved tensors
    # say the rest.
    keys=keys(
        """
        r lora_alpha lora_dropout use_rslora use_dora lora_bias rank_pattern alpha_pattern
        init_lora_weights ensure_weight_tying fan_in_fan_out
        loftq_config eva_config corda_config lora_ga_config qalora_group_size megatron_core
        runtime_config
        """
    ),
    kinds=("dense", "conv", "embedding"),
    conv1d=True,
    adapters=(LoRA, KORE),
    read=LoRAReader,
    write=export_lora,
    check=check_lora,
    tie=tie_lora,
)
VERA = PeftType(
    name="VERA",
    keys=keys(
        """
        r vera_dropout d_initial projection_prng_key save_projection init_weights fan_in_fan_out
        """
    ),
    kinds=("dense",),
    conv1d=True,
    adapters=(VeRA,),
    read=VeRAReader,
    write=export_vera,
)
IA3_TYPE = PeftType(
    name="IA3",
    keys=keys("feedforward_modules init_ia3_weights fan_in_fan_out"),
    kinds=("dense", "conv"),
    conv1d=True,
    adapters=(IA3,),
    read=IA3Reader,
    write=export_ia3,
)
# The dropouts and init_weights matter while PEFT trains.
LYCORIS = keys(
    """
    r alpha rank_dropout module_dropout use_effective_conv2d rank_pattern alpha_pattern init_weights
    """
)
LOHA = PeftType(
    name="LOHA",
    keys=LYCORIS,
    kinds=("dense", "conv"),
    biases=False,
    adapters=(LoHa,),
    read=LycorisReader,
    write=export_loha,
)
LOKR = PeftType(
    name="LOKR",
    keys=LYCORIS | keys("decompose_both decompose_factor rank_dropout_scale"),
    kinds=("dense", "conv"),
    biases=False,
    adapters=(LoKr,),
    read=LycorisReader,
    write=export_lokr,
    check=check_lycoris,
)
TYPES: dict[str, PeftType] = {
    form.name: form for form in (LORA, VERA, IA3_TYPE, MISS, BONE, OFT_TYPE, LOHA, LOKR)
}
