"""Training runs through a scripted gateway, and the log that it exports."""

import json
from typing import Any


def gateway_config(make_config: Any, **changes: Any) -> Any:
    """The configuration of a small run whose rollouts, rewards and route are the gateway's."""
    sections = {
        "gateway": {"url": "http://gateway"},
        "reward": {"source": "gateway"},
        "fresh": {"source": "gateway", "model": "tiny", "prompts_per_round": 4},
        "logged": {"enabled": True, "route": "tiny"},
        "publish": {"name": "lucky", "route": "kind", "require_gate": False},
        "sampling": {"max_tokens": 4},
    }
    return make_config(**{**sections, **changes})


def logged(num: int, **fields: Any) -> list[str]:
    """Lines of the log's export: rollouts of 20 prompts in turn."""
    return [
        json.dumps(
            {
                "id": f"r{i}",
                "request_id": f"q{i}",
                "created_at": float(i),
                "duration_s": 0.1,
                "route": "tiny",
                "base_model": "tiny",
                "endpoint": "completions",
                "prompt": f"t{1 + i % 20}",
                "prompt_token_ids": [1 + i % 20],
                "output_text": "t7 t8" if i % 3 == 0 else "t9 t8",
                "output_token_ids": [7, 8] if i % 3 == 0 else [9, 8],
                "steering": [],
                "finish_reason": "stop",
                **fields,
            }
        )
        for i in range(num)
    ]
