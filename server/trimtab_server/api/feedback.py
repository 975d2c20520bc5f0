"""`POST /v1/feedback`: what a person thinks of an answer."""

from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.feedback import Rating
from trimtab_server.api.json_body import read_json_object
from trimtab_server.api.validation import parse_body
from trimtab_server.auth import require_api_key
from trimtab_server.storage.feedback import ChoiceName, SqlFeedback, StoredFeedback

_MAX_COMMENT = 10_000
_Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00]*$")]
_Index = Annotated[int, Field(ge=0, lt=2**31)]
_THUMBS = {"up": 1.0, "down": -1.0}


class FeedbackBody(BaseModel):
    """A rating, a comment or a preference, of one choice of one answer. `null` means not given."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    completion_id: _Name | None = None
    """The answer's `id`."""
    request_id: _Name | None = None
    """In its place, the `x-request-id` that the caller gave the request."""
    index: _Index = 0
    """The choice's `index`."""
    rating: Rating | None = None
    thumbs: Literal["up", "down"] | None = None
    """In the place of a rating: 1 or -1."""
    comment: str | None = Field(default=None, min_length=1, max_length=_MAX_COMMENT)
    preferred_index: _Index | None = None
    """The `index` of the choice of the same prompt that was liked best."""
    user: _Name | None = None
    """Who says so; the same one's next word takes the place of this one."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None or k not in cls.model_fields}

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if (self.completion_id is None) == (self.request_id is None):
            raise InvalidRequestError(
                "Name the answer by one of 'completion_id', its id, and 'request_id', your own 'x-request-id'.",
                param="completion_id",
            )
        if self.rating is not None and self.thumbs is not None:
            raise InvalidRequestError("'thumbs' takes the place of 'rating'; give one of them.", param="thumbs")
        if self.score is None and self.comment is None and self.preferred_index is None:
            raise InvalidRequestError(
                "There is nothing in it: give 'rating', 'thumbs', 'comment' or 'preferred_index'.", param="rating"
            )
        return self

    @property
    def score(self) -> float | None:
        """The rating, by number or by thumb."""
        return _THUMBS[self.thumbs] if self.thumbs is not None else self.rating


def build_feedback_router(store: SqlFeedback) -> APIRouter:
    """The route, behind an API key like the answers that it is about."""
    router = APIRouter(dependencies=[Depends(require_api_key)])

    @router.post("/v1/feedback")
    async def give(request: Request) -> dict[str, Any]:
        """Sent again, with other content or the same, it takes the place of what its user said before."""
        body = parse_body(FeedbackBody, await read_json_object(request))
        stored = await store.put(
            ChoiceName(body.index, body.completion_id, body.request_id),
            user=body.user,
            rating=body.score,
            comment=body.comment,
            preferred_index=body.preferred_index,
        )
        return _answer(stored)

    return router


def _answer(stored: StoredFeedback) -> dict[str, Any]:
    about = {"object": "feedback", "completion_id": stored.completion_id, "index": stored.index}
    return {**about, **stored.feedback.model_dump()}
