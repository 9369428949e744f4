"""The error of the predicted velocity on held-out digits, attention by attention."""

metrics = {
    "noise_mse_before": "Velocity, at the start",
    "noise_mse": "Velocity, mean squared error",
    "trained": "Trained",
}
NAMES = {
    "@Softmax()": "softmax, trained on",
    "@LinearAttention()": "linear alone",
}


def label(bindings):
    attention = bindings["student/DiTConfig.attention"]
    if attention in NAMES:
        return NAMES[attention]
    whole = len(bindings["train.rules"]) == 1
    name = f"SLA ({bindings['SLA.variant']})" if whole else "sparse alone"
    return f"{name}, {int(8 * bindings['SLA.critical'])} of 8 blocks"
