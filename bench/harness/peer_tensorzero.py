"""TensorZero's embedded best-of-n, driven over standard input and output. Runs in a virtual environment of its own.

    python -P peer_tensorzero.py ENDPOINT MODEL NUM FOLDER

Each line is a JSON object with `messages` and `params`; each answer a JSON line with `text`, `usage` and `wall_s`, or
`error`. Its evaluator can only be a language model, so the base judges itself, its output held to the JSON asked for.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from tensorzero import TensorZeroGateway  # type: ignore[import-not-found]

_CONFIG = """
[gateway]
observability.enabled = false

[models.base]
routing = ["engine"]

[models.base.providers.engine]
type = "vllm"
model_name = "{model}"
api_base = "{endpoint}/"
api_key_location = "none"

[functions.story]
type = "chat"

[functions.story.variants.candidate]
type = "chat_completion"
model = "base"

[functions.story.variants.best]
type = "experimental_best_of_n_sampling"
candidates = [{candidates}]

[functions.story.variants.best.evaluator]
model = "base"
json_mode = "strict"
"""
_RENAMED = {"stop": "stop_sequences"}
_TAKEN = ("temperature", "top_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty", "stop")
"""The sampling parameters that its chat completions take; `logit_bias` goes in as a piece of the body."""


def main(endpoint: str, model: str, num: str, folder: str) -> None:
    candidates = ", ".join(['"candidate"'] * int(num))
    path = Path(folder) / "tensorzero.toml"
    path.write_text(_CONFIG.format(endpoint=endpoint, model=model, candidates=candidates))
    with TensorZeroGateway.build_embedded(config_file=str(path)) as gateway:
        for line in sys.stdin:
            asked = json.loads(line)
            print(json.dumps(_answer(gateway, asked["messages"], asked["params"])), flush=True)


def _answer(gateway: Any, messages: list[dict[str, Any]], params: dict[str, Any]) -> dict[str, Any]:
    taken = {_RENAMED.get(key, key): value for key, value in params.items() if key in _TAKEN}
    extra: dict[str, Any] = {}
    if "logit_bias" in params:
        extra["extra_body"] = [
            {"variant_name": "candidate", "pointer": "/logit_bias", "value": params["logit_bias"]},
        ]
    started = time.perf_counter()
    try:
        found = gateway.inference(
            function_name="story",
            variant_name="best",
            input={"messages": messages},
            params={"chat_completion": taken},
            **extra,
        )
    except Exception as exc:  # noqa: BLE001 - a peer's failure is a row of the table
        return {"error": f"{type(exc).__name__}: {exc}"[:300]}
    return {
        "text": "".join(block.text for block in found.content if block.type == "text"),
        "usage": {"prompt_tokens": found.usage.input_tokens, "completion_tokens": found.usage.output_tokens},
        "wall_s": time.perf_counter() - started,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
