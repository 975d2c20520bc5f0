"""What a calibrator holds for."""

from typing import Any

import pytest

from trimtab_adapters.contract.params import AdapterWeight
from trimtab_adapters.contract.records import Rollout
from trimtab_adapters.contract.reference_policy import ReferencePolicy

BODY = {"temperature": 0.7, "max_tokens": 16, "stop": ["\n"]}


def policy(**changes: Any) -> ReferencePolicy:
    return ReferencePolicy.of("base", "completions", {**BODY, **changes})


def rollout(**changes: Any) -> Rollout:
    fields: dict[str, Any] = {
        "id": "r",
        "request_id": "q",
        "created_at": 1.0,
        "duration_s": 1.0,
        "route": "nice",
        "base_model": "base",
        "endpoint": "completions",
        "prompt_token_ids": [1],
        "output_text": "x",
        "output_token_ids": [2],
        "steering": [],
        "sampling": dict(BODY),
        "finish_reason": "stop",
    }
    return Rollout.model_validate({**fields, **changes})


def test_seed_display_and_the_prompt_make_no_difference() -> None:
    shown = {"seed": 3, "logprobs": 5, "return_token_ids": True, "echo": True, "prompt": "x", "priority": 1}
    assert policy(**shown) == policy()
    assert policy(**shown).key == policy().key


@pytest.mark.parametrize("change", [{"temperature": 0.8}, {"top_p": 0.9}, {"stop": ["\n", "x"]}])
def test_sampling_settings_make_a_difference(change: dict[str, Any]) -> None:
    assert policy(**change).digest != policy().digest


def test_base_endpoint_and_identity_make_a_difference() -> None:
    others = [
        ReferencePolicy.of("other", "completions", BODY),
        ReferencePolicy.of("base", "chat.completions", BODY),
        policy().identified("/models/b#1"),
    ]
    assert len({policy().digest, *(other.digest for other in others)}) == 4


def test_a_key_gives_the_policy_back_whatever_the_order_and_the_text() -> None:
    odd = ReferencePolicy.of("base", "completions", {"stop": ["\x00", "\ud800", "é"], "a": 1})
    assert ReferencePolicy.from_key(odd.key) == odd
    assert ReferencePolicy.of("base", "completions", {"a": 1, "stop": ["\x00", "\ud800", "é"]}) == odd
    assert odd.key.isascii()


@pytest.mark.parametrize("key", ["base", "{}", "[]", '{"base_model": "b"}'])
def test_any_other_text_is_no_key(key: str) -> None:
    with pytest.raises(ValueError, match="not the key"):
        ReferencePolicy.from_key(key)


def test_what_differs_is_told_from_the_first_one_s_view() -> None:
    made_for = ReferencePolicy.of("base", "completions", {"temperature": 0.7, "top_p": 0.9}).identified("a")
    now = ReferencePolicy.of("base", "completions", {"temperature": 1.0, "min_p": 0.1}).identified("b")
    assert made_for.differences(now) == [
        "identity: 'a', not 'b'",
        "min_p: absent, not 0.1",
        "temperature: 0.7, not 1.0",
        "top_p: 0.9, not absent",
    ]
    assert made_for.differences(made_for) == []


def test_an_unsteered_candidate_is_a_sample_of_the_policy_that_a_request_of_its_settings_asks_for() -> None:
    assert ReferencePolicy.of_rollout(rollout()) == policy()
    assert ReferencePolicy.of_rollout(rollout(metadata={"base_identity": "b"})) == policy().identified("b")
    nothing = [AdapterWeight(name="kind", version="a" * 16, alpha=0.0)]
    assert ReferencePolicy.of_rollout(rollout(steering=nothing, chosen=False)) == policy()


def test_a_reference_rollout_is_one_of_its_endpoint() -> None:
    reference = rollout(endpoint="reference", metadata={"endpoint": "chat.completions"})
    assert ReferencePolicy.of_rollout(reference) == ReferencePolicy.of("base", "chat.completions", BODY)
    assert ReferencePolicy.of_rollout(rollout(endpoint="reference")) is None, "logged before the endpoint was"


@pytest.mark.parametrize(
    "changes",
    [
        {"steering": [AdapterWeight(name="kind", version="a" * 16, alpha=0.5)]},
        {"sampling": {**BODY, "seed": 1}},
        {"sampling": {**BODY, "guidance": {"scale": 2.0}}},
        {"sampling": {**BODY, "steering_operators": {"max_kl": 1.0}}},
        {"sampling": {**BODY, "selection": {"strategy": "blockwise"}}},
        {"metadata": {"selection": "adaptive"}},
        {"metadata": {"num_left_out": 1}},
        {"finish_reason": None},
        {"finish_reason": "abort"},
        {"endpoint": "training"},
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items())[:40],
)
def test_what_was_steered_seeded_cut_short_or_chosen_from_is_no_sample(changes: dict[str, Any]) -> None:
    assert ReferencePolicy.of_rollout(rollout(**changes)) is None
