"""``fit`` in this process: non-finite stops, early stopping, evaluations, data, folders."""

import io
import itertools
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_fixtures import Stream, language_model

import flora_jax as flora
from flora_jax import training
from flora_jax.core.errors import ConfigError
from flora_jax.training import RunDir, RunError
from flora_jax.training.metrics import MetricWriter, Progress, TensorBoard

PLAIN = {"layers/up_proj/kernel": flora.LoRA(rank=2, alpha=4.0)}


@pytest.fixture(scope="module")
def problem():
    return language_model(PLAIN)


@pytest.fixture
def fit(problem, tmp_path):
    """``fit`` on the tiny model with quiet defaults."""
    loss, base, plan, _ = problem

    def call(data=None, loss=loss, **options):
        defaults = {
            "steps": 4,
            "log_every": 1,
            "run_dir": tmp_path / "run",
            "progress": False,
            "optimizer": training.SGD(learning_rate=0.1),
        }
        stream = Stream() if data is None else data
        return training.fit(loss, plan, base, stream, **{**defaults, **options})

    return call


def test_nonfinite_stops_with_step_and_paths(problem, fit, tmp_path):
    loss = problem[0]

    def poisoned(bound, batch, rng, train):
        total, weight, aux = loss(bound, batch, rng, train)
        leaf = bound["layers"]["up_proj"]["kernel"].bound[0].params["a"]
        return total + jnp.sum(batch["poison"]) * jnp.sum(leaf), weight, aux

    class Broken(Stream):
        def __next__(self):
            batch = super().__next__()
            poison = np.full((8,), np.nan if self.at == 7 else 0.0, np.float32)
            return {**batch, "poison": poison}

    with pytest.raises(RunError) as caught:
        fit(Broken(), poisoned, steps=20, save_every=2)
    message = str(caught.value)
    assert message.startswith("step 7: loss nan, gradients not finite in layers/up_proj/kernel/a;")
    assert message.endswith("last good checkpoint: step 6")
    status = RunDir(tmp_path / "run").status()
    assert status["state"] == "failed" and "step 7" in status["error"]
    steps = [line["step"] for line in RunDir(tmp_path / "run").metrics()]
    assert steps == [1, 2, 3, 4, 5, 6]
    # with sane data the run goes on from the good checkpoint
    assert int(fit(steps=8).state.step) == 8


def test_early_stopping_and_best(fit, tmp_path):
    scores = itertools.chain([3.0, 2.0, 5.0, 4.0, 6.0], itertools.repeat(9.0))
    options = {
        "evals": {"dev": lambda state, base: {"score": next(scores)}},
        "eval_every": 2,
        "best": "dev/score",
        "keep": 1,
        "steps": 40,
        "early_stopping": training.EarlyStopping(metric="dev/score", patience=3),
    }
    result = fit(**options)
    assert (result.status, result.reason) == ("done", "early stopping")
    assert int(result.state.step) == 10
    saved = {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()}
    assert saved == {4, 10}
    lines = RunDir(tmp_path / "run").metrics()
    assert [x["dev/score"] for x in lines if "dev/score" in x] == [3.0, 2.0, 5.0, 4.0, 6.0]
    again = fit(**options)
    assert again.reason == "early stopping" and int(again.state.step) == 10


def test_eval_over_batches_logs_the_mean(problem, fit, tmp_path):
    loss, base, plan, _ = problem
    held_out = [batch for batch, _ in zip(Stream(), range(2), strict=False)]
    result = fit(evals={"eval": held_out}, eval_every=4)
    expected = training.make_evaluator(loss, plan)(result.state, base, held_out)
    last = RunDir(tmp_path / "run").metrics()[-1]
    assert last["eval/loss"] == expected["loss"] and last["eval/accuracy"] == expected["accuracy"]


def test_exhausted_data_ends_the_run(fit, tmp_path):
    result = fit(Stream(limit=3), steps=9)
    assert (result.reason, int(result.state.step)) == ("data exhausted", 3)
    assert RunDir(tmp_path / "run").status()["state"] == "done"


def test_grain_data_set_resumes(problem, fit, tmp_path):
    stream = Stream()
    rows = [{k: v[0] for k, v in next(stream).items()} for _ in range(12)]
    data = grain.MapDataset.source(rows).shuffle(3).repeat(None).to_iter_dataset().batch(4)
    straight = fit(data, steps=6, run_dir=tmp_path / "straight")
    fit(data, steps=3)
    resumed = fit(data, steps=6)
    assert resumed.metrics["loss"] == straight.metrics["loss"]
    jax.tree.map(np.testing.assert_array_equal, resumed.state.adapters, straight.state.adapters)


def test_plain_iterables_are_skipped_forward(fit, tmp_path):
    batches = [batch for batch, _ in zip(Stream(), range(6), strict=False)]
    straight = fit(batches, steps=6, run_dir=tmp_path / "straight")
    fit(batches, steps=3)
    assert fit(batches, steps=6).metrics["loss"] == straight.metrics["loss"]


def test_another_run_in_the_folder_is_refused(fit, tmp_path):
    fit(steps=1, identity="one")
    status = (tmp_path / "run" / "status.json").read_text()
    with pytest.raises(RunError, match="already holds another run .its identity is 'one'"):
        fit(steps=2, identity="two")
    with pytest.raises(RunError, match="already holds a run"):
        fit(steps=2, identity="one", resume=False)
    assert (tmp_path / "run" / "status.json").read_text() == status
    assert int(fit(steps=2, identity="one").state.step) == 2


def test_given_adapters_survive_donation(problem, fit):
    adapters = problem[3]
    before = jax.tree.map(np.array, adapters)
    result = fit(steps=1, adapters=adapters)
    jax.tree.map(np.testing.assert_array_equal, adapters, before)
    assert not jnp.array_equal(
        result.adapters["layers/up_proj/kernel"]["b"], before["layers/up_proj/kernel"]["b"]
    )


def test_plain_lines_when_not_a_terminal(fit, capsys):
    fit(steps=3, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["step 1/3", "step 2/3", "step 3/3"]
    assert "tokens/s" in lines[2] and "eta 0:00:00" in lines[2] and "loss" in lines[0]
    assert lines[3] == "done at step 3: steps"


def test_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    bar = Progress(4, 1, Terminal())
    bar.advance(3)
    bar.report(3, {"loss": 1.25, "perf/tokens_per_s": 1e6, "perf/seconds_per_step": 0.1})
    bar.say("note")
    bar.close()
    text = bar.file.getvalue()
    assert "3/4" in text and "loss 1.2500 1,000,000 tokens/s" in text and "note\n" in text


@pytest.mark.skipif(not TensorBoard.installed(), reason="tensorboard is not installed")
def test_tensorboard_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricWriter(RunDir.claim(tmp_path / "r"))
    writer.write(3, {"loss": 0.5, "note": "nan"})
    writer.close()
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    (scalar,) = events.Scalars("loss")
    assert (scalar.step, scalar.value) == (3, 0.5)


def test_wrong_arguments(fit):
    for options, message in (
        ({"steps": 0}, "steps=0"),
        ({"best": "eval/loss"}, "evals and eval_every go together"),
        ({"keep": 0}, "keep=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit(**options)
    with pytest.raises(ConfigError, match="no metric 'eval/los'; the evals give eval/x"):
        fit(evals={"eval": lambda s, b: {"x": 1}}, eval_every=1, best="eval/los")


def test_metrics_are_strict_json(tmp_path):
    run = RunDir.claim(tmp_path / "r")
    run.append_metrics(1, {"loss": np.float32(0.1), "bad": float("nan"), "n": jnp.int32(3)})
    (line,) = run.metrics_path.read_text().splitlines()
    values = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert values == {"step": 1, "loss": float(np.float32(0.1)), "bad": "nan", "n": 3}
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 2, "lo')  # a kill in the middle of a line
    assert [x["step"] for x in run.metrics()] == [1]
    run.rewind_metrics(1)
    assert run.metrics_path.read_text() == line + "\n"
    run.append_metrics(2, {"loss": 1.0})
    assert [x["step"] for x in run.metrics()] == [1, 2]
    run.metrics_path.write_text("step 1\n")
    with pytest.raises(RunError, match="metrics.jsonl line 1 is not JSON"):
        run.metrics()


def test_full_disk_is_one_clear_line(tmp_path):
    run = RunDir.claim(tmp_path / "r")
    run.metrics_path.symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"disk full while writing .*metrics.jsonl: \d+ MiB free"):
        run.append_metrics(1, {"loss": 1.0})


def test_status_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = RunDir.claim(tmp_path / "r", identity="x")
    before = run.status()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(RunError, match="disk full while writing .*status.json"):
        run.write_status(state="running")
    assert run.status() == before
    assert [p.name for p in run.path.iterdir()] == ["status.json"]
    with pytest.raises(RunError, match="run state 'asleep' is not one of"):
        run.write_status(state="asleep")
