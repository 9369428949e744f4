"""Accuracy on held-out digits by attention."""

metrics = {
    "accuracy": "Accuracy, %",
    "nll": "Cross-entropy",
    "trained": "Trained",
    "examples_per_s": "Examples/s",
}


def label(bindings):
    if bindings["ViTConfig.attention"] == "@Softmax()":
        return "softmax"
    name = "linear (ReLU)" if bindings.get("InLine.division") else "InLine"
    return name + (" and residual" if bindings["InLine.residual"] else " alone")
