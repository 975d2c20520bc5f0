from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from trimtab_training.learner import Learner
from trimtab_training.models import Vocabulary
from trimtab_training.objectives.nlpo import MaskedVocabulary, masked_logprobs
from trimtab_training.objectives.objective import ScoredRollout
from trimtab_training.objectives.policy_mask import PolicyMask
from trimtab_training.objectives.ppo import Ppo
from trimtab_training.policy import TailoredPolicy
from trimtab_training.prompts import Prompt
from trimtab_training.rollouts import LocalSource, RolloutSource
from trimtab_training.sampler import sample_outputs
from trimtab_training.wiring import build_learner, build_round_source

CONTEXT = (5, 6, 7)
END = 0


def move(adapter: Any, seed: int = 0) -> None:
    """Stands for training: every weight of the adapter changes a lot."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def built(make_config: Any, vocabulary: Vocabulary, **settings: Any) -> tuple[Learner, RolloutSource, RolloutSource]:
    """A learner, the source that an evaluation draws from, and the one that rounds are drawn from."""
    config = make_config(
        objective={"kind": "nlpo", "mask_min_tokens": 1, **settings},
        optimiser={"lr": 1e-12, "batch_size": 64},
        sampling={"max_tokens": 2},
    )
    learner, _ = build_learner(config, vocabulary, None)
    source = LocalSource(
        learner.policy,
        adapter_prefix=learner.objective.prefix,
        vocabulary=vocabulary,
        sampling=config.sampling,
        end_token_ids=frozenset({END}),
    )
    return learner, source, build_round_source(source, learner)


@pytest.fixture
def policy(make_config: Any, vocabulary: Vocabulary) -> TailoredPolicy:
    return built(make_config, vocabulary)[0].policy


def mask_of(policy: TailoredPolicy, **settings: Any) -> PolicyMask:
    return PolicyMask(
        policy.adapter, **{"prefix": (), "top_p": 0.5, "min_tokens": 1, "end_token_ids": {END}, **settings}
    )


def probabilities(policy: TailoredPolicy, prompt: tuple[int, ...] = CONTEXT) -> torch.Tensor:
    """Of the first token, `[64]`."""
    with torch.no_grad():
        return torch.softmax(policy.forward([prompt], [(1,)], [()]).steered_logits[0, 0].double(), dim=-1)


def allowed_first(mask: PolicyMask, policy: TailoredPolicy) -> set[int]:
    return set(mask.over_outputs(policy, [CONTEXT], [(1,)])[0, 0].nonzero().flatten().tolist())


def test_the_mask_is_the_smallest_set_of_the_mask_policys_tokens_and_the_end_tokens(policy: TailoredPolicy) -> None:
    ordered, order = probabilities(policy).sort(descending=True)
    size = int((ordered.cumsum(dim=-1) < 0.5).sum()) + 1
    assert 1 < size < 20
    nucleus = set(order[:size].tolist())
    assert END not in nucleus
    mask = mask_of(policy)
    assert allowed_first(mask, policy) == nucleus | {END}
    assert allowed_first(mask_of(policy, min_tokens=30, end_token_ids=()), policy) == set(order[:30].tolist())
    assert allowed_first(mask_of(policy, end_token_ids={END, 999}), policy) == nucleus | {END}
    move(policy.adapter)  # the mask's is a copy
    assert allowed_first(mask, policy) == nucleus | {END}
    mask.become(policy.adapter)
    assert allowed_first(mask, policy) == allowed_first(mask_of(policy), policy) != nucleus | {END}


def test_draws_are_the_policys_restricted_to_the_mask_and_renormalised(policy: TailoredPolicy) -> None:
    """5,000 draws against the exact probabilities; the mask policy is not the policy. Odds of a false alarm 1e-4 if
    unseeded."""
    mask = mask_of(policy, top_p=0.7)
    move(policy.adapter)
    outputs = sample_outputs(
        policy,
        [CONTEXT] * 5_000,
        (),
        max_tokens=1,
        temperature=1.0,
        top_p=1.0,
        end_token_ids={END},
        generator=torch.Generator().manual_seed(0),
        mask=mask,
    )
    allowed = sorted(allowed_first(mask, policy))
    counts = Counter(output.token_ids[0] for output in outputs)
    assert set(counts) <= set(allowed)
    expected = probabilities(policy)[allowed]
    expected = expected / expected.sum() * len(outputs)
    observed = torch.tensor([float(counts[token]) for token in allowed])
    rare = expected < 5
    pooled_observed = [*observed[~rare].tolist(), *([float(observed[rare].sum())] if bool(rare.any()) else [])]
    pooled_expected = [*expected[~rare].tolist(), *([float(expected[rare].sum())] if bool(rare.any()) else [])]
    assert len(pooled_observed) > 3
    assert chisquare(pooled_observed, pooled_expected).pvalue > 1e-4


def test_the_mask_policy_sees_the_prefix_in_the_sampler_and_in_the_trainer(policy: TailoredPolicy) -> None:
    prefix = (9, 8)
    mask = mask_of(policy, prefix=prefix, top_p=1e-6, end_token_ids=())
    with torch.no_grad():
        favourite = int(policy.forward([CONTEXT], [(1,)], [prefix]).steered_logits[0, 0].argmax())
    assert favourite != int(probabilities(policy).argmax())
    assert allowed_first(mask, policy) == {favourite}
    outputs = sample_outputs(
        policy,
        [CONTEXT] * 9,
        prefix,
        max_tokens=1,
        temperature=1.0,
        top_p=1.0,
        end_token_ids=(),
        generator=torch.Generator().manual_seed(0),
        mask=mask,
    )
    assert [output.token_ids for output in outputs] == [(favourite,)] * 9


def drawn_firsts(source: RolloutSource, prompts: list[Prompt]) -> list[set[int]]:
    groups = source.draw(prompts, num_per_prompt=12, seed=0, steered=True)
    return [{sample.output_token_ids[0] for sample in group} - {END} for group in groups]


def test_a_refresh_reaches_the_sampler(make_config: Any, vocabulary: Vocabulary) -> None:
    """One token and the end may be drawn, so what is drawn shows whose mask it is. The adapter moves; after the first
    of every two rounds the old mask still rules, after the second the sampler, which was built before all that, draws
    under that of the moved one."""
    learner, _, rounds = built(make_config, vocabulary, mask_top_p=1e-6, mask_interval=2, epochs=1)
    prompts = [Prompt("", (token, token + 1)) for token in range(1, 9)]

    def favourites() -> list[int]:
        return [int(probabilities(learner.policy, prompt.token_ids or ())[1:].argmax()) + 1 for prompt in prompts]

    def take_a_round() -> None:
        learner.add_rollouts([ScoredRollout((1, 2), (3 + i, 4), float(i), group=0) for i in range(4)])
        learner.train_step()
        assert learner.objective.wants_round

    def agreeing(tokens: list[int]) -> int:
        return sum(drawn <= {token} for drawn, token in zip(drawn_firsts(rounds, prompts), tokens, strict=True))

    old = favourites()
    assert agreeing(old) == 8
    move(learner.policy.adapter)
    new = favourites()
    assert sum(a != b for a, b in zip(old, new, strict=True)) >= 6
    take_a_round()
    assert agreeing(old) == 8
    take_a_round()
    assert agreeing(new) == 8
    assert agreeing(old) <= 2
    move(learner.policy.adapter, seed=1)
    take_a_round()
    assert agreeing(new) == 8
    take_a_round()
    assert agreeing(favourites()) == 8


def test_rounds_are_masked_and_the_evaluation_is_not(make_config: Any, vocabulary: Vocabulary) -> None:
    _, source, rounds = built(make_config, vocabulary, mask_top_p=1e-6)
    prompts = [Prompt("", CONTEXT)]
    assert len(drawn_firsts(rounds, prompts)[0]) == 1
    assert len(drawn_firsts(source, prompts)[0]) > 5
    base = [group.draw(prompts, num_per_prompt=9, seed=0, steered=False) for group in (source, rounds)]
    assert base[0] == base[1]


def actions_of(policy: TailoredPolicy, mask: PolicyMask) -> MaskedVocabulary:
    return MaskedVocabulary(mask, policy.adapter, prefix=(), interval=1)


def drawn_round(policy: TailoredPolicy, mask: PolicyMask, num: int = 50) -> list[ScoredRollout]:
    outputs = sample_outputs(
        policy,
        [CONTEXT, (9,)] * num,
        (),
        max_tokens=5,
        temperature=1.0,
        top_p=1.0,
        end_token_ids={END},
        generator=torch.Generator().manual_seed(1),
        mask=mask,
    )
    prompts = [CONTEXT, (9,)] * num
    return [
        ScoredRollout(prompt, output.token_ids, 0.0, group=i % 2)
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


def test_sampler_and_trainer_have_the_same_mask_at_every_token(policy: TailoredPolicy) -> None:
    """Step by step with a cache and over whole outputs; each token that was drawn must be allowed in the round's."""
    mask = mask_of(policy)
    move(policy.adapter)
    rollouts = drawn_round(policy, mask)
    num_outside = num_tokens = 0
    for rollout in rollouts:
        allowed = mask.over_outputs(policy, [rollout.prompt_token_ids], [rollout.output_token_ids])[0]
        is_allowed = allowed.gather(-1, torch.tensor(rollout.output_token_ids)[:, None])
        num_outside += int((~is_allowed).sum())
        num_tokens += len(is_allowed)
        assert 1 < float(allowed.sum(dim=-1).float().mean()) < 32
    assert num_tokens > 300
    assert num_outside == 0


def test_log_probabilities_are_normalised_over_the_allowed_tokens(policy: TailoredPolicy) -> None:
    mask = mask_of(policy)
    move(policy.adapter)
    allowed = allowed_first(mask, policy)
    with torch.no_grad():
        output = policy.forward([CONTEXT] * 64, [(token,) for token in range(64)], [()] * 64)
        logprobs = masked_logprobs(output, mask.over_outputs(policy, [CONTEXT] * 64, [(t,) for t in range(64)]))[:, 0]
    restricted = probabilities(policy)[sorted(allowed)]
    torch.testing.assert_close(
        logprobs[sorted(allowed)].double(), (restricted / restricted.sum()).log(), rtol=1e-4, atol=1e-5
    )
    assert all(bool(torch.isneginf(logprobs[token])) for token in set(range(64)) - allowed)


def test_ratios_are_over_the_masks_of_the_round_though_the_mask_policy_moves_on(policy: TailoredPolicy) -> None:
    mask = mask_of(policy)
    move(policy.adapter)
    actions = actions_of(policy, mask)
    rollouts = drawn_round(policy, mask, num=5)
    old = actions.begin_round(rollouts, policy)
    prompts, outputs = [r.prompt_token_ids for r in rollouts], [r.output_token_ids for r in rollouts]
    with torch.no_grad():
        whole = policy.forward(prompts, outputs, [()] * len(rollouts))
    expected = masked_logprobs(whole, mask.over_outputs(policy, prompts, outputs))
    move(mask.adapter, seed=5)
    got = actions.logprobs(whole, range(10))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    for row, logprobs in enumerate(old):
        assert logprobs == pytest.approx(got[row, : len(logprobs)].tolist(), abs=1e-5)
        assert not got[row, len(logprobs) :].any()
    gain = (got - whole.token_logprobs()[0])[whole.mask]  # of fewer tokens each is likelier
    assert float(gain.min()) > -1e-5
    assert float(gain.mean()) > 0.1


def test_a_token_that_was_drawn_counts_as_allowed(policy: TailoredPolicy) -> None:
    unlikely = int(probabilities(policy).argmin())
    actions = actions_of(policy, mask_of(policy))
    (old,) = actions.begin_round([ScoredRollout(CONTEXT, (unlikely,), 0.0, group=0)], policy)
    assert np.isfinite(old).all()


def test_the_kl_penalty_is_that_of_the_policy_without_a_mask(make_config: Any, vocabulary: Vocabulary) -> None:
    settings = {"mask_top_p": 0.3, "kl_coef": 1.0, "gamma": 1.0, "gae_lambda": 1.0}
    learner, _, _ = built(make_config, vocabulary, **settings)
    nlpo = learner.objective
    assert isinstance(nlpo, Ppo)
    (drawn,) = sample_outputs(
        learner.policy,
        [CONTEXT],
        (),
        max_tokens=4,
        temperature=1.0,
        top_p=1.0,
        end_token_ids=(),
        generator=torch.Generator().manual_seed(3),
        mask=nlpo.token_mask,
    )
    learner.add_rollouts([ScoredRollout(CONTEXT, drawn.token_ids, 0.0, group=0)])
    with torch.no_grad():
        steered, base = learner.policy.forward([CONTEXT], [drawn.token_ids], [()]).token_logprobs()
    ratios = (steered - base)[0].double().numpy()
    to_come = -np.cumsum(ratios[::-1])[::-1]  # values are 0
    assert nlpo._buffer.token_column("return", [0])[0] == pytest.approx(to_come, abs=1e-4)
    assert learner.train_step().figures["ratio"] == pytest.approx(1.0, rel=1e-4)


def test_mask_policy_and_masks_come_back_with_a_checkpoint(make_config: Any, vocabulary: Vocabulary) -> None:
    first, _, rounds = built(make_config, vocabulary, mask_interval=2, epochs=2)
    second, _, rounds_of_second = built(make_config, vocabulary, mask_interval=2, epochs=2)
    rollouts = [ScoredRollout((1, 2), (3 + i, 4, 5)[: 1 + i % 3], float(i), group=0) for i in range(9)]
    for _ in range(2):
        first.add_rollouts(rollouts)
        move(first.policy.adapter)
        while not first.objective.wants_round:
            first.train_step()
    move(first.policy.adapter, seed=3)
    first.add_rollouts(rollouts)
    first.train_step()
    second.policy.adapter.load_state_dict(first.policy.adapter.state_dict())
    second.objective.load_state(first.objective.state())
    prompts = [Prompt("", CONTEXT)]
    draws = [source.draw(prompts, num_per_prompt=20, seed=0, steered=True) for source in (rounds, rounds_of_second)]
    assert draws[0] == draws[1]
    rows = first.objective.next_rows(64), second.objective.next_rows(64)
    parts = [run.objective.loss(run.policy, found) for run, found in zip((first, second), rows, strict=True)]
    assert parts[0].figures == parts[1].figures
    # the next refresh comes when it would have come: not after the third round, but after the fourth
    weights = dict(first.policy.adapter.named_parameters())
    for run in (first, second):
        run.objective.after_step({})
        assert num_equal(run, weights) == 0
        run.add_rollouts(rollouts)
        while not run.objective.wants_round:
            run.train_step()
        assert num_equal(run, weights) == len(weights)


def num_equal(learner: Learner, weights: dict[str, torch.nn.Parameter]) -> int:
    """How many of these weights of an adapter the mask policy has."""
    tensors = learner.objective.state().tensors
    return sum(torch.equal(tensors[f"actions.mask.{name}"], weight) for name, weight in weights.items())
