"""The configuration of a training run: one frozen tree, read once, unknown keys fail.

A file is TOML or JSON (by its ending); a training job carries the same tree as a JSON object.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AliasChoices, Field, ValidationError, model_validator

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.params import AdapterName
from trimtab_training.config_section import ConfigSection
from trimtab_training.evaluation_config import EvaluationConfig
from trimtab_training.gate_config import GateConfig
from trimtab_training.logged_config import LoggedConfig
from trimtab_training.models_config import ModelsConfig
from trimtab_training.objective_config import (
    BonbonConfig,
    NlpoConfig,
    ObjectiveConfig,
    QuarkConfig,
    RlooConfig,
    VbonConfig,
)
from trimtab_training.report_config import ReportConfig
from trimtab_training.transform_config import TransformConfig

UnitInterval = Annotated[float, Field(gt=0.0, le=1.0)]


_Tree = TypeVar("_Tree", bound=ConfigSection)


class GatewayConfig(ConfigSection):
    """The gateway that draws, scores, registers and routes."""

    url: str
    """Where the gateway listens, for example http://127.0.0.1:8000."""
    admin_key_env: str = "TRIMTAB_ADMIN_KEY"
    """Environment variable with the key of the admin API."""
    api_key_env: str = "TRIMTAB_API_KEY"
    """Environment variable with a key for `/v1`; the admin key is used when it is not set."""
    concurrency: int = Field(default=16, ge=1, le=1024)
    """Most requests in flight at a time."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Limit for one request."""
    retry_for_s: float = Field(default=300.0, ge=0)
    """How long a busy or restarting gateway (429, 503, refused connections) is asked again before the run fails."""


class RewardConfig(ConfigSection):
    """What the adapter is trained to raise."""

    name: str
    """Name of the reward."""
    source: Literal["gateway", "local", "feedback"] = "gateway"
    """Whether the gateway scores, or the entry point of that name (group `trimtab.rewards`) in this process, or people
    did: the reward of a logged rollout is then the mean of its ratings, and what nobody rated is left out. So there are
    no fresh rollouts and no evaluation, and `name` is only what the manifest calls it."""
    batch_size: int = Field(default=256, ge=1, le=4096)
    """Outputs per scoring call."""
    transform: TransformConfig = TransformConfig()
    """What the objective is given in place of the reward."""


class PromptFile(ConfigSection):
    """Prompts from a JSON Lines file."""

    type: Literal["file"] = "file"
    path: Path
    """Each line is an object with `prompt` (text) or `prompt_token_ids`; other fields are ignored."""


class PromptLog(ConfigSection):
    """The distinct prompts of the logged rollouts that `logged` selects."""

    type: Literal["log"] = "log"


class FreshConfig(ConfigSection):
    """Rollouts drawn from the current policy while training goes on."""

    source: Literal["gateway", "local"] = "gateway"
    """Whether the engine behind the gateway draws, or the two models in this process."""
    model: str | None = None
    """Model name to draw from through the gateway: the base model or a route; its steering is overridden."""
    interval: int = Field(default=500, ge=0)
    """Steps between two rounds; 0 draws none, so the run learns from the log alone. Objectives that learn from the
    newest round alone draw one whenever they have used up the last, and with 0 go through the log again."""
    prompts_per_round: int | None = Field(default=None, ge=1)
    """Prompts per round; left out means every training prompt."""
    num_per_prompt: int = Field(default=1, ge=1, le=20)
    """Rollouts per prompt."""
    min_pool_size: int = Field(default=256, ge=0)
    """With fewer logged rollouts than this, the base alone draws one round before the first step."""


class SamplingConfig(ConfigSection):
    """How outputs are sampled, in fresh rounds and in the evaluation."""

    max_tokens: int = Field(default=64, ge=1)
    """Longest output in tokens."""
    temperature: float = Field(default=1.0, gt=0, le=2)
    """Divides the steered logits."""
    top_p: UnitInterval = 1.0
    """Nucleus of the steered distribution that is sampled from, after temperature."""
    stop: tuple[str, ...] = Field(default=(), max_length=4)
    """Texts that end an output; only the gateway can cut by text."""
    stop_token_ids: tuple[int, ...] = Field(default=(), max_length=64)
    """Tokens that end an output, besides the base model's own end-of-text; they stay part of the output's ids."""


class OptimiserConfig(ConfigSection):
    """Adam with linear warm-up and linear decay to 0."""

    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""
    eps: float = Field(default=1e-5, gt=0)
    """Adam's epsilon."""
    batch_size: int = Field(default=64, ge=1)
    """Rollouts per micro-batch."""
    grad_accumulation: int = Field(default=1, ge=1)
    """Micro-batches per step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from 0."""
    decay: Literal["linear", "none"] = "linear"
    """What the learning rate does after warm-up."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Gradients are scaled down to this norm; left out means never."""


class CheckpointConfig(ConfigSection):
    """Resumable checkpoints in `output_dir/checkpoints`."""

    every: int = Field(default=500, ge=0)
    """Steps between two checkpoints; 0 writes one only when the run is interrupted and at its end."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""


class LimitsConfig(ConfigSection):
    """What a run may take. Beyond a limit it writes a checkpoint and fails; raise the limit to let it go on."""

    time_s: float | None = Field(default=None, gt=0)
    """Seconds, over all attempts up to their last checkpoint and the present one; left out means any."""
    memory_gib: float | None = Field(default=None, gt=0)
    """Resident memory in GiB of all the run's processes together; left out means any. Memory that processes share
    counts in each."""
    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """GPU memory in GiB that torch holds in the first process; left out means any."""
    interval_s: float = Field(default=1.0, gt=0, le=60)
    """Seconds between two looks at the memory."""


class PublishConfig(ConfigSection):
    """The version that comes out."""

    name: AdapterName
    """Name of the adapter that the result is a version of."""
    route: str | None = None
    """Route to switch to the new version; left out means that nothing is activated."""
    require_gate: bool = Field(default=True, validation_alias=AliasChoices("require_gate", "require_improvement"))
    """Activate, or try as a canary, only when the gate has passed. Its older name, `require_improvement`, is read as
    well."""
    canary_percent: float | None = Field(default=None, gt=0, lt=100)
    """Share of the route's requests that the new version takes first; the gateway compares their answers with those of
    the others and promotes it or rolls it back. Left out, or where the route is new, it takes all at once."""


class TrainConfig(ConfigSection):
    """Everything that a training run needs to know."""

    output_dir: Path
    """Metrics, checkpoints and versions go here; the gateway must see it under the same path."""
    models: ModelsConfig
    """Base LM and adapter LM."""
    reward: RewardConfig
    """What is to rise."""
    prompts: PromptFile | PromptLog = Field(discriminator="type")
    """What is asked: a file or the log."""
    publish: PublishConfig
    """What becomes of the result."""
    gateway: GatewayConfig | None = None
    """Left out, everything happens in this process: local reward, local rollouts, prompts from a file, no log."""
    logged: LoggedConfig = LoggedConfig()
    """Rollouts from the log."""
    fresh: FreshConfig = FreshConfig()
    """Rollouts drawn during training."""
    sampling: SamplingConfig = SamplingConfig()
    """How outputs are drawn."""
    objective: ObjectiveConfig = QuarkConfig()
    """How the adapter learns."""
    optimiser: OptimiserConfig = OptimiserConfig()
    """Learning rate and batch."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run's state is saved."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The comparison at the end."""
    gate: GateConfig = GateConfig()
    """What the comparison must show before the version may take traffic."""
    report: ReportConfig = ReportConfig()
    """The report at the end."""
    limits: LimitsConfig = LimitsConfig()
    """When the run is broken off."""
    steps: int = Field(default=8000, ge=1)
    """Optimiser steps of the whole run."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seeds control tokens, held-out prompts, batches and sampling."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; left out means torch's own choice. 1 is faster where an engine keeps the cores busy."""
    processes: int = Field(default=1, ge=1, le=64)
    """Processes on this machine that share the rows of each step, with a GPU each where `models.device` is `cuda`."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of metrics."""

    @property
    def kl_coef(self) -> float:
        """The objective's weight of KL(tailored || base); 0 where it has none."""
        return 0.0 if isinstance(self.objective, BonbonConfig) else self.objective.kl_coef

    @model_validator(mode="after")
    def _gateway_where_needed(self) -> Self:
        if self.gateway is None:
            reads_log = self.logged.enabled and not self.logged.path
            needs = {
                'reward.source = "gateway"': self.reward.source == "gateway",
                'fresh.source = "gateway"': self.fresh.source == "gateway",
                'prompts.type = "log" without logged.path': isinstance(self.prompts, PromptLog) and reads_log,
                "logged.enabled = true without logged.path": reads_log,
                "publish.route": self.publish.route is not None,
            }
            if named := [field for field, is_set in needs.items() if is_set]:
                raise ValueError(f"there is no [gateway], but {', '.join(named)} needs one")
        elif self.fresh.source == "gateway" and self.fresh.model is None:
            raise ValueError("fresh.model must name the model or route to draw from through the gateway")
        if self.fresh.source == "local" and self.sampling.stop:
            raise ValueError('sampling.stop needs fresh.source = "gateway"')
        if isinstance(self.prompts, PromptLog) and not self.logged.enabled:
            raise ValueError('prompts.type = "log" needs logged.enabled = true')
        if self.publish.route is not None and self.publish.require_gate and self.evaluation.share == 0:
            raise ValueError("publish.require_gate needs an evaluation: set evaluation.share above 0")
        if self.fresh.interval == 0 and not self.logged.enabled:
            raise ValueError("fresh.interval = 0 and logged.enabled = false leave nothing to learn from")
        return self

    @model_validator(mode="after")
    def _feedback_suffices(self) -> Self:
        if self.reward.source != "feedback":
            return self
        refused = {
            "fresh.interval = 0: nobody rates fresh rollouts": self.fresh.interval != 0,
            "evaluation.share = 0: nobody rates its outputs": self.evaluation.share != 0,
            'reward.transform.kind = "raw": nobody rated reference rollouts': self.reward.transform.kind
            not in ("raw", "served"),
            "an objective with a pool or importance weights: quark, rloo or ppo": self.objective.kind
            not in ("quark", "rloo", "ppo"),
        }
        if named := [need for need, is_missing in refused.items() if is_missing]:
            raise ValueError(f'reward.source = "feedback" needs {"; ".join(named)}')
        return self

    @model_validator(mode="after")
    def _log_is_a_fair_sample(self) -> Self:
        logged = self.logged
        chosen_by = (logged.min_rating, logged.max_rating, logged.reward)
        if not isinstance(self.objective, QuarkConfig) and logged.enabled and any(c is not None for c in chosen_by):
            raise ValueError(
                f"objective.kind = {self.objective.kind!r} weighs rollouts by their probability, which is void where "
                "they were chosen by what came of them: leave logged.min_rating, max_rating and reward out"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_fits(self) -> Self:
        second = self.evaluation.second_reward
        if second is None:
            if self.gate.min_second_reward_difference is not None:
                raise ValueError("gate.min_second_reward_difference needs evaluation.second_reward")
            return self
        if second.name == self.reward.name:
            raise ValueError("evaluation.second_reward is the reward itself")
        if self.gateway is None and second.source == "gateway":
            raise ValueError('there is no [gateway], but evaluation.second_reward.source = "gateway" needs one')
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
        objective = self.objective
        if isinstance(objective, QuarkConfig):
            return self
        if self.sampling.temperature != 1.0 or self.sampling.top_p != 1.0:
            raise ValueError(
                f"objective.kind = {objective.kind!r} needs rollouts of the policy as it is: sampling.temperature = 1 "
                "and sampling.top_p = 1"
            )
        if isinstance(objective, RlooConfig | VbonConfig) and self.fresh.num_per_prompt < 2:
            raise ValueError(
                f"objective.kind = {objective.kind!r} compares outputs for the same prompt: set fresh.num_per_prompt "
                "to 2 or more"
            )
        if isinstance(objective, BonbonConfig) and self.fresh.num_per_prompt != objective.n:
            raise ValueError(
                f"objective.kind = 'bonbon' learns from n outputs for each prompt: set fresh.num_per_prompt to "
                f"{objective.n}"
            )
        if isinstance(objective, NlpoConfig) and self.fresh.source != "local":
            raise ValueError(
                "objective.kind = 'nlpo' draws under a mask, which an engine cannot: set fresh.source = \"local\""
            )
        if isinstance(objective, BonbonConfig | NlpoConfig) and self.logged.enabled:
            drawn = "from the base" if isinstance(objective, BonbonConfig) else "under its mask"
            raise ValueError(
                f"objective.kind = {objective.kind!r} learns only from what it draws {drawn}: set logged.enabled = "
                "false"
            )
        return self


def parse_config(data: Mapping[str, Any]) -> TrainConfig:
    """Validate a configuration tree.

    Raises:
        InvalidRequestError: It does not fit; the message names each field.
    """
    return check_tree(TrainConfig, data, "the training configuration")


def check_tree(kind: type[_Tree], data: Mapping[str, Any], what: str) -> _Tree:
    """Validate a configuration tree of any kind.

    Args:
        kind: Its root.
        data: The values.
        what: What the message calls it.

    Raises:
        InvalidRequestError: It does not fit; the message names each field.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as exc:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in exc.errors())
        raise InvalidRequestError(f"{what} is not valid: {problems}") from exc


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a training run, see `read_tree`.

    Raises:
        InvalidRequestError: The file is missing or malformed, or the result does not fit.
    """
    return parse_config(read_tree(path, overrides))


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a configuration file and apply `section.key=value` overrides.

    Args:
        path: A `.toml` or `.json` file.
        overrides: Values are read as JSON and, where that fails, taken as text.

    Raises:
        InvalidRequestError: The file is missing or malformed, or an override is.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as exc:
        raise InvalidRequestError(f"the configuration {path} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise InvalidRequestError(f"the configuration {path} is malformed: {exc}") from exc
    if not isinstance(data, dict):
        raise InvalidRequestError(f"the configuration {path} is not an object")
    for override in overrides:
        _apply_override(data, override)
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, raw = override.partition("=")
    if not separator or not all(key.split(".")):
        raise InvalidRequestError(f"--set {override!r} is not of the form section.key=value")
    try:
        value: Any = json.loads(raw)
    except ValueError:
        value = raw
    *sections, last = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise InvalidRequestError(f"--set {override!r}: {section} is not a section")
    data[last] = value
