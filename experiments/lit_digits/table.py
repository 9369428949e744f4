"""The error of the predicted noise on held-out digits, guideline by guideline."""

metrics = {
    "noise_mse_before": "Noise, at the start",
    "noise_mse": "Noise, mean squared error",
    "vlb": "Variance's bound, bits",
    "trained": "Trained",
}


def label(bindings):
    heads = bindings["student/DiTConfig.num_attention_heads"]
    anew = bindings["ConvertedGenerator.anew"]
    if not anew:
        return "softmax, the teacher trained on"
    start = "from nothing" if ".*" in anew else "inherited"
    if "LiT.window" not in bindings:
        return f"softmax, {heads} heads, {start}"
    words = [f"linear, {heads} heads", start]
    words += ["convolution"] if bindings["LiT.window"] else []
    words += ["distilled"] if bindings["ConvertedGenerator.distillation"] else []
    return ", ".join(words)
