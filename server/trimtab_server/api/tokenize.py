"""`POST /tokenize` and `POST /detokenize`: the engine's own, as vLLM has them."""

from typing import Any

from fastapi import APIRouter, Depends, Request

from trimtab_server.api.json_body import read_json_object
from trimtab_server.auth import require_api_key
from trimtab_server.gateway import GatewayParts

router = APIRouter(dependencies=[Depends(require_api_key)])


@router.post("/tokenize")
async def tokenize(request: Request) -> dict[str, Any]:
    """Text or messages to token ids."""
    return await _pass_on(request, "/tokenize")


@router.post("/detokenize")
async def detokenize(request: Request) -> dict[str, Any]:
    """Token ids to text."""
    return await _pass_on(request, "/detokenize")


async def _pass_on(request: Request, path: str) -> dict[str, Any]:
    parts: GatewayParts = request.app.state.parts
    body = await read_json_object(request)
    if (model := body.pop("model", None)) is not None:
        # A route has the base model's tokenizer; the name only has to exist.
        await parts.catalog.resolve(str(model), None)
    return await parts.engine.post(path, body)
