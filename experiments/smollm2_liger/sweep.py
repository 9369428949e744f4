"""The source, Liger with and without its window, a naive swap for linear attention; one seed."""

SEEDS = (0,)


def settings():
    yield {"attention": None}
    yield {"attention": "@Liger()", "Liger.weights": (0.5, 0.5)}
    yield {"attention": "@Liger()", "Liger.weights": (0.0, 1.0)}
    yield {"attention": "@LinearAttention()"}


def sweep():
    for seed in SEEDS:
        for setting in settings():
            yield {**setting, "seed": seed}
