"""The guidelines one by one, three seeds; seeds outermost: one teacher serves all of a seed."""

SEEDS = range(3)
NOTHING = {"ConvertedGenerator.anew": (".*",)}
ATTENTION = {"ConvertedGenerator.anew": ("layers/attention/.*",)}
PLAIN, CONV = {"LiT.window": 0}, {"LiT.window": 3}
ALONE = {"ConvertedGenerator.distillation": None}
TAUGHT = {"ConvertedGenerator.distillation": "@TeacherMatching()"}


def heads(count):
    return {"student/DiTConfig.num_attention_heads": count}


def settings():
    softmax = {"student/DiTConfig.attention": "@Softmax()", "ConvertedGenerator.anew": ()}
    yield {**softmax, **ALONE, **heads(4)}
    yield {**NOTHING, **PLAIN, **ALONE, **heads(2)}
    yield {**NOTHING, **CONV, **ALONE, **heads(2)}
    yield {**ATTENTION, **PLAIN, **ALONE, **heads(2)}
    yield {**ATTENTION, **CONV, **ALONE, **heads(2)}
    yield {**ATTENTION, **CONV, **ALONE, **heads(8)}
    yield {**ATTENTION, **CONV, **TAUGHT, **heads(2)}


def sweep():
    for seed in SEEDS:
        for setting in settings():
            yield {**setting, "seed": seed}
