"""A tiny experiment: a "run" computes a noisy score, so that the mechanism is tested alone."""

import random
import time

from flora_jax import config

entry = "toy"


def toy(
    *, slope: float, seed: int = 0, pause: float = 0.0, fail: bool = False, out: str | None = None
):
    if fail:
        raise ValueError(f"told to fail\nwith slope {slope}")
    time.sleep(pause)
    print(f"slope {slope}")
    noise = random.Random(seed).uniform(-0.1, 0.1)
    return {"score": 10.0 * slope + noise, "seconds": 1.0}


config.entry_point(toy)


def sweep():
    for slope in (1.0, 2.0):
        for seed in range(3):
            yield {"toy.slope": slope, "toy.seed": seed}
