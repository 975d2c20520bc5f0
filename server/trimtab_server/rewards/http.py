"""Rewards from a server: vLLM's `/classify` and `/score`, or Trimtab's own JSON contract."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import httpx
from pydantic import Field, StrictInt, StrictStr, model_validator

from trimtab_adapters.contract.errors import (
    RewardChangedError,
    RewardError,
    RewardUnavailableError,
)
from trimtab_adapters.contract.rewards import RewardInput, RewardSpec
from trimtab_server.rewards.endpoint import Endpoint, EndpointOptions, build_endpoint
from trimtab_server.rewards.http_answers import Label, classify_scores, json_scores, score_scores
from trimtab_server.rewards.limits import options_hash, parse_options

IDENTITY_TTL_S = 60.0
"""How old the knowledge of what a vLLM server serves may be when it is used."""

_IDENTITY = ("id", "root", "parent", "max_model_len")
"""What of a model's card in `/v1/models` does not change with time alone."""

_PROBE = (RewardInput(prompt="a", output="a"),)


class HttpOptions(EndpointOptions):
    """The `options` of a reward of kind `http`."""

    api: Literal["classify", "score", "json"]
    """vLLM's `/classify` or `/score` under the target, or the target itself with Trimtab's own contract."""
    model: str | None = Field(default=None, min_length=1)
    """Which of its models a vLLM server is asked; needed when it serves several."""
    template: Literal["output", "prompt_output"] = "output"
    """What `/classify` reads: the output alone, or prompt and output as one text, nothing between."""
    label: StrictInt | StrictStr | None = None
    """Index of the class of `/classify` that is wanted, or its name, for which `labels` must be given; the last one
    when not given."""
    labels: list[str] | None = Field(default=None, min_length=1)
    """Names of all classes, in their order. The server's answers are checked against them."""
    function: Literal["probability", "logit"] = "probability"
    """Whether vLLM applies its softmax or sigmoid."""
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    """Most tokens that a vLLM server reads; what is too long loses tokens from its beginning. -1 is as many as it can.
    When not given, the server refuses what is too long."""
    revision: str = ""
    """Part of the version and of nothing else: change it when the weights behind an unchanged name have changed."""

    @model_validator(mode="after")
    def _fits_the_api(self) -> Self:
        if self.api != "classify":
            self._refuse({"template": "output", "label": None, "labels": None}, "classify")
        if self.api == "json":
            self._refuse(
                {"model": None, "function": "probability", "truncate_prompt_tokens": None}, "classify or score"
            )
        if isinstance(self.label, str) and self.label not in (self.labels or []):
            raise ValueError("a label's name must be one of options.labels, which lists all names in their order")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError("options.labels must be different from each other")
        if isinstance(self.label, int) and not 0 <= self.label < len(self.labels or [None] * (self.label + 1)):
            raise ValueError("options.label is no index of a class")
        return self

    def _refuse(self, defaults: Mapping[str, object], apis: str) -> None:
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise ValueError(f"options.{name} belongs to the api {apis}")

    @property
    def wanted(self) -> Label:
        """The class that is wanted."""
        index = -1 if self.label is None else self.label
        if isinstance(index, str):
            index = (self.labels or []).index(index)
        return Label(index, tuple(self.labels) if self.labels is not None else None)


class HttpReward:
    """A reward that a server computes.

    The version covers the options and what the server tells of itself. Of vLLM that is the model's id, where it was
    loaded from, its longest input and vLLM's own version, read again each minute and after each failure; weights that
    changed at the same place are not seen, and need another `revision`. A server of the JSON contract tells its version
    with each answer.

    Args:
        name: Name of the reward.
        endpoint: The server.
        options: See `HttpOptions`.
        clock: Seconds, for the age of what is known of the server.
    """

    def __init__(
        self, name: str, endpoint: Endpoint, options: HttpOptions, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name = name
        self._endpoint = endpoint
        self._options = options
        self._clock = clock
        self._identity = ""
        self._model = options.model
        self._checked_at: float | None = None

    @classmethod
    async def load(cls, spec: RewardSpec, client: httpx.AsyncClient, environment: Mapping[str, str]) -> Self:
        """Ask the server who it is and for one score, so that one that does not fit is refused here.

        Raises:
            InvalidRequestError: The target or an option does not fit.
            RewardError: The server does not answer as it must.
        """
        options = parse_options(HttpOptions, spec, has_target=True)
        reward = cls(spec.name, build_endpoint(spec.name, spec.target, options, client, environment), options)
        if options.api == "json":
            _, reward._identity = await reward._ask_json(_PROBE)
        else:
            reward._identity = await reward._identify()
            await reward._ask_vllm(_PROBE)
        return reward

    @property
    def name(self) -> str:
        """The name that routes and jobs use."""
        return self._name

    @property
    def version(self) -> str:
        """Changes whenever scores could change, as far as the server tells."""
        return options_hash(self._options, self._identity)

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One finite number per input, in order.

        Raises:
            RewardUnavailableError: The server is away or too busy.
            RewardChangedError: It serves another version by now.
            RewardError: It refused, or answered anything else than one finite number per input.
        """
        version, started_as = self.version, self._identity
        if self._options.api == "json":
            scores, identity = await self._ask_json(inputs)
        else:
            identity = await self._known_identity()
            # What changed already needs no scores.
            scores = await self._ask_vllm(inputs) if identity == started_as else []
            identity = identity if self._identity == started_as else self._identity
        if identity != started_as:
            self._identity = identity
            raise RewardChangedError(f"the reward {self._name!r} is no longer at version {version}; ask again")
        return scores

    async def _known_identity(self) -> str:
        now = self._clock()
        if self._checked_at is not None and now - self._checked_at <= IDENTITY_TTL_S:
            return self._identity
        self._checked_at = now  # At once, so that concurrent calls do not all ask.
        try:
            return await self._identify()
        except RewardError:
            self._checked_at = None
            raise

    async def _identify(self) -> str:
        """What a vLLM server says of the model that is asked, and the name of that model."""
        answer = await self._endpoint.get("/v1/models")
        cards = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(cards, list) or not all(isinstance(c, dict) and isinstance(c.get("id"), str) for c in cards):
            raise RewardError(f"the server of the reward {self._name!r} does not list its models as vLLM does")
        wanted = self._options.model
        served = {card["id"]: card for card in cards}
        if wanted is None and len(served) != 1:
            raise RewardError(
                f"the server of the reward {self._name!r} has the models {', '.join(served) or 'none'}; name one of "
                "them in options.model"
            )
        if wanted is not None and wanted not in served:
            raise RewardError(f"the server of the reward {self._name!r} has no model {wanted!r}")
        self._model = wanted or next(iter(served))
        card = served[self._model]
        return json.dumps([await self._server_version(), *(card.get(key) for key in _IDENTITY)])

    async def _server_version(self) -> object:
        try:
            answer = await self._endpoint.get("/version")
        except RewardUnavailableError:
            raise
        except RewardError:
            return None  # Behind a proxy that passes on less.
        return answer.get("version") if isinstance(answer, dict) else None

    async def _ask_vllm(self, inputs: Sequence[RewardInput]) -> list[float]:
        options = self._options
        is_probability = options.function == "probability"
        body: dict[str, Any] = {"model": self._model, "use_activation": is_probability}
        if options.truncate_prompt_tokens is not None:
            body |= {"truncate_prompt_tokens": options.truncate_prompt_tokens, "truncation_side": "left"}
        try:
            if options.api == "score":
                body |= {"text_1": [item.prompt for item in inputs], "text_2": [item.output for item in inputs]}
                answer = await self._endpoint.post("/score", body)
                return score_scores(self._name, answer, len(inputs), is_probability=is_probability)
            with_prompt = options.template == "prompt_output"
            body["input"] = [item.prompt + item.output if with_prompt else item.output for item in inputs]
            answer = await self._endpoint.post("/classify", body)
            return classify_scores(self._name, answer, len(inputs), options.wanted, is_probability=is_probability)
        except RewardError:
            self._checked_at = None  # It may have been restarted as another.
            raise

    async def _ask_json(self, inputs: Sequence[RewardInput]) -> tuple[list[float], str]:
        body = {"inputs": [{"prompt": item.prompt, "output": item.output} for item in inputs]}
        return json_scores(self._name, await self._endpoint.post("", body), len(inputs))
