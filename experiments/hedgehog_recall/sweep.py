"""Maps of linear attention in a converted model, distilled first or not; seeds outermost."""

SEEDS = range(3)
LORA = {"layers/self_attn/(q|k|v|o)_proj/kernel": "@LoRA()"}
DISTILLED = {"SmallLanguageModel.distillation": "@maps/Pretraining()", "attention": "@Hedgehog()"}
UNDISTILLED = {"SmallLanguageModel.distillation": None}
LINEAR = {**UNDISTILLED, "attention": "@LinearAttention()"}
SETTINGS = (
    {**UNDISTILLED, "attention": None, "train.rules": LORA},
    {**DISTILLED, "steps": 200},
    {**UNDISTILLED, "attention": "@Hedgehog()", "steps": 200},
    {**DISTILLED, "steps": 50},
    {**UNDISTILLED, "attention": "@Hedgehog()", "steps": 50},
    {**LINEAR, "LinearAttention.feature_map": "t2r"},
    {**LINEAR, "LinearAttention.feature_map": "elu1", "train.rules": LORA},
)


def sweep():
    for seed in SEEDS:
        for setting in SETTINGS:
            yield {**setting, "seed": seed}
