"""`POST /v1/completions`."""

import asyncio

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from trimtab_server.api.answers import CompletionAnswer
from trimtab_server.api.completion_request import CompletionBody
from trimtab_server.api.generate import generate
from trimtab_server.auth import require_api_key
from trimtab_server.decoding.generation import Generator
from trimtab_server.decoding.job import GenerationJob, PromptInput

router = APIRouter(dependencies=[Depends(require_api_key)])


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    """OpenAI's legacy completions, steered and chosen."""
    return await generate(request, CompletionBody, "completions", _build_answer)


async def _build_answer(job: GenerationJob, body: CompletionBody, generator: Generator) -> CompletionAnswer:
    if not body.echo:
        return CompletionAnswer(job, body)
    return CompletionAnswer(job, body, await asyncio.gather(*(_prompt_text(generator, p) for p in job.prompts)))


async def _prompt_text(generator: Generator, prompt: PromptInput) -> str:
    return prompt.text if prompt.text is not None else await generator.detokenize(prompt.fields["prompt"])
