"""What people think of an answer: a rating, a comment, or which choice they preferred."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Rating = Annotated[float, Field(ge=-1.0, le=1.0, allow_inf_nan=False)]
"""From -1, as bad as can be, to 1. Thumbs down and up are its two ends."""


class Feedback(BaseModel):
    """What one person said of one choice; said again, it takes the place of what was said before."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rating: Rating | None = None
    comment: str | None = None
    preferred_index: int | None = None
    """Index of the choice of the same prompt that the person liked best; it may be the choice itself."""
    user: str | None = None
    """Who, in the caller's words; None for everyone who was not named."""
    created_at: float
    """Unix time in seconds at which it was said first."""
    updated_at: float
    """And last."""
