"""The image through generated weights, and a LoRA that never sees it; seeds outermost."""

SEEDS = range(3)


def settings():
    yield {"adapter": "@VLoRA()", "VLoRA.rank": 4}
    yield {"adapter": "@LoRA()", "LoRA.rank": 4}


def sweep():
    for seed in SEEDS:
        for setting in settings():
            yield {**setting, "seed": seed}
