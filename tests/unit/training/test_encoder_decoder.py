"""Training beside an encoder-decoder base: the same policy, sampler, recipe and distillation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tiny_blenderbot import blenderbot_logprobs, tiny_blenderbot
from trimtab_adapters.contract.errors import AdapterError
from trimtab_adapters.contract.manifest import read_manifest
from trimtab_training.config import SamplingConfig
from trimtab_training.distillation.teachers import LocalTeacher
from trimtab_training.encoder_decoder import CachedDecoder, has_encoder
from trimtab_training.gateway import ScoreReply
from trimtab_training.models import Vocabulary, load_base_lm, load_causal_lm
from trimtab_training.policy import TailoredPolicy
from trimtab_training.prompts import Prompt
from trimtab_training.recipes.train import train
from trimtab_training.sampler import sample_outputs

NUM_KNOWN = 64
PROMPTS = [(5, 6, 7), (9,), (10, 11, 12, 13, 14, 15)]
OUTPUTS = [(20, 21), (22, 23, 24, 25), (26,)]


@pytest.fixture(scope="module")
def blenderbot() -> Any:
    return tiny_blenderbot(seed=1, vocab_size=NUM_KNOWN)


@pytest.fixture
def blenderbot_dir(tmp_path: Path, vocabulary: Vocabulary) -> Path:
    """One that says everything now and then, so that there is something to learn from."""
    directory = tmp_path / "blenderbot"
    tiny_blenderbot(seed=1, vocab_size=NUM_KNOWN, spread=0.1).save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes(vocabulary.path.read_bytes())
    return directory


def adapter_logprobs(adapter: Any, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """`[len(output), V]`: the adapter reads prompt and output as one text."""
    with torch.no_grad():
        logits = adapter(input_ids=torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1, :NUM_KNOWN]
    return torch.log_softmax(logits, dim=-1)


def test_a_padded_batch_gives_what_each_row_alone_gives(blenderbot: Any, model_dirs: dict[str, Path]) -> None:
    adapter = AutoModelForCausalLM.from_pretrained(model_dirs["adapter"], dtype=torch.float32).eval()
    policy = TailoredPolicy(blenderbot, adapter, alpha=0.7, num_known=NUM_KNOWN)
    output = policy.forward(PROMPTS, OUTPUTS, [()] * 3)
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, OUTPUTS, strict=True)):
        base = blenderbot_logprobs(blenderbot, prompt, tokens)[:-1]
        steered = torch.log_softmax(base + 0.7 * adapter_logprobs(adapter, prompt, tokens), dim=-1)
        found = torch.log_softmax(output.steered_logits[row, : len(tokens)], dim=-1)
        torch.testing.assert_close(found, steered, atol=1e-4, rtol=0.0)
        chosen = base.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(output.token_logprobs()[1][row, : len(tokens)], chosen, atol=1e-4, rtol=0.0)


def test_only_the_adapter_has_gradients(blenderbot: Any, model_dirs: dict[str, Path]) -> None:
    adapter = AutoModelForCausalLM.from_pretrained(model_dirs["adapter"], dtype=torch.float32)
    policy = TailoredPolicy(blenderbot, adapter, alpha=1.0, num_known=NUM_KNOWN)
    policy.forward(PROMPTS, OUTPUTS, [()] * 3).token_logprobs()[0].sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in blenderbot.parameters())
    assert any(bool(parameter.grad.abs().max() > 0) for parameter in adapter.parameters())


def test_the_sampler_reads_the_prompt_once_and_goes_on_token_by_token(blenderbot: Any) -> None:
    with torch.no_grad():
        cached = CachedDecoder(blenderbot, PROMPTS, torch.device("cpu"))
        for place in range(3):
            column = torch.tensor([30 + place, 40 + place, 50 + place]) if place else None
            logits = cached.next_logits(column)
            for row, prompt in enumerate(PROMPTS):
                before = [30 + 10 * row + at for at in range(1, place + 1)]
                expected = blenderbot_logprobs(blenderbot, prompt, before)[-1]
                torch.testing.assert_close(torch.log_softmax(logits[row], dim=-1), expected, atol=1e-4, rtol=0.0)


def test_greedy_draws_follow_the_tailored_policy(blenderbot: Any, model_dirs: dict[str, Path]) -> None:
    adapter = AutoModelForCausalLM.from_pretrained(model_dirs["adapter"], dtype=torch.float32).eval()
    policy = TailoredPolicy(blenderbot, adapter, alpha=1.0, num_known=NUM_KNOWN)
    outputs = sample_outputs(
        policy,
        PROMPTS,
        (),
        max_tokens=6,
        temperature=1e-4,
        top_p=1.0,
        end_token_ids=(),
        generator=torch.Generator().manual_seed(0),
    )
    for prompt, drawn in zip(PROMPTS, outputs, strict=True):
        output = list(drawn.token_ids)
        base = blenderbot_logprobs(blenderbot, prompt, output)[:-1]
        assert (base + adapter_logprobs(adapter, prompt, output)).argmax(dim=-1).tolist() == output


def test_prompt_and_output_have_positions_of_their_own(blenderbot: Any, model_dirs: dict[str, Path]) -> None:
    """48 each in the base; the adapter has 128 for both and its prefix."""
    adapter = AutoModelForCausalLM.from_pretrained(model_dirs["adapter"], dtype=torch.float32)
    policy = TailoredPolicy(blenderbot, adapter, alpha=1.0, num_known=NUM_KNOWN)
    assert policy.can_read([3] * 48, [3] * 48, [3] * 32)
    assert not policy.can_read([3] * 48, [3] * 48, [3] * 33)
    assert not policy.can_read([3] * 49, [3], ())
    assert not policy.can_read([3], [3] * 49, ())


class LowScorer:
    """Reward: the share of the words t1 to t31 in the output; about a half from the base."""

    name = "low"

    def score(self, inputs: Any) -> ScoreReply:
        words = [item.output.split() for item in inputs]
        shares = [sum(int(word[1:]) < 32 for word in found) / max(1, len(found)) for found in words]
        return ScoreReply(rewards=shares, version="1")


@pytest.mark.parametrize("objective", ["quark", "rloo"])
def test_a_run_learns_the_toy_task_and_publishes_a_version(
    make_config: Any, blenderbot_dir: Path, objective: str
) -> None:
    config = make_config(
        models={"base_model": str(blenderbot_dir)},
        objective={"kind": objective, "kl_coef": 0.0},
        optimiser={"batch_size": 64, "lr": 2e-2, "decay": "none"},
        fresh={"interval": 20, "num_per_prompt": 8},
        steps=60,
    )
    result = train(config, scorer=LowScorer())
    # Lower end of the 95 % bootstrap interval of the difference to the base; seen: 0.075 (Quark), 0.49 (RLOO).
    assert result.evaluation["reward_difference_interval"][0] > 0.03
    assert read_manifest(Path(result.path)).training["base_model"] == str(blenderbot_dir)


def test_it_can_be_a_teacher(blenderbot: Any, vocabulary: Vocabulary) -> None:
    sampling = SamplingConfig(max_tokens=5)
    teacher = LocalTeacher(blenderbot, sampling=sampling, top_logprobs=4, vocabulary=vocabulary)
    samples = teacher.draw([Prompt("t5 t6 t7"), Prompt("t9")], num_per_prompt=2, seed=0)
    assert len(samples) == 4
    for sample in samples:
        expected = blenderbot_logprobs(blenderbot, sample.prompt_token_ids, sample.output_token_ids)[:-1]
        chosen = expected.gather(-1, torch.tensor(sample.output_token_ids)[:, None])[:, 0]
        assert sample.logprobs == pytest.approx(chosen.tolist(), abs=1e-4)


def test_a_base_is_loaded_as_what_it_is(model_dirs: dict[str, Path], blenderbot_dir: Path, tmp_path: Path) -> None:
    assert not has_encoder(load_base_lm(model_dirs["base"], dtype=torch.float32, device="cpu"))
    assert has_encoder(load_base_lm(blenderbot_dir, dtype=torch.float32, device="cpu"))
    with pytest.raises(AdapterError, match="cannot be loaded as a causal LM"):
        load_base_lm(tmp_path, dtype=torch.float32, device="cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(AdapterError):
        load_base_lm(tmp_path, dtype=torch.float32, device="cpu")


def test_an_adapter_lm_cannot_have_an_encoder(blenderbot_dir: Path) -> None:
    """The decoder alone would load as a causal LM, with random weights where the encoder was."""
    with pytest.raises(AdapterError):
        load_causal_lm(blenderbot_dir, dtype=torch.float32, device="cpu")
