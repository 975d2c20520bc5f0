"""Best-of-N side by side: Trimtab, optillm, its_hub's library and TensorZero on one engine.

    python bench/peers_best_of_n.py --venvs /tmp/peers --json peers.json

Each peer runs in a virtual environment of its own under `--venvs`, made there when it is missing; one that cannot be
installed or started is a row that says why. Between peers and engine stands a proxy that counts calls and tokens.
Trimtab and its_hub choose by the same classifier of sentiment, in Trimtab's gateway; the other two have the model
judge its own candidates, since that is all that they offer. All are asked for chat, one request at a time, in turns.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import peers, services
from harness.best_of_n_world import REWARD
from harness.classifier import classifier
from harness.completions import Completions
from harness.counting_proxy import CountingProxy, counting_proxy
from harness.peer_measures import PROBE, Tally, honoured
from harness.peer_venvs import ITS_HUB, OPTILLM, TENSORZERO, PeerMissingError, peer_python
from harness.report import as_table, describe_machine
from harness.story_prompts import openings
from trimtab_adapters.contract.rewards import RewardInput, RewardSpec
from trimtab_server.rewards.classifier import ClassifierReward

_TEMPLATE = "{% for m in messages if m.content %}{{ m.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
"""The base has none of its own. A chat of one message is its text."""
_LONG_CONTEXT = ('--hf-overrides={"max_position_embeddings": 2048}', "--max-model-len=2048")
"""TensorZero shows all candidates to its judge at once, which is more than the base was trained for."""
_HARNESS = Path(__file__).parent / "harness"

_ALWAYS = ("one sample", "trimtab")
Started = Callable[[], "contextlib.AbstractContextManager[peers.Peer]"]


def main(argv: list[str]) -> int:
    options = _parse(argv)
    services.stop_on_sigterm()
    directory = options.classifier or classifier(options.data, options.start)
    spec = RewardSpec(name=REWARD, kind="hf_classifier", target=str(directory))
    reward = ClassifierReward.load(spec)
    prompts = openings(options.data, options.prompts)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        proxy, gateway_url = stack.enter_context(_servers(options, folder, spec))
        systems, rows = _start_all(stack, options, folder, proxy, gateway_url)
        tallies = _ask_all(systems, proxy, prompts, options, rows)
        for system, tally in tallies.items():
            scores = reward.score([RewardInput(prompt=p, output=t) for p, t in zip(prompts, tally.texts, strict=True)])
            rows[system] |= tally.figures() | {"mean_reward": sum(scores) / len(scores)}
    print(_table(rows))
    if options.json:
        result = {"machine": describe_machine(), "options": {k: str(v) for k, v in vars(options).items()}, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache" / "trimtab" / "bench" / "peers")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=["optillm", "its_hub", "tensorzero"])
    parser.add_argument("--base", type=Path, default=Path("../shared/models/base7m"))
    parser.add_argument("--classifier", type=Path, help="of a reward that is there already")
    parser.add_argument("--start", type=Path, default=Path("../shared/models/small2m"), help="of the classifier")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


@contextlib.contextmanager
def _servers(options: argparse.Namespace, folder: Path, spec: RewardSpec) -> Iterator[tuple[CountingProxy, str]]:
    """Engine, proxy before it, and the gateway before that; yields the last two."""
    template = folder / "template.jinja"
    template.write_text(_TEMPLATE)
    with (
        services.engine(
            options.base, folder / "engine.log", f"--chat-template={template}", *_LONG_CONTEXT, nice=10
        ) as engine_url,
        counting_proxy(engine_url) as proxy,
        services.gateway(proxy.url, folder / "gateway") as gateway_url,
        Completions(gateway_url) as gateway,
    ):
        gateway.post("/admin/rewards", spec.model_dump())
        yield proxy, gateway_url


def _start_all(
    stack: ExitStack, options: argparse.Namespace, folder: Path, proxy: CountingProxy, gateway_url: str
) -> tuple[dict[str, peers.Peer], dict[str, dict[str, Any]]]:
    """What could be started, and a row for everything, with the reason where it could not."""
    num = options.candidates
    score_url = f"{gateway_url}/admin/rewards/{REWARD}/score"

    def library(name: str, requirement: Any, *arguments: str) -> Any:
        python = peer_python(requirement, options.venvs)
        return peers.script(
            python, _HARNESS / f"peer_{name}.py", [f"{proxy.url}/v1", services.MODEL, *arguments], folder
        )

    starts: dict[str, Started] = {
        "one sample": lambda: peers.one_sample(gateway_url),
        "trimtab": lambda: peers.trimtab(gateway_url, num),
        "optillm": lambda: peers.optillm(peer_python(OPTILLM, options.venvs), proxy.url, num, folder),
        "its_hub": lambda: library("its_hub", ITS_HUB, str(num), score_url),
        "tensorzero": lambda: library("tensorzero", TENSORZERO, str(num), str(folder)),
    }
    systems: dict[str, peers.Peer] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, start in starts.items():
        if name in (*_ALWAYS, *options.peers):
            rows[name] = {}
            try:
                systems[name] = stack.enter_context(start())
            except PeerMissingError as exc:
                rows[name]["failed"] = str(exc)
    return systems, rows


def _ask_all(
    systems: dict[str, peers.Peer],
    proxy: CountingProxy,
    prompts: list[str],
    options: argparse.Namespace,
    rows: dict[str, dict[str, Any]],
) -> dict[str, Tally]:
    """The probe of parameters first, which warms up as well; then all prompts, the peers in turns."""
    for name, system in list(systems.items()):
        proxy.take()
        try:
            answer = system.ask([{"role": "user", "content": prompts[0]}], PROBE)
        except RuntimeError as exc:
            rows[name]["failed"] = str(exc)
            del systems[name]
            continue
        rows[name]["honoured"] = honoured(answer, proxy.take(), options.candidates)
    tallies = {name: Tally() for name in systems}
    names = list(systems)
    for i, prompt in enumerate(prompts):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            proxy.take()
            # No seed: where it can be set at all, two of the peers give it to every candidate.
            params = {"max_tokens": options.max_tokens, "temperature": 1.0}
            answer = systems[name].ask([{"role": "user", "content": prompt}], params)
            tallies[name].add(answer, proxy.take())
    return tallies


def _table(rows: dict[str, dict[str, Any]]) -> str:
    header = ["system", "ms, median", "upstream calls", "mean reward", "parameters", "completion usage", "prompt usage"]
    body = []
    for name, row in rows.items():
        if "failed" in row:
            body.append([name, f"not measured: {row['failed']}", *[""] * 5])
            continue
        body.append(
            [
                *(name, f"{row['median_s'] * 1e3:.0f}", f"{row['upstream_calls']:g}", f"{row['mean_reward']:.2f}"),
                f"{len(row['honoured'])} of {len(PROBE)}",
                *(f"right in {row[key]:.0%}" for key in ("completion_tokens_right", "prompt_tokens_right")),
            ]
        )
    return as_table(header, body)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
