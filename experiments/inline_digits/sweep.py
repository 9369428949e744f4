"""Five attentions, three seeds; seeds outermost, so that a stopped sweep has whole seeds."""

SEEDS = range(3)
DIVISION = {"InLine.division": True, "InLine.feature_map": "relu"}


def settings():
    yield {"ViTConfig.attention": "@Softmax()"}
    for norm in (DIVISION, {}):
        for residual in (False, True):
            yield {"ViTConfig.attention": "@InLine()", **norm, "InLine.residual": residual}


def sweep():
    for seed in SEEDS:
        for setting in settings():
            yield {**setting, "seed": seed}
