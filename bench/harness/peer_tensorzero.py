"""TensorZero's embedded best-of-n, driven over standard input and output. Runs in a virtual environment of its own.

    python -P peer_tensorzero.py ENDPOINT MODEL NUM FOLDER

Each line is a JSON object with `messages` and `params`; each answer a JSON line with `text`, `usage` and `wall_s`, or
`error`. Its evaluator can only be a language model, so the base judges itself, its output held to the JSON asked for.
The provider is `openai` because `vllm` asks for JSON by a field that vLLM no longer reads.
"""

import json
import os
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
type = "openai"
model_name = "{model}"
api_base = "{endpoint}/"
api_key_location = "none"

[functions.story]
type = "chat"

[functions.story.variants.candidate]
type = "chat_completion"
model = "base"
{settings}

[functions.story.variants.best]
type = "experimental_best_of_n_sampling"
candidates = [{candidates}]

[functions.story.variants.best.evaluator]
model = "base"
json_mode = "strict"
"""
_SETTABLE = ("temperature", "top_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty")
"""What a variant takes by OpenAI's names. `stop` has another name there; `logit_bias` is put into the body."""


def main(endpoint: str, model: str, num: str, folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # it logs to standard output
    candidates = ", ".join(['"candidate"'] * int(num))
    path = Path(folder) / "tensorzero.toml"
    gateways: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        # Parameters of a request do not reach the candidates of best-of-n; only the configuration's do.
        settings = _settings(asked["params"])
        if settings not in gateways:
            path.write_text(_CONFIG.format(endpoint=endpoint, model=model, candidates=candidates, settings=settings))
            gateways[settings] = TensorZeroGateway.build_embedded(config_file=str(path))
        print(json.dumps(_answer(gateways[settings], asked["messages"])), file=answers, flush=True)


def _settings(params: dict[str, Any]) -> str:
    """Lines of the candidate's variant."""
    lines = [f"{name} = {json.dumps(params[name])}" for name in _SETTABLE if name in params]
    if "stop" in params:
        lines.append(f"stop_sequences = {json.dumps(params['stop'])}")
    if "logit_bias" in params:
        bias = ", ".join(f'"{token}" = {value}' for token, value in params["logit_bias"].items())
        lines.append(f'extra_body = [{{ pointer = "/logit_bias", value = {{ {bias} }} }}]')
    return "\n".join(lines)


def _answer(gateway: Any, messages: list[dict[str, Any]]) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        found = gateway.inference(function_name="story", variant_name="best", input={"messages": messages})
    except Exception as exc:  # noqa: BLE001 - a peer's failure is a row of the table
        return {"error": f"{type(exc).__name__}: {exc}"[:300]}
    return {
        "text": "".join(block.text for block in found.content if block.type == "text"),
        "usage": {"prompt_tokens": found.usage.input_tokens, "completion_tokens": found.usage.output_tokens},
        "wall_s": time.perf_counter() - started,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
