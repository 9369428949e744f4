"""Share of held-out digits that are named right, by greedy decoding."""

metrics = {
    "accuracy": "Named right, %",
    "accuracy_before": "Before, %",
    "nll": "Cross-entropy of the name",
    "trained": "Trained numbers",
    "seconds": "Seconds",
}


def label(bindings):
    if bindings["adapter"] == "@VLoRA()":
        return f"VLoRA r={bindings['VLoRA.rank']}, image as weights"
    return f"LoRA r={bindings['LoRA.rank']}, no image"
