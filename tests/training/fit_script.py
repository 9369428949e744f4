"""Runs ``fit`` on the tiny language model; started as a process of its own by the loop tests.

Arguments: run folder and a JSON object: keyword arguments of ``fit`` plus ``die_at`` (kill -9 when
that batch is asked for), ``mesh`` (axis sizes), ``processes``/``process``/``port``.
"""

import json
import os
import signal
import sys
import time

from training_fixtures import RULES, Stream, language_model

from flora_jax import training
from flora_jax.training import distributed


class Dying(Stream):
    die_at = None
    slow = 0.0

    def __next__(self):
        if self.at == self.die_at:
            wait_for_checkpoint()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.slow)
        print("batch", self.at, flush=True)
        return super().__next__()


def wait_for_checkpoint():
    """Until the background write is on disk, so that what the test resumes from is known."""
    folder = os.path.join(sys.argv[1], "checkpoints")
    for _ in range(400):
        if any(os.path.isdir(os.path.join(folder, name, "state")) for name in os.listdir(folder)):
            return
        time.sleep(0.05)


def main():
    options = json.loads(sys.argv[2])
    process, processes = options.pop("process", 0), options.pop("processes", 1)
    if processes > 1:
        port = options.pop("port")
        distributed.initialize(
            coordinator=f"127.0.0.1:{port}", processes=processes, process=process
        )
    stream = Dying(process=process, processes=processes)
    stream.die_at, stream.slow = options.pop("die_at", None), options.pop("slow", 0.0)
    mesh = options.pop("mesh", None)
    held_out = Stream(process=process, processes=processes)
    held_out = [batch for batch, _ in zip(held_out, range(2), strict=False)]
    loss, base, plan, _ = language_model(RULES)
    result = training.fit(
        loss,
        plan,
        base,
        stream,
        run_dir=sys.argv[1],
        optimizer=training.lora_plus(training.AdamW(learning_rate=1e-2), 4.0),
        mesh=training.make_mesh(mesh) if mesh else None,
        evals={"eval": held_out},
        **options,
    )
    if mesh:
        kernel = result.state.train["layers/up_proj/kernel"]
        print({name: tuple(x.sharding.spec) for name, x in kernel.items()}, flush=True)
    print("ended", result.status, int(result.state.step), flush=True)


if __name__ == "__main__":
    main()
