"""Share of the asked values that are the likeliest token, before and after LoRA."""

metrics = {
    "token_accuracy_before": "Converted, % right",
    "token_accuracy": "After LoRA, % right",
    "perplexity": "Perplexity",
    "trained": "Trained",
    "seconds_per_step": "s/step",
}


def label(bindings):
    if bindings["attention"] is None:
        return "softmax, the source"
    if "LinearAttention.feature_map" in bindings:
        return f"linear attention, {bindings['LinearAttention.feature_map']}"
    first = bindings["SmallLanguageModel.distillation"]
    name = "Hedgehog, distilled first" if first else "Hedgehog, not distilled"
    return f"{name}, {bindings['steps']} steps"
