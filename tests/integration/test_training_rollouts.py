"""Where a training run's rollouts come from, on the real engine and the real log."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gateway_process import RunningGateway
from tiny_models import NUM_TOKENS, TinyModels
from trimtab_adapters.contract.engine_api import EngineStatus
from trimtab_adapters.contract.manifest import read_manifest
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_client import Client
from trimtab_training.config import PromptLog, SamplingConfig, TrainConfig, parse_config
from trimtab_training.gateway import GatewayClient, ScoreReply
from trimtab_training.logged_config import LoggedConfig
from trimtab_training.logged_rewards import samples_of
from trimtab_training.logged_rollouts import RolloutSieve, read_logged
from trimtab_training.models import Vocabulary, load_causal_lm, load_vocabulary
from trimtab_training.policy import TailoredPolicy, evaluating
from trimtab_training.prompts import Prompt
from trimtab_training.publish import VersionInfo, temporary_version
from trimtab_training.recipes.train import train
from trimtab_training.rollouts import GatewaySource, Sample
from trimtab_training.sampling_settings import model_defaults

pytestmark = pytest.mark.engine

TOLERANCE = 1e-3
"""Nats per token between the engine's float32 and the trainer's; measured differences are below 1e-5."""


class LowTokens:
    """Reward: the share of the lower half of the vocabulary."""

    name = "low"

    def score(self, inputs: Any) -> ScoreReply:
        def share(item: RewardInput) -> float:
            numbers = [int(word[1:]) for word in item.output.split() if word[1:].isdigit()]
            return sum(number < NUM_TOKENS // 2 for number in numbers) / max(1, len(numbers))

        return ScoreReply(rewards=[share(item) for item in inputs], version="1")


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[GatewayClient]:
    with GatewayClient(gateway.url) as made:
        yield made


@pytest.fixture(scope="module")
def vocabulary(tiny_models: TinyModels) -> Vocabulary:
    return load_vocabulary(tiny_models.base)


def engine_status(gateway: RunningGateway) -> EngineStatus:
    with gateway.client() as http:
        (engine,) = http.get("/admin/engines").json()["data"]
    return EngineStatus.model_validate(engine["status"])


def wait_until_freed(gateway: RunningGateway, name: str) -> EngineStatus:
    """The engine's status once no version of an adapter is in its memory; fails after half a minute."""
    deadline = time.monotonic() + 30
    while True:
        status = engine_status(gateway)
        if all(version.name != name for version in status.versions):
            return status
        assert time.monotonic() < deadline, f"{name} is still in the engine's memory"
        time.sleep(0.2)


def prompts(seed: int, num: int) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    return [Prompt(" ".join(f"t{token}" for token in rng.integers(1, NUM_TOKENS, 6))) for _ in range(num)]


def differences(policy: TailoredPolicy, samples: list[Sample], prefix: tuple[int, ...]) -> float:
    """Largest difference between recorded log-probabilities and the trainer's own, steered and base."""
    with evaluating(policy.adapter):
        output = policy.forward(
            [s.prompt_token_ids for s in samples], [s.output_token_ids for s in samples], [prefix] * len(samples)
        )
    largest = 0.0
    for row, sample in enumerate(samples):
        recorded = (sample.steered_logprobs, sample.base_logprobs)
        for own, logged in zip(output.token_logprobs(), recorded, strict=True):
            assert logged is not None
            assert len(logged) == len(sample.output_token_ids)
            difference = own[row, : len(logged)] - torch.tensor(logged)
            largest = max(largest, float(difference.abs().max()))
    return largest


@pytest.mark.parametrize(("prefix", "alpha"), [((), 1.0), ((NUM_TOKENS + 2,), -0.5)], ids=["plain", "control token"])
def test_recorded_logprobs_are_the_trainers_own_and_the_version_leaves_nothing_behind(
    gateway: RunningGateway,
    client: GatewayClient,
    tiny_models: TinyModels,
    vocabulary: Vocabulary,
    tmp_path: Path,
    prefix: tuple[int, ...],
    alpha: float,
) -> None:
    name = f"drawn{len(prefix)}"
    base = load_causal_lm(tiny_models.base, dtype=torch.float32, device="cpu")
    adapter = load_causal_lm(tiny_models.other, dtype=torch.float32, device="cpu")
    policy = TailoredPolicy(base, adapter, alpha=alpha, num_known=NUM_TOKENS)
    before = wait_until_freed(gateway, name)
    info = VersionInfo(name=name, alpha=alpha, prefix_token_ids=prefix, training={})
    source = GatewaySource(
        client,
        model="base",
        sampling=SamplingConfig(max_tokens=12),
        current_version=lambda: temporary_version(client, tmp_path, adapter, vocabulary, info),
        with_logprobs=True,
    )
    drawn = source.draw(prompts(1, 6), num_per_prompt=4, seed=3, steered=True)
    fresh = [sample for group in drawn for sample in group]
    assert differences(policy, fresh, prefix) < TOLERANCE

    # And so they are in the log, from which a later run may learn with importance weights.
    sieve = RolloutSieve(read_logged(LoggedConfig(adapter=name), client))
    sieve.leave_out_incomplete()
    assert (len(sieve.rollouts), sieve.left_out) == (24, {})
    logged = samples_of(sieve.rollouts, vocabulary, model_defaults(tiny_models.base))
    assert differences(policy, logged, prefix) < TOLERANCE
    assert {sample.output_token_ids for sample in logged} == {sample.output_token_ids for sample in fresh}

    after = wait_until_freed(gateway, name)
    assert after.weights.used_bytes == before.weights.used_bytes
    assert list(tmp_path.iterdir()) == []


def run_config(served: RunningGateway, models: TinyModels, directory: Path, **changes: Any) -> TrainConfig:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt.text}) + "\n" for prompt in prompts(11, 8)))
    sections: dict[str, Any] = {
        "output_dir": str(directory / "run"),
        "models": {"base_model": str(models.base), "adapter": str(models.adapter)},
        "gateway": {"url": served.url},
        "reward": {"name": "low", "source": "local"},
        "prompts": {"type": "file", "path": str(path)},
        "publish": {"name": "trained"},
        "logged": {"enabled": False},
        "fresh": {"source": "gateway", "model": "base", "interval": 2, "num_per_prompt": 2, "min_pool_size": 1},
        "sampling": {"max_tokens": 6},
        "optimiser": {"batch_size": 8, "lr": 1e-3},
        "evaluation": {"share": 0.25, "num_resamples": 100},
        "steps": 5,
        "log_every": 1,
    }
    for name, change in changes.items():
        is_section = isinstance(change, dict) and isinstance(sections.get(name), dict)
        sections[name] = {**sections[name], **change} if is_section else change
    return parse_config(sections)


def metrics(config: TrainConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["quark", "rloo"])
def test_a_mixed_run_leaves_nothing_but_its_result(
    gateway: RunningGateway, client: GatewayClient, tiny_models: TinyModels, tmp_path: Path, kind: str
) -> None:
    """First the log of an earlier draw, then rounds with a hot swap each, then the evaluation."""
    since = time.time()  # with all that other tests have logged there would be no step left for a fresh round
    with Client(gateway.url) as public:
        for prompt in prompts(11, 8):  # the run's own prompts, as users would have sent them
            public.completions.create(
                model="adapter", prompt=prompt.text, n=2, max_tokens=6, temperature=1.0, user=kind
            )
            public.completions.create(model="adapter", prompt=prompt.text, best_of=3, max_tokens=6, temperature=0.7)
    before = wait_until_freed(gateway, "trained")
    config = run_config(
        gateway,
        tiny_models,
        tmp_path,
        objective={"kind": kind},
        logged={"enabled": True, "route": "adapter", "since": since},
    )
    result = train(config, gateway=client, scorer=LowTokens())
    (log,) = [line for line in metrics(config) if "log/num_read" in line]
    assert log["log/num_used"] > 0
    if kind == "rloo":
        assert log["log/left_out/sampling_temperature"] >= 3 * 4
    assert [line for line in metrics(config) if "rollouts/mean_reward" in line]
    with gateway.client() as http:
        registered = {adapter["name"]: adapter for adapter in http.get("/admin/adapters").json()["data"]}
    assert "trained" in registered
    after = wait_until_freed(gateway, "trained.training")
    (weights,) = {version.weight_bytes for version in after.versions if version.name == "trained"} or {0}
    assert after.weights.used_bytes == before.weights.used_bytes + weights
    assert list((config.output_dir / "intermediate").iterdir()) == []
    with gateway.client() as http:
        body = {
            "model": "base",
            "prompt": "t1",
            "max_tokens": 1,
            "steering": {"adapters": [{"name": "trained.training"}]},
        }
        assert http.post("/v1/completions", json=body).status_code in (400, 404)
    assert result.is_registered


def test_reference_rollouts_of_one_run_calibrate_the_next(
    gateway: RunningGateway, client: GatewayClient, tiny_models: TinyModels, tmp_path: Path
) -> None:
    def run(name: str, size: int) -> tuple[dict[str, float], dict[str, list[float]]]:
        config = run_config(
            gateway,
            tiny_models,
            tmp_path / name,
            reward={"transform": {"kind": "calibrated", "num_reference": size}},
            publish={"name": f"calibrated-{name}"},
            sampling={"max_tokens": 7},  # as no other test draws
            evaluation={"share": 0},
            steps=1,
        )
        train(config, gateway=client, scorer=LowTokens())
        (figures,) = [line for line in metrics(config) if "calibration/num_drawn" in line]
        scores = json.loads((config.output_dir / "reference_rewards.json").read_text())
        return figures, {prompt: sorted(values) for prompt, values in scores.items()}

    first, drawn = run("first", 5)
    assert (first["calibration/num_from_log"], first["calibration/num_drawn"]) == (0.0, 40.0)
    second, found = run("second", 5)
    # Round 0 of the first run drew two more for each prompt, from the base as well: those count too.
    assert (second["calibration/num_from_log"], second["calibration/num_drawn"]) == (40.0, 0.0)
    assert found.keys() == drawn.keys()
    third, _ = run("third", 40)
    assert third["calibration/num_from_log"] >= 8 * 7
    assert third["calibration/num_from_log"] + third["calibration/num_drawn"] == 8 * 40


def test_what_people_say_of_answers_trains_an_adapter(
    gateway: RunningGateway, client: GatewayClient, tiny_models: TinyModels, tmp_path: Path
) -> None:
    with Client(gateway.url) as public:
        for number, prompt in enumerate(prompts(23, 6)):
            answer = public.completions.create(model="other", prompt=prompt.text, n=3, max_tokens=5, temperature=1.0)
            for choice in answer.choices[: 3 if number else 2]:
                public.feedback.create(completion_id=answer.id, index=choice.index, rating=choice.index / 2, user="ann")
        path = tmp_path / "rated.parquet"
        public.admin.rollouts.export(path, format="parquet", has_feedback=True, whole_requests=True, route="other")
    config = run_config(
        gateway,
        tiny_models,
        tmp_path,
        gateway=None,
        reward={"name": "people", "source": "feedback"},
        logged={"enabled": True, "path": str(path)},
        fresh={"source": "local", "interval": 0, "model": None},
        objective={"kind": "rloo"},
        evaluation={"share": 0},
    )
    config = config.model_copy(update={"prompts": PromptLog()})
    result = train(config)
    (log,) = [line for line in metrics(config) if "log/num_read" in line]
    assert (log["log/num_read"], log["log/num_used"], log["log/left_out/unrated"]) == (18.0, 17.0, 1.0)
    assert read_manifest(Path(result.path)).reward == "people@ratings"
