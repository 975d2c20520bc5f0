"""Rewards from a language model that is asked to rate outputs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import httpx
from pydantic import Field, field_validator, model_validator

from trimtab_adapters.contract.errors import RewardChangedError, RewardError
from trimtab_adapters.contract.rewards import RewardInput, RewardSpec
from trimtab_server.rewards.endpoint import Endpoint, EndpointOptions, build_endpoint
from trimtab_server.rewards.judge_answers import (
    JudgeText,
    expected_rating,
    read_chat,
    read_completion,
    written_rating,
)
from trimtab_server.rewards.limits import options_hash, parse_options

DEFAULT_TEMPLATE = """\
Rate how good the response to the prompt is, as a whole number from {lowest} to {highest}; {highest} is best.
Answer with the number alone.

Prompt:
{prompt}

Response:
{output}

Rating:"""

_PLACE = re.compile(r"\{(prompt|output|lowest|highest)\}")
_PROBE = RewardInput(prompt="Say hello.", output="Hello!")


class JudgeOptions(EndpointOptions):
    """The `options` of a reward of kind `llm_judge`."""

    model: str = Field(min_length=1)
    """Which model judges."""
    api: Literal["chat", "completions"] = "chat"
    """`/chat/completions` or `/completions` under the target, which ends with `/v1` as a rule."""
    template: str = Field(default=DEFAULT_TEMPLATE, max_length=20_000)
    """What the judge is asked; `{prompt}`, `{output}`, `{lowest}` and `{highest}` are filled in."""
    system: str | None = Field(default=None, max_length=20_000)
    """A system message, for `chat`."""
    lowest: int = Field(default=1, ge=0, le=100)
    highest: int = Field(default=5, ge=1, le=100)
    """Worst and best rating."""
    method: Literal["expected", "text"] = "expected"
    """The mean of the ratings under the probabilities that the judge gives them, or the number that it writes."""
    top_logprobs: int = Field(default=5, ge=1, le=20)
    """How many tokens `expected` asks the probabilities of; OpenAI allows 20 for chat and 5 for completions."""
    max_tokens: int = Field(default=8, ge=1, le=4096)
    """How much the judge may write."""
    max_batch_size: int = Field(default=1, ge=1, le=1)
    """One request judges one output; `max_concurrency` is how many are under way."""

    @field_validator("template")
    @classmethod
    def _has_output(cls, template: str) -> str:
        if "{output}" not in template:
            raise ValueError("the template must have {output} in it")
        return template

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.lowest >= self.highest:
            raise ValueError("options.highest must be above options.lowest")
        if self.method == "expected" and self.highest > 9:
            raise ValueError("method 'expected' reads one digit, so options.highest must be at most 9; or use 'text'")
        if self.system is not None and self.api != "chat":
            raise ValueError("options.system belongs to the api chat")
        return self


class JudgeReward:
    """Asks for a rating at temperature 0. Text without a number is an error, never the lowest rating.

    The version covers the options and the model's name as the server repeats it, which is often more exact than the
    one that was asked for. Other changes behind that name are not seen.

    Args:
        name: Name of the reward.
        endpoint: The server.
        options: See `JudgeOptions`.
    """

    def __init__(self, name: str, endpoint: Endpoint, options: JudgeOptions) -> None:
        self._name = name
        self._endpoint = endpoint
        self._options = options
        self._answered_as: str | None = None

    @classmethod
    async def load(cls, spec: RewardSpec, client: httpx.AsyncClient, environment: Mapping[str, str]) -> Self:
        """Ask for one rating, so that a judge that does not fit is refused here.

        Raises:
            InvalidRequestError: The target or an option does not fit.
            RewardError: The judge does not answer as it must.
        """
        options = parse_options(JudgeOptions, spec, has_target=True)
        reward = cls(spec.name, build_endpoint(spec.name, spec.target, options, client, environment), options)
        _, reward._answered_as = await reward._judge(_PROBE)
        return reward

    @property
    def name(self) -> str:
        """The name that routes and jobs use."""
        return self._name

    @property
    def version(self) -> str:
        """Changes whenever scores could change, as far as the server tells."""
        return options_hash(self._options, self._answered_as or "")

    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One rating per input, in order.

        Raises:
            RewardUnavailableError: The judge is away or too busy.
            RewardChangedError: It is another model by now.
            RewardError: It refused, or gave no rating.
        """
        version, started_as = self.version, self._answered_as
        ratings = []
        for item in inputs:
            rating, answered_as = await self._judge(item)
            if answered_as != started_as:
                self._answered_as = answered_as
                raise RewardChangedError(f"the reward {self._name!r} is no longer at version {version}; ask again")
            ratings.append(rating)
        return ratings

    async def _judge(self, item: RewardInput) -> tuple[float, str | None]:
        options = self._options
        is_chat = options.api == "chat"
        answer = await self._endpoint.post("/chat/completions" if is_chat else "/completions", self._body(item))
        judged: JudgeText = (read_chat if is_chat else read_completion)(self._name, answer)
        read = expected_rating if options.method == "expected" else written_rating
        rating = read(self._name, judged, options.lowest, options.highest)
        model = answer.get("model")
        if model is not None and not isinstance(model, str):
            raise RewardError(f"the judge of the reward {self._name!r} did not answer as OpenAI's API does")
        return rating, model

    def _body(self, item: RewardInput) -> dict[str, Any]:
        options = self._options
        question = self._question(item)
        body: dict[str, Any] = {"model": options.model, "max_tokens": options.max_tokens, "temperature": 0.0}
        if options.api == "chat":
            system = [{"role": "system", "content": options.system}] if options.system is not None else []
            body["messages"] = [*system, {"role": "user", "content": question}]
            if options.method == "expected":
                body |= {"logprobs": True, "top_logprobs": options.top_logprobs}
        else:
            body["prompt"] = question
            if options.method == "expected":
                body["logprobs"] = options.top_logprobs
        return body

    def _question(self, item: RewardInput) -> str:
        options = self._options
        values = {
            "prompt": item.prompt,
            "output": item.output,
            "lowest": str(options.lowest),
            "highest": str(options.highest),
        }
        # In one pass, so that what the texts hold in braces stays as it is.
        return _PLACE.sub(lambda place: values[place[1]], options.template)
