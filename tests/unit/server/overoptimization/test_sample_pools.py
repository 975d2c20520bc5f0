"""Which logged rollouts are independent samples of one policy, and of the same one."""

from typing import Any

import pytest

from trimtab_adapters.contract.params import AdapterWeight
from trimtab_adapters.contract.records import RewardValue
from trimtab_server.overoptimization.sample_pools import PoolCollector, SamplePool
from turning_log import rollout

KIND = AdapterWeight(name="kind", version="a" * 16, alpha=1.0)


def collected(*changes: dict[str, Any]) -> tuple[list[SamplePool], dict[str, int]]:
    collector = PoolCollector("base")
    for number, change in enumerate(changes):
        collector.add(rollout(f"r{number}", **change))
    assert collector.num_read == len(changes)
    pools = collector.settle()
    return pools, dict(collector.left_out)


def test_candidates_and_reference_rollouts_of_one_prompt_are_one_pool() -> None:
    rewards = [RewardValue(name="kind", version="3", raw=0.5, calibrated=0.9)]
    (pool,), left_out = collected(
        {"rewards": rewards},
        {
            "endpoint": "reference",
            "output_text": "y",
            "chosen": False,
            "metadata": {"endpoint": "completions"},
        },
        {"metadata": {"selection": "soft"}},
        {"metadata": {"selection": "poisson"}},
    )
    assert [(sample.output, dict(sample.rewards)) for sample in pool.samples] == [
        ("x", {"kind@3": 0.5}),
        ("y", {}),
        ("x", {}),
        ("x", {}),
    ]
    assert pool.prompt == "prompt 0"
    assert left_out == {}


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": 1},
        {"prompt_token_ids": [9]},
        {"endpoint": "chat.completions"},
        {"endpoint": "reference", "metadata": {"endpoint": "chat.completions"}},
        {"steering": [KIND]},
        {"sampling": {"temperature": 0.7, "max_tokens": 8}},
        {"sampling": {"temperature": 1.0, "max_tokens": 8, "steering_operators": {"start": 3}}},
        {"sampling": {"temperature": 1.0, "max_tokens": 8, "guidance": {"scale": 2.0}}},
    ],
)
def test_another_prompt_or_policy_is_another_pool(change: dict[str, Any]) -> None:
    pools, left_out = collected({}, change)
    assert [len(pool.samples) for pool in pools] == [1, 1]
    assert left_out == {}


def test_what_does_not_change_the_text_does_not_part_pools() -> None:
    (pool,), _ = collected(
        {},
        {"sampling": {"max_tokens": 8, "temperature": 1.0, "seed": 5, "priority": 1}},
        {"steering": [KIND.model_copy(update={"alpha": 0.0})]},
    )
    assert len(pool.samples) == 3


def test_steered_samples_are_a_policy_of_their_own() -> None:
    (pool,), left_out = collected({"steering": [KIND]}, {"steering": [KIND]})
    assert len(pool.samples) == 2
    assert left_out == {}


def test_pools_of_one_prompt_share_its_key() -> None:
    pools, _ = collected({}, {"steering": [KIND]}, {"prompt": 1})
    keys = [pool.prompt_key for pool in pools]
    assert keys[0] == keys[1] != keys[2]


def test_what_an_older_base_of_the_name_said_is_left_out() -> None:
    old, new = {"metadata": {"base_identity": "old"}}, {"metadata": {"base_identity": "new"}}
    (pool, of_prompt_1), left_out = collected(old, {}, new, new, {**new, "prompt": 1})
    assert (len(pool.samples), len(of_prompt_1.samples)) == (2, 1)
    assert left_out == {"of another base behind the same name, or of one not known": 2}


def test_a_seed_that_is_repeated_is_one_sample() -> None:
    seeded = {"sampling": {"temperature": 1.0, "max_tokens": 8, "seed": 5}}
    other = {"sampling": {"temperature": 1.0, "max_tokens": 8, "seed": 6}}
    (pool, of_prompt_1), left_out = collected(seeded, seeded, other, {**seeded, "prompt": 1}, {}, {})
    assert (len(pool.samples), len(of_prompt_1.samples)) == (4, 1)
    assert left_out == {"repeating a seed": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base_model": "other"}, "of another base model"),
        ({"endpoint": "training"}, "drawn for training"),
        ({"finish_reason": "abort"}, "stopped before their end"),
        ({"metadata": {"num_left_out": 1}}, "of requests in which a candidate failed"),
        ({"metadata": {"selection": "adaptive"}}, "drawn until one was good enough"),
        ({"metadata": {"selection": "rejection"}}, "drawn until one was good enough"),
        ({"metadata": {"selection": "early_reject"}}, "rejected early"),
        ({"metadata": {"selection": "new_one"}}, "drawn until one was good enough"),
        ({"sampling": {"selection": {"strategy": "blockwise"}}}, "put together from blocks"),
        ({"sampling": {"temperature": 0}}, "of temperature 0"),
        ({"sampling": {"temperature": 0.0}}, "of temperature 0"),
        ({"prompt": None}, "without the text of the prompt"),
    ],
)
def test_what_is_no_independent_sample_is_left_out_and_counted(change: dict[str, Any], reason: str) -> None:
    collector = PoolCollector("base")
    collector.add(rollout("r").model_copy(update=change))
    assert collector.settle() == []
    ((found, count),) = collector.left_out.items()
    assert reason in found
    assert count == 1
