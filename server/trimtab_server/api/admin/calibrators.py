"""`/admin/calibrators`: list, fit and delete what rewards are calibrated by."""

import dataclasses
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.responses import Response

from trimtab_adapters.contract.errors import InvalidRequestError, NotFoundError, RewardError
from trimtab_adapters.contract.reference_policy import ReferencePolicy
from trimtab_server.api.admin.json_io import Body, JsonAnswer, body_of, list_answer
from trimtab_server.api.chat_request import ChatBody
from trimtab_server.api.completion_request import CompletionBody
from trimtab_server.api.validation import parse_body
from trimtab_server.calibration.fitting import CalibratorFitting, FitRequest, Fitted
from trimtab_server.calibration.pooled_fit import MAX_ROLLOUTS, MIN_ROLLOUTS
from trimtab_server.decoding.job import PromptInput
from trimtab_server.storage.base import Catalog, StoredPooledCalibrator
from trimtab_server.storage.calibrators import CalibratorGroup, SqlCalibratorStore, SqlPooledCalibratorStore

MAX_PROMPTS = 1024

_OWN_FIELDS = frozenset(
    {
        *("model", "prompt", "messages", "n", "best_of", "seed", "stream", "stream_options", "echo", "logprobs"),
        *("top_logprobs", "prompt_logprobs", "reward", "calibration", "selection", "steering", "steering_logprobs"),
    }
)
"""Fields of a request that are no sampling settings of the base model."""


class VersionedReward(Protocol):
    """What is asked of a reward here."""

    @property
    def version(self) -> str:
        """Changes whenever scores could change."""
        ...


class RewardsByName(Protocol):
    """What is asked of the reward registry here."""

    async def batched(self, name: str) -> VersionedReward:
        """Raises `NotFoundError` or `RewardError`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrators:
    """What these routes work on.

    Attributes:
        fitting: Makes them.
        scores: Keeps per-prompt ones.
        pooled: Keeps pooled ones.
        base_identity: What the engine tells of the base model, None where it has not yet.
    """

    fitting: CalibratorFitting
    scores: SqlCalibratorStore
    pooled: SqlPooledCalibratorStore
    base_identity: Callable[[], str | None]


class FitCalibrator(Body):
    """Body of `POST /admin/calibrators`."""

    reward: str = Field(min_length=1, max_length=64)
    model: str = Field(min_length=1, max_length=256)
    """The base model or a route; what is sampled is always the base model, unsteered."""
    method: Literal["pooled", "reference"] = "pooled"
    prompts: list[str | list[dict[str, Any]]] = Field(default_factory=list, max_length=MAX_PROMPTS)
    """Texts for completions, or arrays of messages for chat completions."""
    endpoint: Literal["completions", "chat.completions"] | None = None
    """None means what the prompts are for, without any `completions`."""
    request: dict[str, Any] | None = None
    """Sampling settings, as in the requests that are to be calibrated."""
    from_log: bool = False
    """Use all logged samples at these settings for a pooled calibrator; without `request` the settings logged most."""
    samples: int = Field(default=8, ge=2, le=1024)
    """Reference rollouts for each of the prompts; logged ones count."""


def build_calibrators_router(
    calibrators: Calibrators, rewards: RewardsByName, catalog: Catalog, flush: Callable[[], Awaitable[None]]
) -> APIRouter:
    """Routes for calibrators.

    Args:
        calibrators: What they work on.
        rewards: Tells the present versions of rewards.
        catalog: Tells which base model a model name means.
        flush: Brings acknowledged rollouts to the database.
    """
    router = APIRouter(prefix="/admin/calibrators")
    status = _Status(rewards, catalog, calibrators.base_identity)

    async def find(calibrator_id: str) -> StoredPooledCalibrator | CalibratorGroup:
        stored = await calibrators.pooled.get(calibrator_id)
        group = next((group for group in await calibrators.scores.groups() if group.id == calibrator_id), None)
        found = stored or group
        if found is None:
            raise NotFoundError(f"There is no calibrator {calibrator_id!r}.", code="calibrator_not_found")
        return found

    @router.get("")
    async def list_all() -> JsonAnswer:
        pooled = [await status.described(one) for one in await calibrators.pooled.everything()]
        groups = [await status.described(one) for one in await calibrators.scores.groups()]
        return list_answer([*pooled, *groups])

    @router.get("/{calibrator_id}")
    async def show(calibrator_id: str) -> JsonAnswer:
        return JsonAnswer(await status.described(await find(calibrator_id)))

    @router.post("")
    async def fit(body: Annotated[FitCalibrator, Depends(body_of(FitCalibrator))]) -> JsonAnswer:
        resolved = await catalog.resolve(body.model, None)
        await flush()
        fitted = await calibrators.fitting.fit(body.reward, body.method, _fit_request(body, resolved.base_model))
        return JsonAnswer(await status.fitted(fitted))

    @router.delete("/{calibrator_id}")
    async def delete(calibrator_id: str) -> Response:
        found = await find(calibrator_id)
        if isinstance(found, CalibratorGroup):
            await calibrators.scores.delete_group(found)
        else:
            await calibrators.pooled.delete(found.id)
        return Response(status_code=204)

    return router


class _Status:
    """Calibrators as objects, with what has changed since they were made."""

    def __init__(self, rewards: RewardsByName, catalog: Catalog, base_identity: Callable[[], str | None]) -> None:
        self._rewards = rewards
        self._catalog = catalog
        self._base_identity = base_identity

    async def described(self, one: StoredPooledCalibrator | CalibratorGroup) -> dict[str, Any]:
        """An object of the list."""
        if isinstance(one, CalibratorGroup):
            return {
                **await self._common(one.id, "reference", one.reward, one.reference),
                "num_prompts": one.num_prompts,
                "num_rollouts": one.num_rollouts,
                "updated_at": one.updated_at,
            }
        calibrator = one.calibrator
        return {
            **await self._common(one.id, "pooled", calibrator.reward, calibrator.reference),
            "num_prompts": calibrator.num_prompts,
            "num_rollouts": calibrator.num_rollouts,
            "error": calibrator.error,
            "held_out": one.report,
            "created_at": one.created_at,
        }

    async def fitted(self, fitted: Fitted) -> dict[str, Any]:
        """What came of a fit, with the held-out values."""
        held_out = {**(fitted.pooled.report if fitted.pooled else {}), **dataclasses.asdict(fitted.reliability)}
        if fitted.pooled is not None:
            return {**await self.described(fitted.pooled), "held_out": held_out}
        return {
            **await self._common(None, "reference", fitted.reward, fitted.policy.key),
            "num_prompts": fitted.num_prompts,
            "num_rollouts": fitted.num_rollouts,
            "held_out": held_out,
        }

    async def _common(self, calibrator_id: str | None, method: str, reward: str, reference: str) -> dict[str, Any]:
        policy = ReferencePolicy.from_key(reference)
        reasons = await self._reasons(reward.splitlines(), policy)
        return {
            "id": calibrator_id,
            "object": "calibrator",
            "method": method,
            "reward": ", ".join(reward.splitlines()),
            "base_model": policy.base_model,
            "base_identity": policy.identity,
            "endpoint": policy.endpoint,
            "request": json.loads(policy.sampling),
            "status": "stale" if reasons else "fresh",
            "stale_because": reasons,
        }

    async def _reasons(self, rewards: Sequence[str], policy: ReferencePolicy) -> list[str]:
        """Why it holds no longer. Sampling settings are a matter of each request."""
        reasons = []
        for name, _, version in (reward.partition("@") for reward in rewards):
            try:
                now = (await self._rewards.batched(name)).version
            except NotFoundError:
                reasons.append(f"the reward {name!r} is gone")
                continue
            except RewardError as exc:
                reasons.append(exc.message)
                continue
            if now != version:
                reasons.append(f"reward version: {version!r}, not {now!r}")
        try:
            base_model = (await self._catalog.resolve(policy.base_model, None)).base_model
        except NotFoundError:
            return [*reasons, f"base_model: {policy.base_model!r} is not served"]
        identity = self._base_identity()
        if identity is None:  # not known now, which is no reason to doubt
            identity = policy.identity
        return [*reasons, *policy.differences(dataclasses.replace(policy, base_model=base_model, identity=identity))]


def _fit_request(body: FitCalibrator, base_model: str) -> FitRequest:
    texts = [prompt for prompt in body.prompts if isinstance(prompt, str)]
    chats = [prompt for prompt in body.prompts if not isinstance(prompt, str)]
    endpoint = body.endpoint or ("chat.completions" if chats else "completions")
    if chats if endpoint == "completions" else texts:
        raise InvalidRequestError(
            "Invalid 'prompts': completions have texts, chat completions have arrays of messages.", param="prompts"
        )
    if not body.prompts and not body.from_log:
        raise InvalidRequestError("There is nothing to fit: give 'prompts', or 'from_log'.", param="prompts")
    if not body.prompts and body.method == "reference":
        raise InvalidRequestError(
            "The method 'reference' makes a calibrator for each of 'prompts', and there is none.", param="prompts"
        )
    if body.method == "pooled" and body.samples < MIN_ROLLOUTS:
        raise InvalidRequestError(
            f"A pooled calibrator needs at least {MIN_ROLLOUTS} samples per prompt.", param="samples"
        )
    if len(body.prompts) * body.samples > MAX_ROLLOUTS:
        raise InvalidRequestError(
            f"{len(body.prompts)} prompts with {body.samples} samples each are more than the {MAX_ROLLOUTS} rollouts "
            "that one fit may draw.",
            param="samples",
        )
    engine_body, prompts = _engine_body(body, endpoint, texts, chats)
    if body.request is None and not body.prompts:
        engine_body = None
    return FitRequest(
        model=body.model,
        base_model=base_model,
        endpoint=endpoint,
        prompts=prompts if body.prompts else (),
        body=engine_body,
        from_log=body.from_log,
        samples=body.samples,
    )


def _engine_body(
    body: FitCalibrator, endpoint: str, texts: list[str], chats: list[list[dict[str, Any]]]
) -> tuple[dict[str, Any] | None, tuple[PromptInput, ...]]:
    """What the same request would have the engine asked, validated as that request would be."""
    settings = body.request or {}
    if refused := sorted(settings.keys() & _OWN_FIELDS):
        raise InvalidRequestError(
            f"'request' has the sampling settings of the base model; {', '.join(refused)} cannot be set there.",
            param=f"request.{refused[0]}",
        )
    if endpoint == "completions":
        completion = parse_body(CompletionBody, {**settings, "model": body.model, "prompt": texts or ["x"]})
        completion.check()
        return completion.engine_fields(), completion.prompts()
    some = chats or [[{"role": "user", "content": "x"}]]
    bodies = [parse_body(ChatBody, {**settings, "model": body.model, "messages": messages}) for messages in some]
    for chat in bodies:
        chat.check()
    return bodies[0].engine_fields(), tuple(prompt for chat in bodies for prompt in chat.prompts())
