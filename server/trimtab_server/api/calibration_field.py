"""The field `calibration` of a request, shared by completions and chat completions."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_server.decoding.scoring import CalibrationChoice, Method

MAX_CALIBRATION_SIZE = 1024

CalibratorId = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]


class CalibrationField(BaseModel):
    """`calibration`: how the reward is calibrated.

    `{"size": 32}` is short for 32 reference rollouts of the same prompt, `{"size": 0}` for none, and
    `{"calibrator": "cal-..."}` for that pooled one.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    method: Method = "auto"
    size: int | None = Field(default=None, ge=0, le=MAX_CALIBRATION_SIZE)
    """Reference rollouts; None means the gateway's default."""
    calibrator: CalibratorId | None = None
    """Id of a pooled calibrator; None means the newest that fits."""
    allow_stale: bool = False
    """Use a pooled calibrator that was made for something else; its values are marked."""

    def choice(self, *, is_steered: bool, num_candidates: int) -> CalibrationChoice:
        """What it means for a request.

        Args:
            is_steered: Whether the request's candidates are steered.
            num_candidates: Candidates per prompt.

        Raises:
            InvalidRequestError: The fields do not go together, or not with the request.
        """
        is_pooled = self.method == "pooled" or (self.method == "auto" and self.calibrator is not None)
        if not is_pooled and (self.calibrator is not None or self.allow_stale):
            name = "calibrator" if self.calibrator is not None else "allow_stale"
            raise InvalidRequestError(
                f"'calibration.{name}' is only for the method 'pooled'.", param=f"calibration.{name}"
            )
        if self.size is not None and (is_pooled or self.method in ("leave_one_out", "none")):
            raise InvalidRequestError(
                "'calibration.size' is the number of reference rollouts, which only the method 'reference' draws.",
                param="calibration.size",
            )
        if self.method == "reference" and self.size == 0:
            raise InvalidRequestError(
                "The method 'reference' needs at least one reference rollout.", param="calibration.size"
            )
        if self.method == "leave_one_out":
            _check_leave_one_out(is_steered, num_candidates)
        return CalibrationChoice(
            size=self.size,
            method="pooled" if is_pooled else self.method,
            calibrator=self.calibrator,
            allow_stale=self.allow_stale,
        )


def _check_leave_one_out(is_steered: bool, num_candidates: int) -> None:
    if is_steered:
        raise InvalidRequestError(
            "'leave_one_out' ranks candidates among each other, so they must be the base model's own, and this request "
            "is steered: a calibrated reward says what the base would reach. Use 'reference' or 'pooled'.",
            param="calibration.method",
        )
    if num_candidates < 2:
        raise InvalidRequestError(
            "'leave_one_out' ranks candidates among each other and needs 'best_of' or 'n' of at least 2.",
            param="calibration.method",
        )
