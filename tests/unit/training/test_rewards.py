from collections.abc import Sequence
from typing import Any

import pytest

from trimtab_adapters.contract.errors import InvalidRequestError, RewardError
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_training.gateway import ScoreReply
from trimtab_training.rewards import LocalScorer, SingleVersionScorer

INPUTS = [RewardInput("ab", "xyz"), RewardInput("", "x")]


def lengths(prompt: str, output: str, weight: float = 10.0) -> float:
    return weight * len(prompt) + len(output)


def batch_lengths(inputs: Sequence[RewardInput]) -> list[float]:
    return [10.0 * len(item.prompt) + len(item.output) for item in inputs]


class Lengths:
    version = "3"

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        return batch_lengths(inputs)


async def async_lengths(prompt: str, output: str) -> float:
    return lengths(prompt, output)


class AsyncLengths:
    async def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        return batch_lengths(inputs)


@pytest.mark.parametrize("target", [async_lengths, AsyncLengths])
def test_async_code_can_score_too(target: Any) -> None:
    assert LocalScorer("r", target).score(INPUTS).rewards == [23.0, 1.0]


@pytest.mark.parametrize("target", [lengths, batch_lengths, Lengths, Lengths()])
def test_functions_batches_objects_and_classes_can_score(target: Any) -> None:
    reply = LocalScorer("r", target).score(INPUTS)
    assert reply.rewards == [23.0, 1.0]
    assert (reply.version == "3") == (target not in (lengths, batch_lengths))


def test_the_version_of_a_function_is_a_hash_of_its_source() -> None:
    versions = [LocalScorer("r", target).score(INPUTS).version for target in (lengths, lengths, batch_lengths)]
    assert versions[0] == versions[1] != versions[2]
    assert len(versions[0]) == 12


def test_a_reward_that_raises_or_is_not_finite_is_an_error() -> None:
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        LocalScorer("r", lambda prompt, output: 1 / 0).score(INPUTS)
    with pytest.raises(RewardError, match="finite"):
        LocalScorer("r", lambda prompt, output: float("nan")).score(INPUTS)
    with pytest.raises(RewardError, match="1 scores for 2"):
        LocalScorer("r", lambda inputs: [1.0]).score(INPUTS)


@pytest.mark.parametrize("target", [3, lambda: 1.0, lambda a, b, c: 1.0])
def test_what_cannot_score_is_refused(target: Any) -> None:
    with pytest.raises(InvalidRequestError, match="'r'"):
        LocalScorer("r", target)


def test_an_unknown_entry_point_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="no-such-reward"):
        LocalScorer.load("no-such-reward")


def test_a_change_of_version_stops_the_run() -> None:
    class Changing:
        name = "r"
        version = "1"

        def score(self, inputs: Sequence[RewardInput]) -> ScoreReply:
            return ScoreReply(rewards=[0.0 for _ in inputs], version=self.version)

    changing = Changing()
    scorer = SingleVersionScorer(changing)
    scorer.score(INPUTS)
    assert scorer.version == "1"
    changing.version = "2"
    with pytest.raises(RewardError, match="from version 1 to 2"):
        scorer.score(INPUTS)
    with pytest.raises(RewardError, match="from version 0 to 2"):
        SingleVersionScorer(changing, "0").score(INPUTS)
