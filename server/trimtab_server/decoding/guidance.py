"""From a negative prompt to the token ids that the engine needs."""

import json
from typing import Any

from trimtab_adapters.contract.engine_api import EngineStatus
from trimtab_adapters.contract.errors import EngineRequestError, InvalidRequestError
from trimtab_adapters.contract.params import Guidance, SteeringOptions
from trimtab_server.decoding.shared_lookup import SharedLookup
from trimtab_server.engine.base import Endpoint, Engine
from trimtab_server.engine.residency import Residency

PARAM = "steering.negative_prompt"

MAX_KEPT_TOKENS = 1_000_000
"""Token ids of negative prompts to remember, all together."""

_CHAT_TEMPLATE_FIELDS = ("chat_template", "chat_template_kwargs", "add_special_tokens")


class GuidanceResolver:
    """Turns negative prompts into token ids, each only once.

    Args:
        engine: Its tokenizer and chat template are asked.
        residency: Knows what the engine can do.
    """

    def __init__(self, engine: Engine, residency: Residency) -> None:
        self._engine = engine
        self._residency = residency
        self._lookup: SharedLookup[str, tuple[int, ...]] = SharedLookup(
            self._tokenize, max_weight=MAX_KEPT_TOKENS, weigh=len
        )

    async def resolve(self, options: SteeringOptions, endpoint: Endpoint, body: dict[str, Any]) -> Guidance | None:
        """The guidance that a request asks for; None without a negative prompt.

        Args:
            options: Of the request and its route.
            endpoint: Completions take text or ids, chat completions messages.
            body: The engine's request body. Texts get special tokens, and messages the chat template, as its prompt.

        Raises:
            InvalidRequestError: It is of the wrong kind or too long, has no tokens or ids that the model does not
                have, or the engine cannot do it.
            EngineError: The engine could not be asked, or refused to tokenise it.
        """
        prompt, scale = options.negative_prompt, options.scale
        if prompt is None or scale is None:
            return None
        question = _question(prompt, endpoint, body)
        status = self._residency.last_status or await self._engine.status()
        if not status.can_guide:
            raise InvalidRequestError(
                "This engine cannot steer away from a negative prompt: its base model cannot run a second time beside "
                "itself, as its own expert. The engine's log says why.",
                param=PARAM,
                code="unsupported_parameter",
            )
        if isinstance(question, list):
            token_ids = question
        else:
            token_ids = list(await self._lookup.get(json.dumps(question, sort_keys=True)))
        _check(token_ids, status, body)
        return Guidance(token_ids=token_ids, scale=scale)

    async def _tokenize(self, question: str) -> tuple[int, ...]:
        try:
            return tuple((await self._engine.post("/tokenize", json.loads(question)))["tokens"])
        except EngineRequestError as exc:
            raise EngineRequestError(
                exc.message, engine_status=exc.engine_status, error={**exc.error, "param": PARAM}
            ) from exc


def _question(prompt: object, endpoint: Endpoint, body: dict[str, Any]) -> list[int] | dict[str, Any]:
    """The body of `/tokenize`, or the ids themselves."""
    is_text = isinstance(prompt, str)
    is_messages = isinstance(prompt, list) and not isinstance(prompt[0], int)
    if endpoint == "completions":
        if is_messages:
            raise InvalidRequestError(
                f"'{PARAM}' of a completion is a text or an array of token ids; messages are for chat completions.",
                param=PARAM,
                code="invalid_type",
            )
        if is_text:
            return {"prompt": prompt, "add_special_tokens": body.get("add_special_tokens", True)}
        assert isinstance(prompt, list)
        return prompt
    if not is_messages:
        raise InvalidRequestError(
            f"'{PARAM}' of a chat completion is an array of messages, such as "
            '[{"role": "system", "content": "..."}, {"role": "user", "content": "..."}]; send messages.',
            param=PARAM,
            code="invalid_type",
        )
    assert isinstance(prompt, list)
    rendering = {name: body[name] for name in _CHAT_TEMPLATE_FIELDS if name in body}
    return {"messages": [message.model_dump() for message in prompt], "add_generation_prompt": True, **rendering}


def _check(token_ids: list[int], status: EngineStatus, body: dict[str, Any]) -> None:
    if not token_ids:
        raise InvalidRequestError(f"Invalid '{PARAM}': it has no tokens.", param=PARAM, code="invalid_value")
    if max(token_ids) >= status.vocab_size:
        raise InvalidRequestError(
            f"Invalid '{PARAM}': the model has no token {max(token_ids)}.", param=PARAM, code="invalid_value"
        )
    num_new = body.get("max_completion_tokens") or body.get("max_tokens") or 1
    if len(token_ids) + num_new > status.max_model_len:
        raise InvalidRequestError(
            f"This model's maximum context length is {status.max_model_len} tokens. However, your negative prompt has "
            f"{len(token_ids)} tokens, and {num_new} or more are to be generated after it. Please reduce its length.",
            param=PARAM,
            code="context_length_exceeded",
        )
