"""Perplexity before and after the same LoRA budget."""

metrics = {
    "perplexity_before": "Perplexity as converted",
    "perplexity": "After LoRA",
    "token_accuracy_before": "Next token right as converted, %",
    "token_accuracy": "After LoRA, %",
    "trained": "Trained numbers",
    "seconds_per_step": "s/step",
}
NAMES = {None: "softmax (the source)", "@LinearAttention()": "linear, elu + 1 (naive swap)"}


def label(bindings):
    if bindings["attention"] in NAMES:
        return NAMES[bindings["attention"]]
    return "Liger" + ("" if bindings["Liger.weights"][0] else " without the window")
