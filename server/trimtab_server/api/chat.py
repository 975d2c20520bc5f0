"""`POST /v1/chat/completions`."""

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from trimtab_adapters.contract.errors import EngineRequestError
from trimtab_server.api.answers import ChatAnswer
from trimtab_server.api.chat_request import ChatBody
from trimtab_server.api.generate import generate
from trimtab_server.auth import require_api_key
from trimtab_server.decoding.generation import Generator
from trimtab_server.decoding.job import GenerationJob

router = APIRouter(dependencies=[Depends(require_api_key)])


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """OpenAI's chat completions, by the engine's chat template."""
    try:
        return await generate(request, ChatBody, "chat.completions", _build_answer)
    except EngineRequestError as exc:
        if exc.engine_status == 400 and "chat template" in exc.message:
            raise EngineRequestError(
                "The base model has no chat template, so it cannot answer a chat: use /v1/completions, or start the "
                f"engine with --chat-template FILE. (The engine says: {exc.message})",
                engine_status=400,
                error={**exc.error, "param": "messages"},
            ) from exc
        raise


async def _build_answer(job: GenerationJob, body: ChatBody, generator: Generator) -> ChatAnswer:
    return ChatAnswer(job, body)
