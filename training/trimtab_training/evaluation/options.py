"""The command line of `trimtab evaluate`: flags, and the configuration tree that they stand for."""

import argparse
import json
from pathlib import Path
from typing import Any

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_training.config import read_tree

_FLAGS = {
    "gateway": "gateway.url",
    "concurrency": "gateway.concurrency",
    "prompts": "prompts",
    "max_prompts": "max_prompts",
    "reward": "reward",
    "judge": "judge",
    "reference": "reference",
    "procedure": "procedures",
    "pair": "pairs",
    "samples": "samples",
    "seed": "seed",
    "common_seeds": "common_seeds",
    "max_tokens": "sampling.max_tokens",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "stop": "sampling.stop",
    "interval": "interval.method",
    "confidence": "interval.confidence",
    "work_dir": "work_dir",
    "json": "output.json_file",
    "csv": "output.csv_file",
    "plot": "output.plot_file",
}
"""Where each flag goes in the tree."""


def build_parser() -> argparse.ArgumentParser:
    """The flags. What is not given stays None, so that the configuration's own defaults hold."""
    parser = argparse.ArgumentParser(
        prog="trimtab evaluate",
        description="Compare policies behind a running gateway: win rates under inference-time procedures, and KL.",
        epilog="See docs/evaluate.md for what is estimated and how.",
    )
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="TOML or JSON configuration; flags take precedence over it")
    add("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    add("--gateway", metavar="URL", help="such as http://127.0.0.1:8000")
    add("--admin-key", help="key of the admin API (default: TRIMTAB_ADMIN_KEY); TRIMTAB_API_KEY for /v1")
    add("--prompts", type=Path, metavar="FILE", help="JSON Lines with `prompt`, `prompt_token_ids` or `messages`")
    add("--max-prompts", type=int, metavar="N", help="only the first N different prompts")
    add("--reward", metavar="NAME", help="registered reward that chooses and judges")
    add("--judge", metavar="NAME", help="another reward that judges the same choices")
    add("--policy", action="append", help="a model name, or NAME=JSON, a steering of the base model; repeatable")
    add("--reference", metavar="NAME", help="the reference policy (default: the first)")
    add(
        "--procedure",
        action="append",
        metavar="T",
        help="standard, best_of_n:N, worst_of_n:N or served:JSON; acts on both sides; repeatable",
    )
    add(
        "--pair",
        action="append",
        nargs=2,
        metavar="POLICY@T",
        help="a comparison of two sides with procedures of their own; repeatable",
    )
    add("--samples", type=int, metavar="M", help="samples per prompt and policy (default: 32)")
    add("--seed", type=int, help="all seeds follow from it (default: 0)")
    add("--common-seeds", action="store_true", default=None, help="policies share their noise")
    add("--max-tokens", type=int, metavar="N", help="longest output (default: 64)")
    add("--temperature", type=float, help="(default: 1.0)")
    add("--top-p", type=float, help="(default: 1.0)")
    add("--stop", action="append", metavar="TEXT", help="text that ends an output; repeatable")
    add("--interval", choices=["t", "bca", "percentile"], help="how errors are made (default: t)")
    add("--confidence", type=float, help="of the intervals (default: 0.95)")
    add("--concurrency", type=int, metavar="N", help="requests in flight (default: 16)")
    add("--work-dir", type=Path, metavar="DIR", help="keep samples here; an interrupted run goes on from them")
    add("--json", type=Path, metavar="FILE", help="write the report")
    add("--csv", type=Path, metavar="FILE", help="write its win rates")
    add("--plot", type=Path, metavar="FILE", help="draw win rate against KL; .png, .svg or .pdf")
    return parser


def tree_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The configuration tree: the file's, then `--set`, then the flags.

    Raises:
        InvalidRequestError: The file or a flag is malformed.
    """
    tree = {} if arguments.config is None else read_tree(arguments.config, arguments.overrides)
    if arguments.config is None and arguments.overrides:
        raise InvalidRequestError("--set changes what --config says; there is no --config")
    if arguments.policy is not None:
        tree["policies"] = [parse_policy(text) for text in arguments.policy]
    for flag, where in _FLAGS.items():
        value = getattr(arguments, flag)
        if value is not None:
            *sections, key = where.split(".")
            branch = tree
            for section in sections:
                branch = branch.setdefault(section, {})
                if not isinstance(branch, dict):
                    raise InvalidRequestError(f"the configuration's {section} is no section")
            branch[key] = value
    return tree


def parse_policy(text: str) -> dict[str, Any]:
    """A policy as the command line writes it: a model name, or `NAME=JSON` with a steering of the base model.

    Raises:
        InvalidRequestError: What follows `=` is not a JSON object.
    """
    name, separator, raw = text.partition("=")
    if not separator:
        return {"name": text}
    try:
        steering = json.loads(raw)
    except ValueError as exc:
        raise InvalidRequestError(f"the policy {text!r} is not JSON after '=': {exc}") from exc
    if not isinstance(steering, dict):
        raise InvalidRequestError(f"the policy {text!r} needs a JSON object after '='")
    return {"name": name, "steering": steering}
