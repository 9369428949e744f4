"""Sixteen settings, five seeds each; seeds outermost, so that a stopped sweep has whole seeds."""

SEEDS = range(5)
HEAD_ALONE = {
    "train.rules": {"classifier/(kernel|bias)": "@Replace()"},
    "Groups.rules": {".*": "@head/AdamW()"},
}
EVERYTHING = {"train.rules": {".*": "@Replace()"}, "rate": 2e-3}


def rate(count):
    """The largest adapters need a lower learning rate, whichever the method; see README.md."""
    return {"rate": 1e-2} if count >= 1024 else {}


def settings():
    """Bindings of a setting, by numbers a 64x64 matrix: ``k + l``, ``128 r``, ``128 r + r^2``."""
    yield HEAD_ALONE
    for count in (32, 64, 128, 256, 512, 1024):
        nola = {"NOLA.rank": 4, "NOLA.k": count // 2, "NOLA.l": count // 2}
        yield {"adapter": "@NOLA()", **nola, **rate(count)}
    for rank in (1, 2, 4, 8):
        lora = {"LoRA.rank": rank, "LoRA.alpha": 2.0 * rank}
        yield {"adapter": "@LoRA()", **lora, **rate(128 * rank)}
    for rank in (1, 2, 4, 8):
        yield {"adapter": "@FLoRA()", "FLoRA.ranks": rank, **rate(128 * rank)}
    yield EVERYTHING


def sweep():
    for seed in SEEDS:
        for setting in settings():
            yield {**setting, "seed": seed}
