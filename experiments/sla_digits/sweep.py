"""Softmax, sparse-linear, sparse and linear attention; seeds outermost: one teacher serves all."""

SEEDS = range(3)
WHOLE = {".*": "@Replace()"}
# The projection starts at zero. Left there, the linear branch adds nothing and has no gradient.
SPARSE = {"layers/attention/attention/attention/proj/.*": None, **WHOLE}


def sla(variant, critical, rules):
    attention = {"student/DiTConfig.attention": "@SLA()", "SLA.variant": variant}
    return {**attention, "SLA.critical": critical, "train.rules": rules}


def settings():
    yield {"student/DiTConfig.attention": "@Softmax()"}
    yield sla("main", 0.25, WHOLE)
    for critical in (0.25, 0.125):
        yield sla("sla1", critical, WHOLE)
        yield sla("sla1", critical, SPARSE)
    linear = {"LinearAttention.feature_map": "softmax"}
    yield {"student/DiTConfig.attention": "@LinearAttention()", **linear}


def sweep():
    for seed in SEEDS:
        for setting in settings():
            yield {**setting, "seed": seed}
