"""Share of held-out digits that are named right, by greedy decoding."""

metrics = {
    "accuracy": "Named right, %",
    "accuracy_before": "Before, %",
    "nll": "Cross-entropy of the name",
    "trained": "Trained numbers",
    "seconds_per_step": "s/step",
}
NAMES = {"queries": "of a generator", "linear": "of a linear map"}


def label(bindings):
    if "adapter" in bindings:
        name = bindings["adapter"].strip("@()")
        return f"{name} r=4, " + ("image as weights" if name == "VLoRA" else "no image")
    model = "LoRA r=4" if len(bindings["train.rules"]) > 1 else "frozen model"
    return f"4 image tokens {NAMES[bindings['ImageTokens.projector']]}, {model}"
