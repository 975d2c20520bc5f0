"""The configuration of `trimtab distill`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trimtab_training.config import CheckpointConfig, OptimiserConfig, PromptFile, SamplingConfig, check_tree, read_tree
from trimtab_training.config_section import ConfigSection


class ApiTeacher(ConfigSection):
    """The base behind an OpenAI-compatible completions API: a Trimtab gateway, an engine, or a provider's."""

    type: Literal["api"] = "api"
    url: str
    """Where it listens, without `/v1`."""
    model: str
    """Name of the base model there."""
    api_key_env: str = "TRIMTAB_API_KEY"
    """Environment variable with the key; none is sent when it is not set."""
    has_token_ids: bool = True
    """Whether it gives token ids (vLLM and Trimtab do). Otherwise tokens are told apart by their texts."""
    concurrency: int = Field(default=16, ge=1, le=1024)
    """Most requests in flight."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Limit for one request."""
    retry_for_s: float = Field(default=300.0, ge=0)
    """How long a busy or unreachable server is asked again before the run fails."""


class LocalTeacher(ConfigSection):
    """The base in this process."""

    type: Literal["local"] = "local"
    path: Path
    """Its directory."""


class DistillConfig(ConfigSection):
    """Everything that a distillation needs to know."""

    output_dir: Path
    """The student, metrics and checkpoints go here."""
    student: Path
    """Directory of the causal LM that the student starts from; needs the base's `tokenizer.json`."""
    teacher: Annotated[ApiTeacher | LocalTeacher, Field(discriminator="type")]
    """The base model."""
    prompts: PromptFile
    """What it is asked."""
    num_per_prompt: int = Field(default=4, ge=1, le=20)
    """Samples per prompt."""
    sampling: SamplingConfig = SamplingConfig()
    """How the base samples. The student learns this distribution: a policy needs temperature 1 and top_p 1."""
    top_logprobs: int = Field(default=0, ge=0, le=1000)
    """Alternatives per token that the teacher tells. 0 learns from the samples alone (likelihood of sequences);
    otherwise the student learns the teacher's distribution at each token, the tokens beyond these taken together."""
    held_out_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the prompts on whose samples fidelity is measured."""
    optimiser: OptimiserConfig = OptimiserConfig(lr=1e-4)
    """Learning rate and batch."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run's state is saved."""
    steps: int = Field(default=2000, ge=0)
    """Optimiser steps; 0 measures the fidelity of `student` as it is."""
    device: str = "cpu"
    """Torch device of the student."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of sampling, split and batches."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of metrics."""


def load_distill_config(path: Path, overrides: tuple[str, ...] = ()) -> DistillConfig:
    """Read a configuration file, see `config.read_tree`.

    Raises:
        InvalidRequestError: It is missing, malformed or does not fit.
    """
    return check_tree(DistillConfig, read_tree(path, overrides), "the configuration of the distillation")
