"""Digits: eight settings. Teacher: eight settings. Three seeds each."""

SEEDS = range(3)
DIGITS = {"train.model": "@SmallImageModel()"}
HEAD_ALONE = {
    "train.rules": {"head/(kernel|bias)": "@Replace()"},
    "Groups.rules": {".*": "@head/AdamW()"},
}
EVERYTHING = {"train.rules": {".*": "@Replace()"}, "rate": 1e-2}
TEACHER = {
    "train.model": "@Student()",
    "train.data": "@ConvTeacherStudent()",
    "ConvTeacherStudent.task_seed": "%seed",
    "train.rules": {"kernel": "%adapter"},
    "train.optimizer": "@AdamW()",
    "rate": 1e-2,
    "steps": 800,
}


def lora(rank):
    """LoRA of the flattened kernel: ``r (kh kw in + out)`` numbers."""
    return {"adapter": "@LoRA()", "LoRA.rank": rank, "LoRA.alpha": 2.0 * rank}


def flora(ranks):
    """FLoRA; one number stands for it on the channels and 2 on the window."""
    return {"adapter": "@FLoRA()", "FLoRA.ranks": ranks}


def digits():
    """LoRA 201, 402, 603 numbers; FLoRA 176, 360, 576."""
    yield {**DIGITS, **HEAD_ALONE}
    for lora_rank, flora_rank in ((1, 2), (2, 4), (3, 6)):
        yield {**DIGITS, **lora(lora_rank)}
        yield {**DIGITS, **flora(flora_rank)}
    yield {**DIGITS, **EVERYTHING}


def teacher():
    """The update has ranks (1, 1, 2, 2); a Gaussian core makes it ill-conditioned."""
    for core in ("orthogonal", "gaussian"):
        task = {**TEACHER, "ConvTeacherStudent.core": core}
        yield {**task, **flora((1, 1, 2, 2))}
        yield {**task, **flora((1, 1, 3, 3))}
        yield {**task, **lora(1)}
        yield {**task, **lora(2)}


def sweep():
    for seed in SEEDS:
        for setting in (*digits(), *teacher()):
            yield {**setting, "seed": seed}
