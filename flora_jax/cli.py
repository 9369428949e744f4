"""The command ``flora``: one module of ``flora_jax.launch`` a command, imported when called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from flora_jax.core.errors import ConfigError, FloraError, unknown
from flora_jax.launch import arguments

# name -> (module of flora_jax.launch, what it does)
COMMANDS = {
    "quickstart": ("quickstart_command", "fine-tune a small language model twice and compare"),
    "train": ("train_command", "adapt a model to data"),
    "eval": ("eval_command", "judge a trained run again"),
    "generate": ("generate_command", "continue a prompt with a trained run"),
    "merge": ("merge_command", "fold a run's adapter into its base, save the model"),
    "convert": ("convert_command", "convert checkpoints: hf, gguf, flora, peft; adapters to LoRA"),
    "extract": ("extract_command", "a LoRA from a base and a tuned checkpoint"),
    "quantize": ("quantize_command", "round a model's weights to low bits"),
    "sweep": ("sweep_command", "run every run of an experiment that is not finished"),
    "table": ("table_command", "print an experiment's table and check its claims"),
    "bench": ("bench_command", "run a benchmark"),
    "plan": ("plan_command", "show what would be trained, and XLA's cost of a step"),
    "methods": ("methods_command", "list the registered methods with paper and arXiv id"),
}


def split_bindings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates ``--gin.NAME=VALUE`` words from the rest.

    >>> split_bindings(["train", "--gin.LoRA.rank=8", "--dry_run"])
    (['train', '--dry_run'], ['LoRA.rank=8'])
    """
    prefix = "--gin."
    rest = [word for word in argv if not word.startswith(prefix)]
    return rest, [word.removeprefix(prefix) for word in argv if word.startswith(prefix)]


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {about}" for name, (_, about) in COMMANDS.items()]
    return "commands:\n" + "\n".join(lines) + "\n\nflora COMMAND --help shows its options."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit status. Bad input is one line on stderr, status 1."""
    words, bindings = split_bindings(sys.argv[1:] if argv is None else argv)
    top = argparse.ArgumentParser(
        prog="flora",
        description="Parameter-efficient training as arithmetic on parameter pytrees, in JAX.",
        epilog=_overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="flora COMMAND [options]",
    )
    top.add_argument("--version", action="store_true", help="print versions and exit")
    top.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    top_words = words[:1]
    try:
        options = top.parse_args(top_words)
        if options.version:
            print(_versions())
            return 0
        if options.command is None:
            top.print_help()
            return 2
        if options.command not in COMMANDS:
            raise ConfigError(unknown("command", options.command, COMMANDS))
        module = importlib.import_module(f"flora_jax.launch.{COMMANDS[options.command][0]}")
        chosen = arguments.parser(options.command, module).parse_args(words[1:])
        chosen.bindings = bindings
        return module.run(chosen) or 0
    except FloraError as error:
        if os.environ.get("FLORA_TRACEBACK"):
            raise
        print(f"flora: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("flora: interrupted", file=sys.stderr)
        return 130


def _versions() -> str:
    import jax

    import flora_jax

    python = sys.version.split()[0]
    return f"flora_jax {flora_jax.__version__} (jax {jax.__version__}, Python {python})"
