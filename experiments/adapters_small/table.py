"""Three tables, one a claim."""

metrics = {
    "accuracy": "Accuracy on 5-9, %",
    "nll": "Held-out cross-entropy",
    "retention": "Retention on 0-4, %",
    "trained_adapters": "Adapter numbers",
    "loss_at_20": "Loss at step 20",
    "loss_at_50": "at 50",
    "loss_at_100": "at 100",
    "loss_at_200": "at 200",
}
PARTS = {
    "lift": "LIFT: an MLP whose kernels got noise before its first task ended",
    "eva": "EVA: rank 2 on every kernel of a ViT's blocks",
    "compacter": "Compacter: bottlenecks after both sublayers of a ViT",
}
SCORES = {"lowrank": "LIFT", "magnitude": "largest entries", "random": "random entries"}


def part(bindings):
    if "train.model" in bindings:
        return PARTS["lift"]
    return PARTS["eva" if "LoRA.rank" in bindings or "EVA.rank" in bindings else "compacter"]


def label(bindings):
    if "LIFT.score" in bindings:
        return SCORES[bindings["LIFT.score"]]
    for name in ("Bottleneck", "Compacter"):
        if f"{name}.bottleneck" in bindings:
            return f"{name} d={bindings[f'{name}.bottleneck']}"
    rank = next((key for key in bindings if key.endswith("A.rank")), "whole kernels.rank")
    name = rank.removesuffix(".rank")
    return name if "train.model" in bindings else f"{name}, rate {bindings['rate']:g}"
