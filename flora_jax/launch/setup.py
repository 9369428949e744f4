"""From the arguments of ``train`` to everything a run needs; and back from a run folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import flora_jax as flora
from flora_jax import config, quant, training
from flora_jax.adapters import PromptTuning
from flora_jax.core.errors import ConfigError, FloraError
from flora_jax.core.leaf import is_leaf
from flora_jax.core.paths import flatten
from flora_jax.evaluation import generate_text
from flora_jax.launch.calibration import Calibrator
from flora_jax.launch.subjects import Subject
from flora_jax.training import distributed, sharding
from flora_jax.training.checkpoint import Checkpointer, Identity, fingerprint
from flora_jax.training.place import Layout, place
from flora_jax.training.run_dir import RunDir, RunError


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run, built and checked; nothing is trained yet.

    Args:
      subject: the model; its ``params`` are the base as trained on (quantised, sharded).
      plan: of the adapters.
      state: step 0; its shapes and shardings in a setup that is only to be restored.
      options: the arguments of ``train``.
      mesh: where it runs, or None for one device.
      rules: sharding rules of the base.
    """

    subject: Subject
    plan: flora.Plan
    state: training.TrainState
    options: Mapping[str, Any]
    mesh: Any = None
    rules: Any = sharding.LLAMA_RULES

    @property
    def base(self) -> Any:
        return self.subject.params

    def batches(self) -> Any:
        """The training data of this process."""
        shard = (jax.process_index(), jax.process_count())
        size, seed = self.options["batch_size"], self.options["seed"]
        tokenizer = self.subject.tokenizer
        return self.options["data"].train(tokenizer, size, seed=seed, shard=shard)

    def held_out(self) -> Any:
        """Held-out batches, the same at every call."""
        size = self.options["eval_batch_size"] or self.options["batch_size"]
        limit = self.options["eval_batches"]
        shard = (jax.process_index(), jax.process_count())
        return self.options["data"].evaluation(
            self.subject.tokenizer, size, max_batches=limit, shard=shard
        )

    def bound(self, state: training.TrainState) -> Any:
        """The parameters with the adapters of a state.

        Raises:
          PlanError: weights are generated from each row's features: there is no one model.
        """
        return flora.bind(self.base, state.adapters, self.plan)

    @property
    def per_example(self) -> bool:
        """Whether weights are generated from each row's features."""
        return any(pool.adapter.per_example for pool in self.plan.pools)

    def speaking(self, state: training.TrainState) -> Any:
        """What continues a prompt: with generated weights, those for the first held-out row."""
        if not self.per_example:
            return self.bound(state)
        example = next(iter(self.held_out()))["example"][:1]
        return flora.bind(self.base, state.adapters, self.plan, example=example)

    def judge(self, state: training.TrainState) -> dict[str, float]:
        """The figures on held-out data."""
        return self._judged(state, self.plan)

    def judge_base(self) -> dict[str, float]:
        """The figures of the model without adapters."""
        nothing = dataclasses.replace(self.state, train={}, frozen={})
        return self._judged(nothing, flora.Plan(()))

    def _judged(self, state: training.TrainState, plan: flora.Plan) -> dict[str, float]:
        batches = self.held_out()
        if self.mesh is not None:
            sharded = training.batch_sharding(self.mesh)
            batches = (distributed.global_batch(batch, sharded) for batch in batches)
        evaluate = training.make_evaluator(self.subject.loss, plan)
        return self.subject.figures(evaluate(state, self.base, batches))

    def sample(self, state: training.TrainState) -> str | None:
        """What a language model continues ``prompt`` with, greedily; None for other models."""
        count = self.options["sample_tokens"]
        if not (self.subject.generates and count):
            return None
        subject, prompt = self.subject, self.options["prompt"]
        texts = generate_text(
            subject.model, self.speaking(state), subject.tokenizer, prompt, max_new_tokens=count
        )
        return prompt + texts[0]

    def trained(self) -> dict[str, int]:
        """``{path: numbers}`` that one step moves: fewer than the plan's where the optimizer masks
        a weight (LIFT) or holds a group still."""
        moved = training.moves(self.options["optimizer"], self.state.train)
        counts = {owner.path: owner.count for owner in self.plan.owners}
        found = {}
        for path, arrays in self.state.train.items():
            still = sum(math.prod(a.shape) for a in arrays.values()) - counts[path]  # padding
            found[path] = max(sum(moved[f"{path}/{name}"] for name in arrays) - still, 0)
        return found

    def table(self) -> str:
        """The plan as a table, with the trained share."""
        return self.plan.table(self.parameters, self.trained())

    @property
    def parameters(self) -> int:
        """Numbers in the base."""
        leaves = flatten(self.subject.own(self.base), is_leaf=is_leaf).values()
        return sum(math.prod(leaf.shape) for leaf in leaves)

    def identity(self) -> Identity:
        """What its checkpoints belong to."""
        return Identity(
            plan=self.plan,
            base_fingerprint=fingerprint(self.base),
            base_source=self.subject.name,
        )


def build(
    options: Mapping[str, Any], folder: Path | None = None, *, abstract: bool = False
) -> Setup:
    """Loads the model, makes plan and adapters, places them on the mesh.

    A run that has checkpoints keeps the plan it was started with (``plan.json``).

    Args:
      options: the arguments of ``train``, every one.
      folder: the run folder, for what the base needs to keep there.
      abstract: the state has shapes and shardings only, and nothing is calibrated: enough to
        restore a checkpoint or to compile a step.

    Raises:
      RuleError: a rule matches nothing.
      PlanError: an adapter does not fit its weight.
    """
    subject = options["model"].load(options["data"], folder)
    base = subject.params
    if options["base_dtype"]:
        base = training.cast_base(base, options["base_dtype"])
    if options["quantize"]:
        base = quant.quantize(base, options["quantize"])
    saved = _saved_plan(folder)
    rules = {f"{name}/.*": None for name in subject.beside} | dict(options["rules"])
    plan = saved or flora.plan(base, _with_ids(rules, subject.tokenizer))
    if not len(plan):
        raise ConfigError("train.rules gives no weight an adapter: nothing would be trained")
    setup = _on_mesh(Setup(dataclasses.replace(subject, params=base), plan, None, options))
    if abstract:
        empty = lambda s: jnp.zeros(s.shape, s.dtype)
        fresh = lambda: _state(plan, jax.tree.map(empty, plan.shapes()), options)
        layout = Layout.of(plan, setup.base, fresh, setup.mesh, setup.rules)
        return dataclasses.replace(setup, state=layout.abstract)
    calibrator = Calibrator(setup.subject, options, setup.mesh)
    plan, stats = calibrator.start(plan, move=saved is None)
    adapters = flora.init(plan, jax.random.key(options["seed"]), base, stats=stats)
    state = _state(plan, adapters, options)
    if setup.mesh is not None:
        specs = training.base_specs(setup.base, setup.mesh, setup.rules)
        state = place(state, training.state_shardings(state, plan, specs, setup.mesh))
    return dataclasses.replace(setup, plan=plan, state=state)


def _with_ids(rules: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The rules with the texts that prompts start from as token ids."""

    def one(adapter: Any) -> Any:
        if not isinstance(adapter, PromptTuning) or not adapter.text or adapter.ids:
            return adapter
        if tokenizer is None:
            raise ConfigError(f"PromptTuning.text={adapter.text!r}: the model has no tokenizer")
        return dataclasses.replace(adapter, ids=tuple(map(int, tokenizer.encode(adapter.text))))

    return {pattern: one(adapter) for pattern, adapter in rules.items()}


def _saved_plan(folder: Path | None) -> flora.Plan | None:
    """The plan of a run that has checkpoints: methods whose ranks follow the data moved them."""
    if folder is None or not any((folder / "checkpoints").glob("*")):
        return None
    path = folder / "plan.json"
    try:
        return flora.Plan.from_json(path.read_text()) if path.is_file() else None
    except FloraError as error:
        raise RunError(f"{path}: {error}") from None


def _state(plan: flora.Plan, adapters: Any, options: Mapping[str, Any]) -> training.TrainState:
    return training.create_state(plan, adapters, options["optimizer"], options["seed"])


def _on_mesh(setup: Setup) -> Setup:
    """The base on the mesh of ``train.mesh``, if any; a spec in gin is a tuple of mesh axes."""
    axes, given = setup.options["mesh"], setup.options["sharding"]
    if not axes:
        return setup
    rules = sharding.LLAMA_RULES
    if given is not None:
        rules = tuple((pattern, PartitionSpec(*spec)) for pattern, spec in given.items())
    mesh = training.make_mesh(axes)
    base = place(setup.base, training.base_shardings(setup.base, mesh, rules))
    subject = dataclasses.replace(setup.subject, params=base)
    return dataclasses.replace(setup, subject=subject, mesh=mesh, rules=rules)


def reopen(folder: str | Path, step: int | None = None) -> tuple[Setup, training.TrainState]:
    """A run from its folder alone: the setup, and the state of a checkpoint.

    Args:
      folder: the run folder.
      step: of the checkpoint; the newest by default.

    Raises:
      RunError: not a run folder, not a run of ``train``, or no such checkpoint.
    """
    folder = Path(folder)
    status = RunDir(folder).status()
    if not status or not (folder / "config.gin").is_file():
        raise RunError(f"{folder} is not a run folder: it has no status.json and config.gin")
    if status.get("entry", "train") != "train":
        raise RunError(f"{folder} is a run of {status['entry']}, not of train")
    from flora_jax.launch import catalogue
    from flora_jax.launch.train import complete

    catalogue.register_all()
    try:
        options = config.load([folder / "config.gin"]).arguments("train")
    except FloraError as error:
        raise RunError(f"{folder} does not load any more: {error}") from None
    setup = build(complete(options), folder, abstract=True)
    with Checkpointer(folder / "checkpoints", setup.identity()) as checkpoints:
        state = checkpoints.restore(setup.state, step=step)
    return setup, state
