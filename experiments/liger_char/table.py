"""Perplexity a byte before and after LoRA."""

metrics = {
    "perplexity_before": "Converted, perplexity a byte",
    "perplexity": "After LoRA",
    "trained": "Trained",
    "seconds_per_step": "s/step",
}
PARTS = {
    (0.5, 0.5): "Liger: window and recurrence",
    (1.0, 0.0): "the window alone",
    (0.0, 1.0): "the recurrence alone",
}


def label(bindings):
    if bindings["attention"] is None:
        return "softmax, the source"
    weights = bindings.get("Liger.weights")
    return "linear attention, elu1" if weights is None else PARTS[tuple(weights)]
