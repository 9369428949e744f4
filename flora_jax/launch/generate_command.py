"""Continues a prompt with a trained run, or with a model as it is; text streams as it comes."""

from __future__ import annotations

import argparse
import sys

import jax

from flora_jax.core.errors import ConfigError
from flora_jax.evaluation import Sampling, stream_text
from flora_jax.launch.setup import reopen
from flora_jax.launch.subjects import open_model

EXAMPLE = 'flora generate --run runs/kjv --prompt "In the beginning" --temperature 0.8'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="the run folder")
    source.add_argument("--model", metavar="NAME", help="a named model, folder or GGUF file")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--prompt", required=True, help="what to continue")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    parser.add_argument("--max_tokens", type=int, default=64, help="new tokens (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top_k", type=int, default=0, help="only the k likeliest (0: all)")
    parser.add_argument("--top_p", type=float, default=1.0, help="only the likeliest up to p")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")


def run(options: argparse.Namespace) -> int:
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    model, params, tokenizer = _load(options)
    prompt = options.prompt
    if options.chat:
        prompt = tokenizer.apply_chat([{"role": "user", "content": prompt}])
    else:
        sys.stdout.write(prompt)
    pieces = stream_text(
        model,
        params,
        tokenizer,
        prompt,
        max_new_tokens=options.max_tokens,
        sampling=sampling,
        key=jax.random.key(options.seed),
    )
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _load(options: argparse.Namespace) -> tuple:
    if options.model:
        return open_model(options.model, "float32", {})
    setup, state = reopen(options.run, options.step)
    subject = setup.subject
    if not subject.generates:
        raise ConfigError(f"{options.run}: {subject.name} is a classifier; try flora eval")
    return subject.model, setup.speaking(state), subject.tokenizer
