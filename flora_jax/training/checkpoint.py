"""Checkpoints: adapters, optimizer, step, key and loader, with proof of the plan and the base.

The base model is never saved. Its :func:`fingerprint` and source are, and a checkpoint is refused
for another plan or another base. orbax writes in the background to a temporary folder and renames.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax

from flora_jax.core import paths
from flora_jax.core.errors import ConfigError, nearest
from flora_jax.core.plan import Plan
from flora_jax.training.run_dir import RunError, disk_errors
from flora_jax.training.state import TrainState

VERSION = 1
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Two 32-bit sums over the bits of every element: plain, and weighted by position."""
    if x.dtype == jnp.bool_ or x.dtype.itemsize == 1:
        # sub-byte types too: every int4 fits an int8, every fp8 and fp4 a float32 exactly
        x = x.astype(jnp.int8 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32)
    bits = lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    weight = jnp.full(bits.shape, 0x9E3779B9, jnp.uint32)
    for axis in range(bits.ndim):
        index = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        weight = (weight ^ index) * jnp.uint32(0x85EBCA6B)
        weight = weight ^ (weight >> 15)
    mixed = bits * jnp.uint32(0xC2B2AE35)
    mixed = (mixed ^ (mixed >> 13)) * (weight | 1)
    return jnp.stack([jnp.sum(bits), jnp.sum(mixed)])


def fingerprint(params: Any) -> str:
    """Sixteen hex digits of a whole tree: paths, shapes, dtypes and every bit of the content.

    Content enters through two 32-bit integer sums per array, computed where the array lives, so a
    sharded model is not gathered; integer sums do not depend on the mesh or the order of the
    reduction. It finds any accidental difference (each single changed bit changes it); it is no
    defence against forgery.

    >>> a = {"kernel": jnp.ones((2, 3))}
    >>> fingerprint(a) == fingerprint({"kernel": jnp.ones((2, 3)).at[1, 2].set(1.0000001)})
    False
    """
    flat = paths.flatten(params)
    sums = jax.device_get({path: _checksum(jnp.asarray(x)) for path, x in flat.items()})
    digest = hashlib.sha256()
    for path in sorted(flat):
        x = flat[path]
        digest.update(f"{path} {tuple(x.shape)} {x.dtype} ".encode())
        digest.update(np.asarray(sums[path], "<u4").tobytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """What a checkpoint belongs to.

    Args:
      plan: the plan of the adapters.
      base_fingerprint: :func:`fingerprint` of the frozen base.
      base_source: where the base came from (a folder, a file, a seed), for people.
      members: ``Members.to_json`` of a state of several members, or "".
    """

    plan: Plan
    base_fingerprint: str
    base_source: str = ""
    members: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "plan": json.loads(self.plan.to_json()),
            "plan_fingerprint": self.plan.fingerprint(),
            "base": {"fingerprint": self.base_fingerprint, "source": self.base_source},
            "members": self.members,
            "versions": {
                "python": platform.python_version(),
                "jax": jax.__version__,
                "orbax": ocp.__version__,
            },
        }

    def check(self, metadata: Mapping[str, Any], where: str) -> None:
        """Raise RunError unless ``metadata`` is of the same plan and base."""
        if metadata.get("version") != VERSION:
            raise RunError(
                f"{where}: checkpoint version {metadata.get('version')} is not {VERSION}"
            )
        theirs = metadata["plan_fingerprint"]
        if theirs != self.plan.fingerprint():
            raise RunError(f"{where}: checkpoint of another plan; {self._difference(metadata)}")
        base = metadata["base"]
        if base["fingerprint"] != self.base_fingerprint:
            raise RunError(
                f"{where}: checkpoint of another base: it was trained on {base['fingerprint']} "
                f"({base['source'] or 'source unknown'}), this base is {self.base_fingerprint} "
                f"({self.base_source or 'source unknown'})"
            )

        theirs = metadata.get("members", "")
        if theirs != self.members:
            raise RunError(
                f"{where}: checkpoint of other members: {theirs or 'none'}, this run has "
                f"{self.members or 'none'}"
            )

    def _difference(self, metadata: Mapping[str, Any]) -> str:
        """The first entry in which the two plans differ."""
        rows = lambda plan: {e["path"]: e for e in plan["entries"]}  # noqa: E731
        theirs, ours = rows(metadata["plan"]), rows(json.loads(self.plan.to_json()))
        for path in sorted({*theirs, *ours}):
            if path not in theirs or path not in ours:
                which = "this run's plan" if path in ours else "the checkpoint"
                return f"only {which} adapts {path!r}"
            for key, value in ours[path].items():
                if theirs[path].get(key) != value:
                    return f"{path!r} {key}: checkpoint {theirs[path].get(key)}, run {value}"
        return f"its fingerprint is {metadata['plan_fingerprint']}"


class Checkpointer:
    """The checkpoints of one run; a context manager that waits for pending writes at exit.

    Args:
      directory: made when it is missing.
      identity: the plan and base that every checkpoint must belong to.
      keep: the last N stay.
      best: metric whose best checkpoint stays as well; None keeps only the last.
      mode: ``min`` or ``max`` of ``best``.
    """

    def __init__(
        self,
        directory: str | Path,
        identity: Identity,
        *,
        keep: int = 2,
        best: str | None = None,
        mode: str = "min",
    ):
        if keep < 1:
            raise ConfigError(f"keep={keep}: at least one checkpoint must stay")
        if mode not in ("min", "max"):
            raise ConfigError(f"mode {mode!r} is neither min nor max")
        self.directory = Path(directory).absolute()
        self.identity, self.best, self.mode = identity, best, mode
        policies = ocp.checkpoint_managers
        preserve = [policies.LatestN(keep)]
        if best is not None:
            # sorted ascending and the last kept: descending for a minimum
            preserve.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[best],
                    reverse=mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(preserve),
            cleanup_tmp_directories=True,
            best_fn=None if best is None else lambda metrics: metrics[best],
            best_mode=mode,
        )
        with disk_errors(self.directory):
            self.manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def latest(self) -> int | None:
        """The newest finished step, or None."""
        return self.manager.latest_step()

    def steps(self) -> list[int]:
        """All finished steps, ascending."""
        return sorted(self.manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the best recorded metric, or None."""
        if self.best is None:
            return None
        scored = {step: self.manager.metrics(step) for step in self.steps()}
        scored = {s: m[self.best] for s, m in scored.items() if m and self.best in m}
        pick = min if self.mode == "min" else max
        return pick(scored, key=lambda step: (scored[step], -step)) if scored else None

    def save(
        self,
        state: TrainState,
        loader: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts writing the state (and the loader's position); returns before it is on disk.

        Args:
          loader: an iterator with ``get_state``/``set_state`` (grain's), or None.
          metrics: evaluation results; ``best`` looks here.

        Raises:
          RunError: this write or the previous one met a full disk.
        """
        step = state.done
        if step in self.manager.all_steps():
            return
        # the next step donates these buffers while the writer may still read them
        state = jax.tree.map(jnp.copy, state)
        items = {
            "state": ocp.args.StandardSave(state),
            "metadata": ocp.args.JsonSave(self.identity.to_json()),
        }
        if loader is not None:
            items["loader"] = grain.checkpoint.CheckpointSave(_Loader(loader))
        recorded = dict(metrics) if metrics and self.best in metrics else None
        with disk_errors(self.directory):
            self.manager.save(step, args=ocp.args.Composite(**items), metrics=recorded)

    def restore(self, like: TrainState, loader: Any = None, step: int | None = None) -> TrainState:
        """A saved state with the structure, dtypes and shardings of ``like``.

        Args:
          like: a state or its ShapeDtypeStructs (with shardings).
          loader: set to the saved position in place.
          step: the newest by default.

        Raises:
          RunError: no such step; another plan; another base; a state of another structure.
        """
        steps = self.steps()
        step = (steps[-1] if steps else None) if step is None else step
        if step not in steps:
            near = ", ".join(nearest(str(step), map(str, steps))) or "none"
            raise RunError(f"no checkpoint of step {step} in {self.directory}; there are: {near}")
        where = f"{self.directory}/{step}"
        found = self.manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))
        self.identity.check(found["metadata"], where)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = {"state": ocp.args.StandardRestore(abstract)}
        if loader is not None:
            items["loader"] = grain.checkpoint.CheckpointRestore(_Loader(loader))
        try:
            restored = self.manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError) as error:
            text = " ".join(str(error).split())[:300]
            raise RunError(f"{where} does not fit this run (another optimizer?): {text}") from error
        return restored["state"]

    def wait(self) -> None:
        """Blocks until every started write is on disk.

        Raises:
          RunError: a write met a full disk.
        """
        with disk_errors(self.directory):
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the manager."""
        with disk_errors(self.directory):
            self.manager.close()


@dataclasses.dataclass
class _Loader:
    """Any iterator's state as JSON bytes: grain's handler writes one file per process with it."""

    iterator: Any

    def get_state(self) -> bytes:
        state = self.iterator.get_state()
        if isinstance(state, bytes):
            state = {"bytes": state.decode()}
        return json.dumps(state).encode()

    def set_state(self, data: bytes) -> None:
        state = json.loads(data)
        if set(state) == {"bytes"}:
            state = state["bytes"].encode()
        self.iterator.set_state(state)

    def start_prefetch(self) -> None:
        if hasattr(self.iterator, "start_prefetch"):
            self.iterator.start_prefetch()
