"""Policies as the gateway serves them now: which model, which exact adapter versions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab_adapters.contract.errors import EngineError, NotFoundError
from trimtab_training.evaluation.prompt_file import Prompt
from trimtab_training.evaluation.settings import PolicyConfig
from trimtab_training.gateway import GatewayClient


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy that the gateway answered for.

    Attributes:
        name: In the report.
        model: In the requests.
        request: The steering that requests carry; None leaves the model's own.
        steering: What steers, as answers say it: exact versions, weights and operators; None of the base alone.
        revision: Of the route; None of the base model.
    """

    name: str
    model: str
    request: Mapping[str, Any] | None
    steering: Mapping[str, Any] | None
    revision: int | None

    @property
    def body(self) -> dict[str, Any]:
        """Fields of the request."""
        return {"model": self.model, **({} if self.request is None else {"steering": dict(self.request)})}

    @property
    def identity(self) -> str:
        """What its samples depend on, as canonical JSON; the name is no part of it."""
        parts = {"model": self.model, "request": self.request, "steering": self.steering, "revision": self.revision}
        return json.dumps(parts, sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """As in the report."""
        return {
            "name": self.name,
            "model": self.model,
            "steering_request": self.request,
            "steering": self.steering,
            "revision": self.revision,
        }


def resolve_policies(gateway: GatewayClient, configs: Sequence[PolicyConfig], prompt: Prompt) -> list[Policy]:
    """Ask the gateway what each policy is: its model list, and one token from each.

    Raises:
        NotFoundError: There is no such model.
        TrimtabError: The gateway refuses the steering.
    """
    listed = gateway.ask("GET", "/v1/models").get("data")
    if not isinstance(listed, list) or not listed:
        raise EngineError("the gateway lists no models")
    models = {str(model["id"]): model for model in listed}
    base = next((name for name, model in models.items() if model.get("parent") is None), None)
    if base is None:
        raise EngineError("the gateway lists no base model")
    return [_resolve(gateway, config, models, base, prompt) for config in configs]


def _resolve(
    gateway: GatewayClient, config: PolicyConfig, models: Mapping[str, Any], base: str, prompt: Prompt
) -> Policy:
    model = config.model or (config.name if config.steering is None else base)
    if model not in models:
        raise NotFoundError(f"the policy {config.name!r} needs a model {model!r}; there are {', '.join(models)}")
    request = config.steering
    body = {"model": model, **({} if request is None else {"steering": request})}
    answer = gateway.ask("POST", prompt.path, {**prompt.body, **body, "max_tokens": 1, "n": 1, "best_of": 1})
    return Policy(config.name, model, request, answer.get("steering"), models[model].get("revision"))
