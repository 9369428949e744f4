"""Schedules in closed form; optimizers against optax; groups by path rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flora_jax import training
from flora_jax.core.errors import ConfigError, RuleError
from flora_jax.training import optim

PATHS = {"layers/q/kernel": {"a": (4, 2), "b": (2, 4)}, "layers/v/kernel": {"a": (4, 2), "m": (4,)}}


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        PATHS,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(optimizer, steps=3):
    params = tree()
    tx = optim.build(optimizer, params)
    state = tx.init(params)
    for i in range(steps):
        updates, state = tx.update(tree(i + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a, b)


REFERENCES = [
    (
        training.AdamW(learning_rate=0.1, weight_decay=0.2, b1=0.8, nesterov=True),
        optax.adamw(0.1, b1=0.8, weight_decay=0.2, nesterov=True),
    ),
    (training.SGD(learning_rate=0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)),
    (
        training.SGD(learning_rate=0.1, weight_decay=0.2),
        optax.chain(optax.add_decayed_weights(0.2), optax.sgd(0.1)),
    ),
    (
        training.RMSprop(learning_rate=0.1, weight_decay=0.2),
        optax.chain(
            optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False),
            optax.add_decayed_weights(0.2),
            optax.scale(-0.1),
        ),
    ),
    (training.Lion(learning_rate=0.1, weight_decay=0.2), optax.lion(0.1, weight_decay=0.2)),
    (
        training.Adafactor(learning_rate=0.1, min_dim_size_to_factor=2),
        optax.adafactor(0.1, min_dim_size_to_factor=2, multiply_by_parameter_scale=False),
    ),
]


@pytest.mark.parametrize("ours,theirs", REFERENCES, ids=lambda x: type(x).__name__)
def test_optimizers_are_optax(ours, theirs):
    assert_same(run(ours)[0], run(theirs)[0])


@pytest.mark.interop
@pytest.mark.parametrize("momentum, centered", [(0.0, False), (0.5, False), (0.5, True)])
def test_rmsprop_is_torchs(momentum, centered):
    """Where eps stands, v starts at zero and momentum comes after the quotient."""
    torch = pytest.importorskip("torch")
    how = {"momentum": momentum, "centered": centered}
    flat = jax.tree.leaves(tree())
    params = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in flat]
    theirs = torch.optim.RMSprop(params, lr=0.1, alpha=0.99, eps=1e-8, **how)
    for i in range(3):
        for param, grad in zip(params, jax.tree.leaves(tree(i + 1))):
            param.grad = torch.tensor(np.asarray(grad))
        theirs.step()
    got = jax.tree.leaves(run(training.RMSprop(learning_rate=0.1, **how))[0])
    assert_same(got, [p.detach().numpy() for p in params])


def test_sgd_decay_is_decoupled_from_momentum():
    params, _ = run(training.SGD(learning_rate=0.1, weight_decay=0.2, momentum=0.9), steps=1)
    start, grads = tree(), tree(1)
    assert_same(params, jax.tree.map(lambda p, g: p - 0.1 * (g + 0.2 * p), start, grads))


def test_decay_only_where_a_rule_says():
    decayed, _ = run(training.AdamW(weight_decay=1.0, decay=(".*/a",)))
    plain, _ = run(training.AdamW())
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), decayed, plain)
    assert moved == {
        "layers/q/kernel": {"a": True, "b": False},
        "layers/v/kernel": {"a": True, "m": False},
    }
    with pytest.raises(RuleError, match="matches nothing"):
        run(training.AdamW(weight_decay=1.0, decay=(".*/zz",)))


def test_schedules():
    cosine = training.Cosine(peak=1.0, floor=0.1, steps=10)
    for t in range(13):
        reference = optax.cosine_decay_schedule(1.0, 10, alpha=0.1)(t)
        np.testing.assert_allclose(cosine(t), reference, rtol=1e-5)
    warm = training.Warmup(steps=4, then=training.Linear(start=2.0, end=0.0, steps=4))
    rates = [float(warm(t)) for t in range(9)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0]
    with pytest.raises(ConfigError, match="Cosine.steps=0"):
        training.Cosine(peak=1.0, steps=0)


def test_learning_rate_is_reported_per_group():
    schedule = training.Linear(start=1.0, end=0.0, steps=4)
    _, state = run(training.SGD(learning_rate=schedule), steps=3)
    rates = training.learning_rates(state)
    assert {k: float(v) for k, v in rates.items()} == {"lr": 0.5}
    _, state = run(training.lora_plus(training.SGD(learning_rate=schedule), 8.0), steps=3)
    rates = {k: float(v) for k, v in training.learning_rates(state).items()}
    assert rates == {"lr/.*/b": 4.0, "lr/.*": 0.5}


def test_lora_plus_is_plain_adam_with_two_rates():
    both, _ = run(training.lora_plus(training.AdamW(learning_rate=1e-2), 16.0))
    slow, _ = run(optax.adam(1e-2))
    fast, _ = run(optax.adam(16e-2))
    q = "layers/q/kernel"
    assert_same(both[q], {"a": slow[q]["a"], "b": fast[q]["b"]})
    assert_same(both["layers/v/kernel"], slow["layers/v/kernel"])


def test_first_rule_wins_and_none_freezes():
    groups = training.Groups(
        rules=((".*/q/.*/b", None), (".*/b|.*/a", training.SGD()), (".*/m", optax.sgd(1.0)))
    )
    params, _ = run(groups)
    start = tree()
    assert jnp.array_equal(params["layers/q/kernel"]["b"], start["layers/q/kernel"]["b"])
    assert not jnp.array_equal(params["layers/v/kernel"]["m"], start["layers/v/kernel"]["m"])


@pytest.mark.parametrize(
    "rules,message",
    [
        ({".*/a": training.SGD()}, "'layers/q/kernel/b' .of 2. belongs to no optimizer group"),
        ({".*": training.SGD(), ".*/zz": training.SGD()}, "'.*/zz' matches nothing"),
        ({".*": training.SGD(), ".*/a": training.SGD()}, "'.*/a' is never reached: '.*' comes"),
        ([(".*", training.SGD()), (".*", training.Lion())], "'.*' is never reached"),
    ],
)
def test_groups_refuse(rules, message):
    with pytest.raises(RuleError, match=message.replace("*", r"\*")):
        optim.build(training.Groups(rules=rules), tree())


def test_not_an_optimizer():
    with pytest.raises(ConfigError, match="is not an optimizer"):
        training.Groups(rules={".*": 3})
    with pytest.raises(ConfigError, match="neither a number nor a Schedule"):
        run(training.AdamW(learning_rate="fast"))
