"""The guidelines one by one, three seeds; seeds outermost: one teacher serves all of a seed."""

SEEDS = range(3)
NOTHING = {"ConvertedGenerator.anew": (".*",)}
ATTENTION = {"ConvertedGenerator.anew": ("layers/attention/.*",)}
PLAIN, CONV = {"LiT.window": 0}, {"LiT.window": 3}
ALONE = {"ConvertedGenerator.distillation": None}
TAUGHT = {"ConvertedGenerator.distillation": "@TeacherMatching()"}


def heads(count):
    return {"student/DiTConfig.num_attention_heads": count}


def softmax(count):
    return {"student/DiTConfig.attention": "@Softmax()", **ALONE, **heads(count)}


def settings():
    yield {**softmax(4), "ConvertedGenerator.anew": ()}
    yield {**NOTHING, **PLAIN, **ALONE, **heads(2)}
    yield {**ATTENTION, **PLAIN, **ALONE, **heads(2)}
    yield {**ATTENTION, **CONV, **ALONE, **heads(2)}
    yield {**ATTENTION, **CONV, **TAUGHT, **heads(2)}
    yield {**ATTENTION, **CONV, **ALONE, **heads(8)}
    yield {**softmax(2), **ATTENTION}
    yield {**softmax(8), **ATTENTION}


def sweep():
    for seed in SEEDS:
        for setting in settings():
            yield {**setting, "seed": seed}
