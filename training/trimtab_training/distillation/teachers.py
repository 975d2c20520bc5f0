"""Where a teacher's samples come from: an OpenAI-compatible completions API, or a model in this process."""

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from trimtab_adapters.contract.errors import EngineError
from trimtab_training.config import SamplingConfig
from trimtab_training.distillation.teacher_samples import TeacherSample
from trimtab_training.encoder_decoder import base_reader
from trimtab_training.gateway import GatewayClient
from trimtab_training.models import Vocabulary, end_token_ids
from trimtab_training.padding import padded
from trimtab_training.policy import TailoredPolicy
from trimtab_training.prompts import Prompt
from trimtab_training.sampler import sample_outputs

logger = logging.getLogger(__name__)

_ID_PREFIX = "token_id:"
_ROWS = 32


class Teacher(Protocol):
    """A model to be imitated."""

    def draw(self, prompts: Sequence[Prompt], *, num_per_prompt: int, seed: int) -> list[TeacherSample]:
        """Samples of all prompts. The same seed gives the same ones where the teacher honours it."""
        ...


class ApiTeacher:
    """`POST /v1/completions` with log-probabilities.

    Args:
        client: The connection.
        model: Name of the model there.
        sampling: How it is to sample.
        top_logprobs: Alternatives per token.
        vocabulary: The student's, which must be the teacher's.
        has_token_ids: Whether the answers have token ids; otherwise texts of tokens are looked up in the vocabulary,
            and an output with a token that is not there, or there twice, is left out.
    """

    def __init__(
        self,
        client: GatewayClient,
        *,
        model: str,
        sampling: SamplingConfig,
        top_logprobs: int,
        vocabulary: Vocabulary,
        has_token_ids: bool,
    ) -> None:
        self._client = client
        self._vocabulary = vocabulary
        self._ids = None if has_token_ids else _ids_by_text(vocabulary)
        self._body: dict[str, Any] = {
            "model": model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "logprobs": top_logprobs,
        }
        self._body |= {"stop": list(sampling.stop)} if sampling.stop else {}
        if has_token_ids:
            self._body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
            self._body |= {"stop_token_ids": list(sampling.stop_token_ids)} if sampling.stop_token_ids else {}

    def draw(self, prompts: Sequence[Prompt], *, num_per_prompt: int, seed: int) -> list[TeacherSample]:
        """See `Teacher`."""

        def one(index: int) -> list[TeacherSample | None]:
            prompt = prompts[index]
            ids = prompt.token_ids or tuple(self._vocabulary.encode(prompt.text))
            body = {**self._body, "n": num_per_prompt, "seed": seed + index * num_per_prompt}
            body["prompt"] = list(ids) if self._ids is None else prompt.text
            answer = self._client.ask("POST", "/v1/completions", body)
            try:
                return [self._sample(prompt, ids, choice) for choice in answer["choices"]]
            except (KeyError, TypeError, ValueError, AttributeError) as exc:
                raise EngineError(
                    f"the teacher's answer lacks log-probabilities ({type(exc).__name__}: {exc})"
                ) from exc

        with ThreadPoolExecutor(max_workers=self._client.concurrency, thread_name_prefix="teacher") as pool:
            futures = [pool.submit(one, index) for index in range(len(prompts))]
            try:
                drawn = [sample for future in futures for sample in future.result()]
            finally:
                for future in futures:
                    future.cancel()
        usable = [sample for sample in drawn if sample is not None]
        if len(usable) < len(drawn):
            logger.warning(
                "%d of %d samples are left out: empty, or with tokens that are not in the student's vocabulary",
                len(drawn) - len(usable),
                len(drawn),
            )
        return usable

    def _sample(self, prompt: Prompt, prompt_ids: tuple[int, ...], choice: dict[str, Any]) -> TeacherSample | None:
        logprobs = choice["logprobs"]
        output = [self._id(token) for token in logprobs["tokens"]]
        if not output or None in output or choice.get("finish_reason") not in ("stop", "length"):
            return None
        tops = [self._top(top or {}) for top in logprobs.get("top_logprobs") or [{}] * len(output)]
        return TeacherSample(
            prompt=prompt.text,
            prompt_token_ids=prompt_ids,
            output_token_ids=tuple(token for token in output if token is not None),
            logprobs=tuple(float(value) for value in logprobs["token_logprobs"]),
            top_token_ids=tuple(tuple(top) for top in tops),
            top_logprobs=tuple(tuple(top.values()) for top in tops),
        )

    def _top(self, top: dict[str, float]) -> dict[int, float]:
        """By id; alternatives that cannot be told apart count as part of the rest, where they belong unknown."""
        found = {self._id(token): float(value) for token, value in top.items()}
        return {token: value for token, value in found.items() if token is not None}

    def _id(self, token: str) -> int | None:
        if self._ids is not None:
            return self._ids.get(token)
        found = int(token.removeprefix(_ID_PREFIX))
        return found if found < self._vocabulary.num_tokens else None


class LocalTeacher:
    """A causal or encoder-decoder LM in this process, for tests and models that fit.

    Args:
        model: The teacher.
        sampling: How it samples; `stop` texts are not supported here.
        top_logprobs: Alternatives per token.
        vocabulary: Encodes the prompts.
    """

    def __init__(self, model: Any, *, sampling: SamplingConfig, top_logprobs: int, vocabulary: Vocabulary) -> None:
        self._policy = TailoredPolicy(model, model, alpha=0.0, num_known=vocabulary.num_tokens)
        self._sampling = sampling
        self._top_logprobs = top_logprobs
        self._vocabulary = vocabulary
        self._ends = end_token_ids(model) | frozenset(sampling.stop_token_ids)

    def draw(self, prompts: Sequence[Prompt], *, num_per_prompt: int, seed: int) -> list[TeacherSample]:
        """See `Teacher`."""
        generator = torch.Generator().manual_seed(seed)
        rows = [prompt for prompt in prompts for _ in range(num_per_prompt)]
        samples: list[TeacherSample] = []
        for start in range(0, len(rows), _ROWS):
            samples += self._draw(rows[start : start + _ROWS], generator)
        return samples

    def _draw(self, prompts: Sequence[Prompt], generator: torch.Generator) -> list[TeacherSample]:
        contexts = [prompt.token_ids or tuple(self._vocabulary.encode(prompt.text)) for prompt in prompts]
        sampled = sample_outputs(
            self._policy,
            contexts,
            None,
            max_tokens=self._sampling.max_tokens,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            end_token_ids=self._ends,
            generator=generator,
        )
        outputs = [output.token_ids for output in sampled]
        ids, _ = padded(outputs, left=False, device=self._policy.device)
        with torch.no_grad():
            logits = base_reader(self._policy.base)(self._policy.base, contexts, outputs)[..., : self._policy.num_known]
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            tokens = logprobs.gather(-1, ids[..., None])[..., 0]
            tops = logprobs.topk(min(self._top_logprobs, logprobs.shape[-1]), dim=-1)
        return [
            TeacherSample(
                prompt=prompt.text,
                prompt_token_ids=tuple(context),
                output_token_ids=tuple(written),
                logprobs=tuple(tokens[row, : len(written)].tolist()),
                top_token_ids=tuple(map(tuple, tops.indices[row, : len(written)].tolist())),
                top_logprobs=tuple(map(tuple, tops.values[row, : len(written)].tolist())),
            )
            for row, (prompt, context, written) in enumerate(zip(prompts, contexts, outputs, strict=True))
        ]


def _ids_by_text(vocabulary: Vocabulary) -> dict[str, int]:
    """Ids by the text that a token stands for; texts of several tokens are left out."""
    texts = {
        index: vocabulary.tokenizer.decode([index], skip_special_tokens=False) for index in range(vocabulary.num_tokens)
    }
    counts = Counter(texts.values())
    return {text: index for index, text in texts.items() if counts[text] == 1}
