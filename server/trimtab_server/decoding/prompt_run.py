"""What a strategy works with: the candidates of one prompt, their rewards, and what became of those that failed."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from trimtab_adapters.contract.errors import EngineDiedError, EngineUnavailableError, InvalidRequestError, TrimtabError
from trimtab_adapters.contract.records import RewardValue
from trimtab_adapters.contract.rewards import RewardChoice
from trimtab_server.decoding.abandoned_records import AbandonedRecords
from trimtab_server.decoding.candidates import LeftOut, Scored
from trimtab_server.decoding.fanout import generate_all
from trimtab_server.decoding.job import CHAT_RENDERING, GenerationJob
from trimtab_server.decoding.reference_draw import BaseReferenceDraw
from trimtab_server.decoding.running import RunningCandidate
from trimtab_server.decoding.scoring import CalibrationChoice, PromptScorer, Scoring
from trimtab_server.engine.base import Candidate, Engine, EngineRequest

T = TypeVar("T")

Detokenize = Callable[[Sequence[int]], Awaitable[str]]


class PromptRun:
    """One prompt of a job on its way to its choices.

    Args:
        engine: Where candidates are generated.
        scoring: Scores them.
        abandoned: Gets the candidates whose records nobody will take.
        detokenize: The text of token ids.
        job: The request.
        index: Of the prompt in the request.
    """

    def __init__(
        self,
        engine: Engine,
        scoring: Scoring,
        abandoned: AbandonedRecords,
        detokenize: Detokenize,
        job: GenerationJob,
        index: int,
    ) -> None:
        self.job = job
        self.index = index
        self.engine = engine
        self.detokenize = detokenize
        self.draw = BaseReferenceDraw(engine, job, index)
        self.left_out: list[LeftOut] = []
        self.piece_usages: list[dict[str, Any]] = []
        self._scoring = scoring
        self._abandoned = abandoned
        self._scorers: dict[tuple[str, CalibrationChoice], PromptScorer] = {}
        self._scorer_lock = asyncio.Lock()
        self._running: list[RunningCandidate] = []
        self._untaken: list[EngineRequest] = []

    @property
    def n(self) -> int:
        """Choices."""
        return self.job.n

    @property
    def num_candidates(self) -> int:
        """N: the number of candidates, or the most there may be."""
        return self.job.num_candidates

    @property
    def leaves_out(self) -> bool:
        """Whether the answer may do without candidates that fail."""
        return self.job.selection is not None and self.job.selection.on_failure == "leave_out"

    def dice(self, purpose: str) -> random.Random:
        """Random numbers for a purpose; the same for the same seed of the request, prompt and purpose."""
        if self.job.seed is None:
            return random.SystemRandom()
        return random.Random(f"{self.job.seed}/{self.index}/{purpose}")

    async def generate(self, indices: Sequence[int]) -> list[Candidate]:
        """Whole candidates, all at the same time, in the order of their numbers without those that are left out.

        Raises:
            TrimtabError: The first error of any candidate, after stopping the others, unless it may be left out.
        """
        return await self.generate_requests([(index, self.job.request(self.index, index)) for index in indices])

    async def generate_requests(self, requests: Sequence[tuple[int, EngineRequest]]) -> list[Candidate]:
        """The same for requests of a strategy's own making, each with the number of its candidate."""
        self._untaken += [request for _, request in requests]
        if not self.leaves_out:
            return _numbered(requests, await generate_all(self.engine, [request for _, request in requests]))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._attempt(index, self.engine.generate(request)))
                    for index, request in requests
                ]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return _numbered(requests, [task.result() for task in tasks])

    async def generate_pieces(self, requests: Sequence[tuple[int, EngineRequest]]) -> list[Candidate]:
        """The same for requests of parts of candidates, whose price `piece_usages` keeps."""
        pieces = await self.generate_requests(requests)
        self.piece_usages += [piece.usage for piece in pieces]
        return pieces

    def start(self, index: int) -> RunningCandidate:
        """Start a candidate that can be watched and stopped; `aclose` stops what still runs."""
        request = self.job.request(self.index, index)
        self._untaken.append(request)
        running = RunningCandidate(self.engine, request, index)
        self._running.append(running)
        return running

    async def result(self, running: RunningCandidate) -> Candidate | None:
        """The finished candidate; None when it was stopped or is left out."""
        return await self._attempt(running.index, running.result())

    async def score(self, candidates: Sequence[Candidate]) -> list[Scored]:
        """Candidates with their rewards, in order, without those that are left out; rewards are None without a reward.

        Raises:
            RewardError: A candidate could not be scored, unless it may be left out. A missing reward is never 0.
        """
        if self.job.reward is None or not candidates:
            return [(candidate, None) for candidate in candidates]
        scorer = await self.scorer(candidates[0].prompt_token_ids)
        if not self.leaves_out or not scorer.is_incremental:
            values = await scorer.score([candidate.text for candidate in candidates])
            return list(zip(candidates, values, strict=True))
        await scorer.prepare()  # what fails here fails for all of them
        found = await asyncio.gather(*(self._attempt(c.index, scorer.score([c.text])) for c in candidates))
        return [(c, values[0]) for c, values in zip(candidates, found, strict=True) if values]

    async def judge_texts(
        self, prompt_token_ids: Sequence[int], texts: Mapping[int, str], *, reward: str | None = None
    ) -> dict[int, RewardValue]:
        """Rewards of unfinished texts by the numbers of their candidates, without those that are left out.

        Args:
            prompt_token_ids: The prompt as the engine sees it.
            texts: By number.
            reward: A registered reward to judge by, instead of the request's own.
        """
        choice = reward if reward is not None else self.job.reward
        assert choice is not None, "strategies that judge texts need a reward"
        calibration = CalibrationChoice(method="none") if isinstance(choice, str) else self.job.calibration
        scorer = await self._scorer(choice, calibration, prompt_token_ids)
        if not self.leaves_out:
            return dict(zip(texts, await scorer.score(list(texts.values())), strict=True))
        await scorer.prepare()
        found = await asyncio.gather(*(self._attempt(i, scorer.score([text])) for i, text in texts.items()))
        return {i: values[0] for i, values in zip(texts, found, strict=True) if values}

    async def prepare(self) -> None:
        """Draw the reference rollouts while candidates are generated, where they are wanted.

        Not for chats, whose prompt is only known for certain from a candidate.
        """
        needs_draw = self.job.calibrates and self.job.calibration.effective_method == "reference"
        if needs_draw and self.job.endpoint == "completions" and "truncate_prompt_tokens" not in self.job.body:
            await (await self.scorer(await self.prompt_token_ids())).prepare()

    async def scorer(self, prompt_token_ids: Sequence[int]) -> PromptScorer:
        """The scorer of this prompt."""
        assert self.job.reward is not None
        return await self._scorer(self.job.reward, self.job.calibration, prompt_token_ids)

    async def prompt_token_ids(self) -> list[int]:
        """The prompt as the engine would see it, without generating anything."""
        fields, body = self.job.prompts[self.index].fields, self.job.body
        if self.job.endpoint == "completions":
            if isinstance(fields["prompt"], list):
                return list(fields["prompt"])
            question = {"prompt": fields["prompt"], "add_special_tokens": body.get("add_special_tokens", True)}
        else:
            rendering = {name: body[name] for name in CHAT_RENDERING if name in body}
            question = {"add_generation_prompt": True, **rendering, "messages": fields["messages"]}
        return list((await self.engine.post("/tokenize", question))["tokens"])

    async def prompt_of_pieces(self) -> list[int]:
        """The prompt's ids for an answer that is generated in pieces.

        Raises:
            InvalidRequestError: Prompt and answer do not fit; the engine would only see it at a late piece.
        """
        token_ids, status = await self.prompt_token_ids(), await self.engine.status()
        num_left = status.max_model_len - len(token_ids)
        if (self.job.max_tokens or 0) > min(num_left, status.max_output_len or num_left):
            own = "" if status.max_output_len is None else f", {status.max_output_len} of them for the answer"
            raise InvalidRequestError(
                f"This model's maximum context length is {status.max_model_len} tokens{own}. However, your prompt has "
                f"{len(token_ids)} tokens, and up to {self.job.max_tokens} are to be generated after it.",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return token_ids

    async def prompt_text(self, prompt_token_ids: Sequence[int]) -> str:
        """The prompt as text, from its ids where the caller sent ids."""
        text = self.job.prompts[self.index].text
        return text if text is not None else await self.detokenize(prompt_token_ids)

    def check_enough(self, num_left: int) -> None:
        """Raise the first failure when fewer candidates are left than are needed as choices."""
        if num_left < self.n and self.left_out:
            raise self.left_out[0].error

    def leave_out(self, index: int, error: TrimtabError) -> None:
        """Do without a candidate that failed, where the caller allows it.

        Raises:
            TrimtabError: The error itself, where the caller does not, or where no other candidate can do better.
        """
        if not self.leaves_out or isinstance(error, InvalidRequestError | EngineUnavailableError | EngineDiedError):
            raise error
        if all(item.index != index for item in self.left_out):
            self.left_out.append(LeftOut(index, error))

    async def aclose(self) -> None:
        """Stop what still runs."""
        await asyncio.gather(*(running.aclose() for running in self._running))

    def forget(self, taken: Iterable[str] = ()) -> None:
        """Nobody will take the records of this prompt's candidates, but for those that were taken, by uid."""
        uids = set(taken)
        self._abandoned.forget(request for request in self._untaken if request.request_id not in uids)
        self._untaken = []

    async def _attempt(self, index: int, work: Awaitable[T]) -> T | None:
        try:
            return await work
        except TrimtabError as exc:
            self.leave_out(index, exc)
            return None

    async def _scorer(
        self, choice: RewardChoice, calibration: CalibrationChoice, prompt_token_ids: Sequence[int]
    ) -> PromptScorer:
        key = (repr(choice), calibration)
        async with self._scorer_lock:
            if key not in self._scorers:
                self._scorers[key] = await self._scoring.for_prompt(
                    choice,
                    calibration=calibration,
                    prompt=await self.prompt_text(prompt_token_ids),
                    prompt_token_ids=prompt_token_ids,
                    draw_reference=self.draw,
                )
            return self._scorers[key]


def _numbered(requests: Sequence[tuple[int, EngineRequest]], found: Sequence[Candidate | None]) -> list[Candidate]:
    """What was found, each with the number of its candidate."""
    candidates = []
    for (index, _), candidate in zip(requests, found, strict=True):
        if candidate is not None:
            candidate.index = index
            candidates.append(candidate)
    return candidates
