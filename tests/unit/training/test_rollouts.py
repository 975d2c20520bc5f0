from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from trimtab_adapters.contract.errors import EngineError, InvalidRequestError
from trimtab_adapters.contract.params import SteeringOptions, SteeringRequest
from trimtab_training.config import SamplingConfig
from trimtab_training.models import Vocabulary
from trimtab_training.policy import TailoredPolicy
from trimtab_training.prompts import Prompt
from trimtab_training.rollouts import (
    NO_OPERATORS,
    GatewaySource,
    LocalSource,
    NamedVersion,
)

PROMPTS = [Prompt("t1 t2"), Prompt("t3", (3,))]


def source(client: Any, sampling: SamplingConfig) -> tuple[GatewaySource, list[str]]:
    life: list[str] = []

    @contextmanager
    def current() -> Iterator[NamedVersion]:
        life.append("published")
        yield NamedVersion("a", "0" * 16, -0.5)
        life.append("retired")

    def version() -> AbstractContextManager[NamedVersion]:
        return current()

    return GatewaySource(client, model="m", sampling=sampling, current_version=version), life


def test_steered_requests_name_the_current_version_and_fair_sampling(gateway: Any) -> None:
    gateway.versions["0" * 16] = None
    sampling = SamplingConfig(max_tokens=9, temperature=0.7, top_p=0.8, stop=(".",), stop_token_ids=(5,))
    with gateway.client() as client:
        drawn, life = source(client, sampling)
        groups = drawn.draw(PROMPTS, num_per_prompt=3, seed=100, steered=True)
    bodies = sorted(gateway.bodies("/v1/completions"), key=lambda body: body["seed"])
    assert [body["prompt"] for body in bodies] == ["t1 t2", [3]]
    assert [body["seed"] for body in bodies] == [100, 103]  # candidate i gets seed + i: no two alike
    # What is not said would be the base model's own defaults, which may cut the distribution.
    neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert all({key: body[key] for key in neutral} == neutral for body in bodies)
    wanted = {"model": "m", "n": 3, "best_of": 3, "max_tokens": 9, "temperature": 0.7, "top_p": 0.8, "stop": ["."]}
    for body in bodies:
        assert {key: body[key] for key in wanted} == wanted
        assert body["stop_token_ids"] == [5]
        assert body["steering"] == {"adapters": [{"name": "a", "version": "0" * 16, "alpha": -0.5}], **NO_OPERATORS}
        assert "metadata" not in body
    assert life == ["published", "retired"]
    assert [[sample.prompt_token_ids for sample in group] for group in groups] == [[(1, 2)] * 3, [(3,)] * 3]
    assert all(sample.output.split() == [f"t{t}" for t in sample.output_token_ids] for g in groups for sample in g)


def test_unsteered_requests_override_the_routes_steering_with_none(gateway: Any) -> None:
    with gateway.client() as client:
        drawn, life = source(client, SamplingConfig())
        drawn.draw(PROMPTS, num_per_prompt=1, seed=0, steered=False)
    assert [body["steering"] for body in gateway.bodies("/v1/completions")] == [{"adapters": [], **NO_OPERATORS}] * 2
    assert life == []


def test_a_rollout_that_was_broken_off_is_an_error(gateway: Any) -> None:
    choice = {"index": 0, "text": "a", "token_ids": [1], "prompt_token_ids": [1], "finish_reason": "abort"}
    gateway.answers = [httpx.Response(200, json={"choices": [choice]})]
    with gateway.client() as client, pytest.raises(EngineError, match="abort"):
        source(client, SamplingConfig())[0].draw(PROMPTS[:1], num_per_prompt=1, seed=0, steered=False)


@pytest.fixture
def local(model_dirs: dict[str, Path], vocabulary: Vocabulary) -> LocalSource:
    base, adapter = (
        AutoModelForCausalLM.from_pretrained(model_dirs[name], dtype=torch.float32) for name in ("base", "adapter")
    )
    return LocalSource(
        TailoredPolicy(base, adapter, alpha=1.0, num_known=64),
        adapter_prefix=(5,),
        vocabulary=vocabulary,
        sampling=SamplingConfig(max_tokens=4, stop_token_ids=(9,)),
        end_token_ids=frozenset({0}),
        batch_size=4,
    )


def test_local_draws_belong_to_their_prompts_whatever_their_length(local: LocalSource) -> None:
    prompts = [Prompt("t1 t2 t3 t4"), Prompt("t5"), Prompt("t6 t7")]
    done: list[int] = []
    groups = local.draw(prompts, num_per_prompt=3, seed=0, steered=True, on_done=lambda: done.append(1))
    assert [[sample.prompt for sample in group] for group in groups] == [[p.text] * 3 for p in prompts]
    assert groups[0][0].prompt_token_ids == (1, 2, 3, 4)
    assert len(done) == 3
    assert groups == local.draw(prompts, num_per_prompt=3, seed=0, steered=True)
    assert groups != local.draw(prompts, num_per_prompt=3, seed=0, steered=False)


def test_a_prompt_without_tokens_is_refused(local: LocalSource) -> None:
    with pytest.raises(InvalidRequestError, match="no tokens"):
        local.draw([Prompt(" ")], num_per_prompt=1, seed=0, steered=False)


def test_a_prompt_that_leaves_no_room_is_refused(local: LocalSource) -> None:
    """128 positions: 1 prefix token, 4 new ones, so 123 for the prompt."""
    longest = Prompt("", tuple([3] * 123))
    assert len(local.draw([longest], num_per_prompt=1, seed=0, steered=True)[0]) == 1
    with pytest.raises(InvalidRequestError, match="positions do not allow a prompt of"):
        local.draw([Prompt("", tuple([3] * 124))], num_per_prompt=1, seed=0, steered=True)


def test_what_training_draws_takes_every_option_of_a_route_away() -> None:
    given = SteeringRequest(**NO_OPERATORS)
    route = SteeringOptions(max_kl=1.0, plausibility=0.5, negative_prompt="x", guidance_scale=2.0)
    assert route.overridden_by(given) == SteeringOptions()
    assert NO_OPERATORS.keys() == SteeringOptions.model_fields.keys() - {"guidance_scale"}
