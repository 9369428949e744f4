"""Five attentions at one budget of LoRA; seeds outermost, so that a base is made once."""

SEEDS = range(3)
SETTINGS = (
    {"attention": None},
    {"attention": "@Liger()", "Liger.weights": (0.5, 0.5)},
    {"attention": "@Liger()", "Liger.weights": (1.0, 0.0)},
    {"attention": "@Liger()", "Liger.weights": (0.0, 1.0)},
    {"attention": "@LinearAttention()"},
)


def sweep():
    for seed in SEEDS:
        for setting in SETTINGS:
            yield {**setting, "seed": seed}
