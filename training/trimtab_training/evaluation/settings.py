"""The configuration of `trimtab evaluate`: one frozen tree, from a file or from command line flags."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.params import SteeringRequest
from trimtab_training.config import GatewayConfig, SamplingConfig, check_tree
from trimtab_training.config_section import ConfigSection
from trimtab_training.evaluation.intervals import IntervalMethod
from trimtab_training.evaluation.procedures import Chosen, Procedure, Served, parse_procedure

PolicyName = Annotated[str, Field(pattern=r"^[^@\s][^@]*$", max_length=256)]


class PolicyConfig(ConfigSection):
    """A policy: a model name that the gateway serves, with a steering of its own where one is given."""

    name: PolicyName
    """What the report calls it; no '@'. Also part of the seeds, so that two policies do not share noise."""
    model: str | None = None
    """Model name in the requests; left out it is `name`, or the base model where there is a `steering`."""
    steering: dict[str, Any] | None = None
    """Request field `steering`; left out the model's own holds."""

    @field_validator("steering")
    @classmethod
    def _is_steering(cls, steering: dict[str, Any] | None) -> dict[str, Any] | None:
        if steering is not None:
            try:
                SteeringRequest.model_validate(steering)
            except ValidationError as exc:
                problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
                raise ValueError(f"it is not a steering: {problems}") from exc
            if steering.get("explain"):
                raise ValueError("an evaluation has no use for 'explain'")
        return steering


class Side(ConfigSection):
    """One side of a comparison: a policy under a procedure, written `policy@procedure`."""

    policy: str
    procedure: str = "standard"

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            policy, _, procedure = value.partition("@")
            return {"policy": policy, "procedure": procedure or "standard"}
        return value

    @property
    def parsed(self) -> Procedure:
        """The procedure."""
        return parse_procedure(self.procedure)

    @property
    def draws(self) -> tuple[str, Served | None]:
        """The samples that it needs: plain ones of the policy, or those that the gateway chose as it was asked."""
        return self.policy, self.parsed if isinstance(self.parsed, Served) else None


class IntervalConfig(ConfigSection):
    """How uncertain means over prompts are."""

    method: IntervalMethod = "t"
    """`t`, the normal formula for clusters, or `bca` or `percentile`, bootstraps over prompts, which cover too little
    with few prompts (docs/evaluate.md has the measurement)."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Coverage."""
    num_resamples: int = Field(default=2000, ge=100, le=100_000)
    """Of the bootstrap."""


class OutputConfig(ConfigSection):
    """Files to write, besides the table on the terminal."""

    json_file: Path | None = None
    """The report."""
    csv_file: Path | None = None
    """Its win rates, one per line."""
    plot_file: Path | None = None
    """Win rate against KL; the ending says the format."""

    @field_validator("plot_file")
    @classmethod
    def _is_picture(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"{path} must end in .png, .svg or .pdf")
        return path


class EvaluateConfig(ConfigSection):
    """Everything that an evaluation needs to know."""

    gateway: GatewayConfig
    """Where the policies are served."""
    prompts: Path
    """JSON Lines; each line is an object with `prompt`, `prompt_token_ids` or `messages`."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Only the first so many different prompts."""
    reward: str
    """Registered reward by which procedures choose and wins are counted."""
    judge: str | None = None
    """Another registered reward by which wins are counted as well, with the choices of `reward`."""
    policies: tuple[PolicyConfig, ...] = Field(min_length=1)
    """What is compared."""
    reference: str | None = None
    """Name of the reference policy; left out it is the first."""
    procedures: tuple[str, ...] = ("standard",)
    """`standard`, `best_of_n:N`, `worst_of_n:N`, `served:{...}`; each acts on both sides of a comparison."""
    pairs: tuple[tuple[Side, Side], ...] = ()
    """Further comparisons of two sides, each written `policy@procedure`."""
    samples: int = Field(default=32, ge=2, le=4096)
    """Samples per prompt and policy."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Every sample's seed follows from this one."""
    common_seeds: bool = False
    """Whether policies share their noise: sample i of a prompt has the same seed under each."""
    sampling: SamplingConfig = SamplingConfig()
    """How outputs are sampled."""
    reward_batch_size: int = Field(default=256, ge=1, le=4096)
    """Outputs per scoring call."""
    interval: IntervalConfig = IntervalConfig()
    """Errors of the estimates."""
    work_dir: Path | None = None
    """Samples are kept here, so that an interrupted or repeated run draws only what is missing."""
    output: OutputConfig = OutputConfig()
    """Files to write."""

    @property
    def reference_name(self) -> str:
        """Name of the reference policy."""
        return self.reference if self.reference is not None else self.policies[0].name

    @property
    def parsed_procedures(self) -> tuple[Procedure, ...]:
        """The procedures, each once."""
        return tuple(dict.fromkeys(parse_procedure(text) for text in self.procedures))

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [policy.name for policy in self.policies]
        if len(set(names)) != len(names):
            raise ValueError(f"two policies have the same name: {', '.join(names)}")
        named = {self.reference_name, *(side.policy for pair in self.pairs for side in pair)}
        if unknown := sorted(named - set(names)):
            raise ValueError(f"there is no policy {', '.join(unknown)}; there are {', '.join(names)}")
        if self.judge == self.reward:
            raise ValueError("the judge is the reward itself")
        return self

    @model_validator(mode="after")
    def _samples_suffice(self) -> Self:
        try:
            for first, second in self.pairs:
                self._check_samples(first, second)
            for text in self.procedures:
                reference = Side(policy=self.reference_name, procedure=text)
                _check_size(text, _size(reference), self.samples)
                for policy in self.policies:
                    if policy.name != self.reference_name:
                        self._check_samples(Side(policy=policy.name, procedure=text), reference)
        except InvalidRequestError as exc:
            raise ValueError(exc.message) from exc
        return self

    def _check_samples(self, first: Side, second: Side) -> None:
        sizes = _size(first), _size(second)
        is_disjoint = self.common_seeds or first.draws == second.draws
        apart = ", of which no two of an index (one policy on both sides, or common seeds)" if is_disjoint else ""
        needed = sum(sizes) if is_disjoint else max(sizes)
        _check_size(f"{first.procedure} against {second.procedure}", needed, self.samples, apart)


def _size(side: Side) -> int:
    return side.parsed.n if isinstance(side.parsed, Chosen) else 1


def _check_size(what: str, needed: int, samples: int, apart: str = "") -> None:
    if needed > samples:
        raise ValueError(f"{what} needs {needed} samples per prompt{apart}; samples is {samples}")


def parse_config(data: Mapping[str, Any]) -> EvaluateConfig:
    """Validate a configuration tree.

    Raises:
        InvalidRequestError: It does not fit; the message names each field.
    """
    return check_tree(EvaluateConfig, data, "the evaluation's configuration")
