"""How the choices of an answer are found among candidates: the `selection` field of requests, one class per strategy.

N below is the request's `best_of` (or its route's): the number of candidates, or the most there may be.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimtab_adapters.infalign.transforms import build_transform

MAX_CHECKPOINTS = 8
MAX_WAVE = 64
DEFAULT_CAP = 16
"""N of strategies that stop by themselves, where neither request nor route says it."""

Checkpoints = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=MAX_CHECKPOINTS)]
Probability = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SelectionStrategy(BaseModel):
    """What all strategies have.

    Attributes:
        needs_reward: Whether it can do without a reward.
        needs_calibration: Whether it reads calibrated values, which a raw reward cannot replace.
        has_own_cap: Whether N may be left out; `DEFAULT_CAP` then.
        max_choices: Most choices that it can give; None means N.
        needs_more_than_choices: Whether N must be larger than the number of choices for it to mean anything.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    needs_reward: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = False
    has_own_cap: ClassVar[bool] = False
    max_choices: ClassVar[int | None] = None
    needs_more_than_choices: ClassVar[bool] = True

    return_candidates: bool = False
    """Return every candidate with its reward, beside the choices."""
    stream: Literal["buffered"] | None = None
    """What `stream: true` means where choices are only known at the end: send them in chunks once they are."""
    on_failure: Literal["error", "leave_out"] = "error"
    """What a candidate that cannot be generated or scored means: an error of the request, or that it is left out and
    named in the answer. When none is left it is an error all the same."""


class BestOfN(SelectionStrategy):
    """All N are generated; the best are chosen, by reward or else by mean log-probability."""

    needs_reward: ClassVar[bool] = False
    needs_more_than_choices: ClassVar[bool] = False

    strategy: Literal["best_of_n"] = "best_of_n"


class Adaptive(SelectionStrategy):
    """Candidates are drawn until one is good enough, at most N; the best of them is chosen.

    Exactly one of `threshold`, `price` and `target` says what is good enough, on the calibrated scale: against the
    reference policy's own answers to the same prompt.
    """

    needs_calibration: ClassVar[bool] = True
    has_own_cap: ClassVar[bool] = True

    strategy: Literal["adaptive"]
    threshold: Probability | None = None
    """Stop at a calibrated reward of at least this: better than this share of the reference policy's answers."""
    price: Annotated[float, Field(gt=0, lt=0.5, allow_inf_nan=False)] | None = None
    """What one more candidate costs, in units of calibrated reward. The best threshold is 1 - sqrt(2 price)."""
    target: Annotated[float, Field(gt=0.5, lt=1, allow_inf_nan=False)] | None = None
    """The calibrated reward to reach on average. The threshold is chosen for it, N and `wave`, for candidates of the
    reference policy; a steered policy that is better stops earlier."""
    wave: int = Field(default=2, ge=1, le=MAX_WAVE)
    """Candidates that are generated at the same time: more of them wait less and cost more tokens."""

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        if sum(goal is not None for goal in (self.threshold, self.price, self.target)) != 1:
            raise ValueError("give exactly one of 'threshold', 'price' and 'target'")
        return self


class EarlyReject(SelectionStrategy):
    """N are started; at checkpoints those whose text so far is worst are stopped (arXiv 2410.20290)."""

    strategy: Literal["early_reject"]
    checkpoints: (
        Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=MAX_CHECKPOINTS)] | None
    ) = None
    """Numbers of tokens at which candidates are judged; by default one, 3/16 of `max_tokens`: with half of them stopped
    there, 59 % of the tokens are generated."""
    keep: Probability = 0.5
    """Share of the candidates that stays at each checkpoint, at least as many as there are choices."""
    prefix_reward: str | None = Field(default=None, min_length=1, max_length=128)
    """Registered reward that judges unfinished texts; by default the request's own."""

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if self.checkpoints is not None and any(
            a >= b for a, b in zip(self.checkpoints, self.checkpoints[1:], strict=False)
        ):
            raise ValueError("'checkpoints' must increase")
        return self


class Blockwise(SelectionStrategy):
    """The answer grows by blocks, each the best of N continuations.

    Controlled decoding's blockwise best of K (arXiv 2310.17022). It streams block by block. Continuations start from
    token ids, so nothing is tokenised twice.
    """

    max_choices: ClassVar[int | None] = 1

    strategy: Literal["blockwise"]
    block_tokens: int = Field(default=32, ge=1)
    """Tokens of a block."""
    prefix_reward: str | None = Field(default=None, min_length=1, max_length=128)
    """Registered reward that judges unfinished texts; by default the request's own."""


class TransformRequest(BaseModel):
    """A transform of the calibrated reward by name, see `trimtab_adapters.infalign.transforms.build_transform`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: Literal["identity", "log", "exponential", "best_of_n", "worst_of_n"]
    t: float | None = Field(default=None, allow_inf_nan=False)
    """Exponent of `exponential`."""
    n: int | None = Field(default=None, ge=1, le=1024)
    """Samples of the procedure that `best_of_n` or `worst_of_n` is for."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        build_transform(self.kind, t=self.t, n=self.n)
        return self


class TiltedSelection(SelectionStrategy):
    """Choices follow the reference policy tilted by exp(transform(C) / beta), with C the calibrated reward."""

    needs_calibration: ClassVar[bool] = True

    beta: Positive
    """Weight of the KL to the untilted policy: the smaller, the closer to the best candidate."""
    transform: TransformRequest = TransformRequest(kind="identity")
    """Of the calibrated reward: which procedure the policy is tuned for."""


class Soft(TiltedSelection):
    """All N are generated; choices are drawn among them with weights exp(transform(C) / beta) (arXiv 2505.03156)."""

    strategy: Literal["soft"]


class Rejection(TiltedSelection):
    """Candidates are drawn and accepted with probability exp((transform(C) - transform(1)) / beta).

    The tilted policy itself, without the bias of `soft`, as far as C is right. When N are spent, `soft` among those
    that were rejected decides and the answer says so.
    """

    has_own_cap: ClassVar[bool] = True

    strategy: Literal["rejection"]
    wave: int = Field(default=2, ge=1, le=MAX_WAVE)
    """Candidates that are generated at the same time."""


class Poisson(SelectionStrategy):
    """Best of a random number of candidates, 1 + Poisson(mean), at most N.

    Close to the optimal tilt of the calibrated reward (best-of-Poisson, arXiv 2506.19248).
    """

    has_own_cap: ClassVar[bool] = True

    strategy: Literal["poisson"]
    mean: Annotated[float, Field(gt=0, le=64, allow_inf_nan=False)]
    """Mean number of candidates beyond the first."""


SelectionRequest = BestOfN | Adaptive | EarlyReject | Blockwise | Soft | Rejection | Poisson
"""Any strategy."""

STRATEGIES: dict[str, type[SelectionRequest]] = {
    "best_of_n": BestOfN,
    "adaptive": Adaptive,
    "early_reject": EarlyReject,
    "blockwise": Blockwise,
    "soft": Soft,
    "rejection": Rejection,
    "poisson": Poisson,
}
