"""The error of the predicted noise on held-out digits, guideline by guideline."""

metrics = {
    "noise_mse_before": "Noise, at the start",
    "noise_mse": "Noise, mean squared error",
    "vlb": "Variance's bound, bits",
    "trained": "Trained",
}


def label(bindings):
    if "student/DiTConfig.attention" in bindings:
        return "softmax, the teacher trained on"
    start = "from nothing" if ".*" in bindings["ConvertedGenerator.anew"] else "inherited"
    words = [f"linear, {bindings['student/DiTConfig.num_attention_heads']} heads", start]
    words += ["convolution"] if bindings["LiT.window"] else []
    words += ["distilled"] if bindings["ConvertedGenerator.distillation"] else []
    return ", ".join(words)
