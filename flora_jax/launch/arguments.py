"""Options that several commands share."""

from __future__ import annotations

import argparse
from types import ModuleType

from flora_jax import config
from flora_jax.launch import catalogue


def add_gin(parser: argparse.ArgumentParser) -> None:
    """``--gin_file``, ``--gin_search_paths``, ``--gin.NAME=VALUE`` and ``--dry_run``."""
    group = parser.add_argument_group("configuration")
    group.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a gin file; repeat it: later files win; looked up in the shipped configs too",
    )
    group.add_argument(
        "--gin.NAME=VALUE",
        dest="_",
        action="store_true",
        help="a binding, after all files; words and paths need no quotes",
    )
    add_search_paths(group)
    group.add_argument("--dry_run", action="store_true", help="print what would be done, and stop")


def add_search_paths(parser: argparse._ActionsContainer) -> None:
    """``--gin_search_paths``."""
    parser.add_argument(
        "--gin_search_paths",
        type=_paths,
        default=[],
        metavar="A,B",
        help="folders tried before the shipped configs",
    )


def _paths(text: str) -> list[str]:
    return [path for path in text.split(",") if path]


def load(arguments: argparse.Namespace) -> config.Config:
    """The configuration that a command line describes."""
    catalogue.register_all()
    return config.load(arguments.gin_file, arguments.bindings, arguments.gin_search_paths)


def parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """The parser of ``flora NAME``: a module's docstring, EXAMPLE and ``add_arguments``."""
    made = argparse.ArgumentParser(
        prog=f"flora {name}",
        description=module.__doc__,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(made)
    return made
