"""The parts of a training run, built from its configuration."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trimtab_adapters.contract.errors import ConflictError, IntegrityError, InvalidRequestError, NotFoundError
from trimtab_adapters.contract.params import VersionId
from trimtab_training.base_logits_cache import BaseLogitsCache
from trimtab_training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    open_checkpoint,
    restore_learner,
)
from trimtab_training.config import RewardConfig, TrainConfig
from trimtab_training.distillation.fidelity import FIDELITY_FILE
from trimtab_training.encoder_decoder import base_reader
from trimtab_training.evaluation.procedures import STANDARD, Chosen, parse_procedure
from trimtab_training.evaluation_config import SERVED, SecondRewardConfig
from trimtab_training.gateway import GatewayClient
from trimtab_training.interruption import Interruption
from trimtab_training.learner import Learner
from trimtab_training.logits_reader import LogitsReader, PackedReader, PaddedReader
from trimtab_training.lora_training import load_lora, with_lora
from trimtab_training.models import (
    AdapterStart,
    Vocabulary,
    end_token_ids,
    load_adapter_start,
    load_base_lm,
    load_causal_lm,
    num_output_columns,
)
from trimtab_training.models_config import ModelsConfig
from trimtab_training.objective_config import QuarkConfig
from trimtab_training.objectives.building import build_objective
from trimtab_training.policy import BuildPolicy, TailoredPolicy
from trimtab_training.processes import Processes
from trimtab_training.publish import INTERMEDIATE, VersionInfo, temporary_version
from trimtab_training.rewards import GatewayScorer, LocalScorer, RatedOnly, Scorer
from trimtab_training.rollouts import GatewaySource, LocalSource, NamedVersion, RolloutSource
from trimtab_training.transform_config import TransformConfig
from trimtab_training.transforms import fit_to_served

_INTERMEDIATE_SUFFIX = ".training"


def checkpoints_of(config: TrainConfig) -> Path:
    """Where the run's checkpoints are."""
    return config.output_dir / "checkpoints"


def find_checkpoint(config: TrainConfig, *, resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from; None for a new run.

    Raises:
        ConflictError: There are checkpoints, but `resume` is False or they belong to another configuration.
        IntegrityError: The newest one cannot be read.
    """
    path = latest_checkpoint(checkpoints_of(config))
    if path is None:
        return None
    if not resume:
        raise ConflictError(f"{config.output_dir} holds a run already; resume it or choose another output_dir")
    return open_checkpoint(path, config)


def build_learner(
    config: TrainConfig,
    vocabulary: Vocabulary,
    checkpoint: Checkpoint | None,
    *,
    processes: Processes | None = None,
    build_policy: BuildPolicy = TailoredPolicy,
) -> tuple[Learner, AdapterStart]:
    """Load both models and put them together with the objective and the optimiser; also what the adapter began as.

    Raises:
        AdapterError: A model cannot be loaded, or the two do not fit each other.
        IntegrityError: The checkpoint cannot be read.
    """
    models = config.models
    num_bins = config.objective.num_bins if isinstance(config.objective, QuarkConfig) else 0
    if checkpoint is None:
        start = load_adapter_start(
            models.adapter,
            vocabulary,
            num_bins=num_bins,
            seed=config.seed,
            device=models.device,
            control_token_ids=config.objective.control_token_ids if isinstance(config.objective, QuarkConfig) else None,
            can_grow=models.lora is None,
            start_scale=models.start_scale,
        )
        if models.lora is not None:
            start = replace(start, model=with_lora(start.model, models.lora, seed=config.seed))
    else:
        run = checkpoint.run
        source = checkpoint.adapter_path if models.lora is None else models.adapter
        adapter = load_causal_lm(source, dtype=torch.float32, device=models.device)
        if models.lora is not None:
            adapter = load_lora(adapter, checkpoint.adapter_path)
        start = AdapterStart(adapter, run.control_token_ids, run.fixed_prefix, run.parent)
    base = load_base_lm(models.base_model, dtype=getattr(torch, models.base_dtype), device=models.device)
    num_known = min(vocabulary.num_tokens, num_output_columns(base), num_output_columns(start.model))
    learner = Learner(
        policy_of(models, base, start.model, num_known=num_known, build_policy=build_policy),
        build_objective(
            config.objective,
            start,
            end_token_ids=end_token_ids(base) | frozenset(config.sampling.stop_token_ids),
            seed=config.seed,
        ),
        optimiser=config.optimiser,
        num_steps=config.steps,
        processes=processes,
    )
    if checkpoint is not None:
        restore_learner(checkpoint, learner)
    return learner, start


def policy_of(
    models: ModelsConfig, base: Any, adapter: Any, *, num_known: int, build_policy: BuildPolicy = TailoredPolicy
) -> TailoredPolicy:
    """Both models as the configuration wants them computed with."""
    reader: LogitsReader = PaddedReader() if models.pack_tokens is None else PackedReader(models.pack_tokens)
    own_reader = base_reader(base, reader)
    if models.base_cache_gib:
        own_reader = BaseLogitsCache(own_reader, int(models.base_cache_gib * 2**30))
    if models.gradient_checkpointing:
        adapter.gradient_checkpointing_enable()
    return build_policy(
        base,
        adapter,
        alpha=models.alpha,
        num_known=num_known,
        reader=reader,
        base_reader=own_reader,
        compute_dtype=getattr(torch, models.compute_dtype),
    )


def build_scorer(config: TrainConfig, gateway: GatewayClient | None) -> Scorer:
    """The reward that `config.reward` names.

    Raises:
        InvalidRequestError: It is local and no package publishes it.
    """
    if config.reward.source == "feedback":
        return RatedOnly(config.reward.name)
    return _scorer(config.reward, gateway)


def build_second_scorer(config: TrainConfig, gateway: GatewayClient | None) -> Scorer | None:
    """The reward that `config.evaluation.second_reward` names, if it does. Raises as `build_scorer` does."""
    second = config.evaluation.second_reward
    return None if second is None else _scorer(second, gateway)


def _scorer(config: RewardConfig | SecondRewardConfig, gateway: GatewayClient | None) -> Scorer:
    if config.source == "local":
        return LocalScorer.load(config.name)
    return GatewayScorer(_connected(gateway), config.name, batch_size=config.batch_size)


def build_source(
    config: TrainConfig,
    learner: Learner,
    vocabulary: Vocabulary,
    *,
    gateway: GatewayClient | None,
    interruption: Interruption,
    describe: Callable[[], VersionInfo],
) -> RolloutSource:
    """Where fresh rollouts are drawn; `describe` gives the manifest of an intermediate version."""
    if config.fresh.source == "local":
        return LocalSource(
            learner.policy,
            adapter_prefix=learner.objective.prefix,
            vocabulary=vocabulary,
            sampling=config.sampling,
            end_token_ids=end_token_ids(learner.policy.base),
            interruption=interruption,
        )
    connection = _connected(gateway)
    if config.fresh.model is None:
        raise InvalidRequestError("fresh.model is missing")

    def current_version() -> AbstractContextManager[NamedVersion]:
        store = config.output_dir / INTERMEDIATE
        return temporary_version(connection, store, learner.policy.adapter, vocabulary, describe())

    return GatewaySource(
        connection,
        model=config.fresh.model,
        sampling=config.sampling,
        current_version=current_version,
        with_logprobs=learner.objective.is_on_policy,
    )


def build_round_source(source: RolloutSource, learner: Learner) -> RolloutSource:
    """Where the rounds that are learned from are drawn: `source`, under the mask of an objective that has one.

    The evaluation draws from `source` itself, because what is served has no mask.

    Raises:
        InvalidRequestError: The objective has a mask, and an engine draws.
    """
    mask = learner.objective.token_mask
    if mask is None:
        return source
    if not isinstance(source, LocalSource):
        raise InvalidRequestError('an engine cannot draw under a mask of the objective; set fresh.source = "local"')
    return source.under(mask)


def served_transform(config: TrainConfig, gateway: GatewayClient | None) -> TransformConfig:
    """The reward transform of the run; `served` is looked up: it fits the route that the run publishes to.

    Raises:
        TrimtabError: The gateway could not tell, other than that there is no such route yet.
    """
    transform = config.reward.transform
    if transform.kind != "served":
        return transform
    if config.reward.source == "feedback":
        return fit_to_served(transform, best_of=1)  # there are no ratings of reference rollouts
    return fit_to_served(transform, best_of=_served_best_of(config, gateway) or 1)


def served_procedure(config: TrainConfig, gateway: GatewayClient | None) -> Chosen:
    """The procedure of the evaluation: see `EvaluationConfig.procedure`. Raises as `served_transform` does."""
    if config.evaluation.procedure != SERVED:
        chosen = parse_procedure(config.evaluation.procedure)
        assert isinstance(chosen, Chosen)  # the configuration allows no other
        return chosen
    best_of = _served_best_of(config, gateway)
    if best_of is not None:
        return Chosen("best", best_of)
    transform = config.reward.transform
    if transform.n is None:
        return STANDARD
    return Chosen("best" if transform.procedure == "best_of_n" else "worst", transform.n)


def _served_best_of(config: TrainConfig, gateway: GatewayClient | None) -> int | None:
    """N of the route that the run publishes to; None where there is no such route."""
    if gateway is None or config.publish.route is None:
        return None
    try:
        return int(gateway.route(config.publish.route).get("best_of") or 1)
    except NotFoundError:
        return None


def intermediate_name(name: str) -> str:
    """Name of the versions in the making: not `name` itself, whose newest version others may ask for."""
    return name[: 64 - len(_INTERMEDIATE_SUFFIX)] + _INTERMEDIATE_SUFFIX


def version_info(
    config: TrainConfig,
    learner: Learner,
    *,
    name: str,
    parent: VersionId | None,
    reward: str,
    transform: TransformConfig,
    evaluation: dict[str, Any],
) -> VersionInfo:
    """The manifest's part that tells how the policy, as it is now, came about."""
    return VersionInfo(
        name=name,
        alpha=config.models.alpha,
        prefix_token_ids=learner.objective.prefix,
        reward=reward,
        evaluation=evaluation,
        trunk=config.models.adapter if config.models.lora is not None else None,
        training={
            **learner.objective.describe(),
            "objective": config.objective.model_dump(mode="json"),
            "reward_transform": transform.model_dump(mode="json", exclude_defaults=True),
            "base_model": str(config.models.base_model),
            **approximation_of(config.models.base_model),
            "parent": parent,
            "alpha": config.models.alpha,
            "step": learner.step,
            "num_steps": config.steps,
            "seed": config.seed,
            "optimiser": config.optimiser.model_dump(mode="json"),
            "sampling": config.sampling.model_dump(mode="json"),
        },
    )


def approximation_of(base_model: Path) -> dict[str, Any]:
    """How close a distilled base is to what it stands in for, for the manifest; empty for any other base.

    Raises:
        IntegrityError: What says so cannot be read.
    """
    path = base_model / FIDELITY_FILE
    if not path.exists():
        return {}
    try:
        return {"approximate_policy": json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError) as exc:
        raise IntegrityError(f"{path} cannot be read: {exc}") from exc


@contextmanager
def cpu_threads(num: int | None) -> Iterator[None]:
    """Let torch use `num` CPU threads for a while; None leaves them alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(num or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _connected(gateway: GatewayClient | None) -> GatewayClient:
    if gateway is None:
        raise InvalidRequestError("the configuration needs a [gateway]")
    return gateway
