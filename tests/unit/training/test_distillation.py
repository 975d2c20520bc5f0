"""Losses and fidelity of a student, on numbers that can be worked out."""

import math
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from trimtab_adapters.contract.errors import EngineError
from trimtab_training.config import SamplingConfig
from trimtab_training.distillation.fidelity import measure
from trimtab_training.distillation.student import Student
from trimtab_training.distillation.teacher_samples import TeacherSample, load_samples, save_samples
from trimtab_training.distillation.teachers import ApiTeacher, LocalTeacher
from trimtab_training.gateway import GatewayClient
from trimtab_training.models import Vocabulary
from trimtab_training.objectives.distillation import Distillation, coarse_kl
from trimtab_training.prompts import Prompt


def logs(*values: float) -> torch.Tensor:
    return torch.tensor([[values]]).log()


def test_the_coarse_kl_takes_what_the_teacher_does_not_tell_as_one_token() -> None:
    student = logs(0.4, 0.3, 0.2, 0.1)
    got = coarse_kl(student, torch.tensor([[[1, 3]]]), logs(0.5, 0.2))
    expected = 0.5 * math.log(0.5 / 0.3) + 0.2 * math.log(0.2 / 0.1) + 0.3 * math.log(0.3 / 0.6)
    assert float(got) == pytest.approx(expected, rel=1e-5)
    # A position with fewer alternatives has one of probability 0 with the id 0, which is a real token as well.
    fewer = coarse_kl(student, torch.tensor([[[0, 0]]]), torch.tensor([[[math.log(0.5), -math.inf]]]))
    assert float(fewer) == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6), rel=1e-5)


def test_the_coarse_kl_of_all_tokens_is_the_kl_and_has_a_finite_gradient() -> None:
    logits = torch.tensor([[[0.3, -1.0, 2.0]]], requires_grad=True)
    teacher = logs(0.2, 0.5, 0.3)
    got = coarse_kl(torch.log_softmax(logits, dim=-1), torch.tensor([[[0, 1, 2]]]), teacher)
    expected = torch.nn.functional.kl_div(torch.log_softmax(logits, dim=-1), teacher, log_target=True, reduction="sum")
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    got.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.softmax(logits, dim=-1).detach() - teacher.exp())


@pytest.fixture
def teacher(model_dirs: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dirs["base"], dtype=torch.float32)


def drawn(teacher: Any, vocabulary: Vocabulary, top_logprobs: int) -> list[TeacherSample]:
    local = LocalTeacher(
        teacher, sampling=SamplingConfig(max_tokens=5), top_logprobs=top_logprobs, vocabulary=vocabulary
    )
    return local.draw([Prompt("t1 t2"), Prompt("t3")], num_per_prompt=3, seed=0)


def test_a_local_teacher_tells_what_a_forward_pass_of_it_tells(teacher: Any, vocabulary: Vocabulary) -> None:
    samples = drawn(teacher, vocabulary, 4)
    assert [sample.prompt for sample in samples] == ["t1 t2"] * 3 + ["t3"] * 3
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_token_ids, *sample.output_token_ids]])
        with torch.no_grad():
            logits = teacher(ids).logits[0, len(sample.prompt_token_ids) - 1 : -1]
        logprobs = torch.log_softmax(logits, dim=-1)
        expected = [float(logprobs[i, token]) for i, token in enumerate(sample.output_token_ids)]
        assert sample.logprobs == pytest.approx(expected, abs=1e-4)
        assert sample.top_token_ids == tuple(map(tuple, logprobs.topk(4).indices.tolist()))


def test_a_perfect_student_has_a_log_ratio_of_0_and_another_one_that_of_its_own(
    teacher: Any, vocabulary: Vocabulary, model_dirs: dict[str, Path]
) -> None:
    samples = drawn(teacher, vocabulary, 0)
    same = measure(Student(teacher, num_known=64), samples, seed=0)
    assert same.log_ratio == pytest.approx(0.0, abs=1e-5)
    assert (same.num_samples, same.num_tokens) == (6, sum(len(sample.output_token_ids) for sample in samples))
    assert same.teacher_nll == pytest.approx(-sum(sum(s.logprobs) for s in samples) / same.num_tokens)
    other = AutoModelForCausalLM.from_pretrained(model_dirs["untied"], dtype=torch.float32)
    found = measure(Student(other, num_known=64), samples, seed=0)
    total = 0.0
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_token_ids, *sample.output_token_ids]])
        with torch.no_grad():
            logprobs = torch.log_softmax(other(ids).logits[0, len(sample.prompt_token_ids) - 1 : -1], dim=-1)
        total += sum(sample.logprobs) - sum(float(logprobs[i, t]) for i, t in enumerate(sample.output_token_ids))
    assert found.log_ratio == pytest.approx(total / found.num_tokens, rel=1e-4)
    assert found.interval[0] < found.log_ratio < found.interval[1]


@pytest.mark.parametrize("top_logprobs", [0, 3])
def test_the_loss_is_the_likelihood_or_the_coarse_kl(
    teacher: Any, vocabulary: Vocabulary, model_dirs: dict[str, Path], top_logprobs: int
) -> None:
    samples = drawn(teacher, vocabulary, top_logprobs)
    model = AutoModelForCausalLM.from_pretrained(model_dirs["untied"], dtype=torch.float32)
    student = Student(model, num_known=64)
    part = Distillation(samples, seed=0).loss(student, samples)
    expected = 0.0
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_token_ids, *sample.output_token_ids]])
        logprobs = torch.log_softmax(model(ids).logits[0, len(sample.prompt_token_ids) - 1 : -1], dim=-1)[None]
        if top_logprobs:
            tops = torch.tensor([sample.top_token_ids]), torch.tensor([sample.top_logprobs])
            expected += float(coarse_kl(logprobs, *tops).sum().detach())
        else:
            expected -= sum(float(logprobs[0, i, t].detach()) for i, t in enumerate(sample.output_token_ids))
    assert float(part.total.detach()) == pytest.approx(expected, rel=1e-4)
    assert part.num_units == sum(len(sample.output_token_ids) for sample in samples)
    perfect = Distillation(samples, seed=0).loss(Student(teacher, num_known=64), samples)
    assert perfect.figures["log_ratio"] == pytest.approx(0.0, abs=1e-3)


def test_samples_come_back_from_their_file_as_they_were(tmp_path: Path, teacher: Any, vocabulary: Vocabulary) -> None:
    samples = drawn(teacher, vocabulary, 2)
    save_samples(tmp_path / "samples.jsonl", samples)
    assert load_samples(tmp_path / "samples.jsonl") == samples


def choice(tokens: list[str], **changes: Any) -> dict[str, Any]:
    logprobs = {
        "tokens": tokens,
        "token_logprobs": [-0.5] * len(tokens),
        "top_logprobs": [{tokens[0]: -0.5, "t9": -1.5}] * len(tokens),
    }
    return {"index": 0, "text": "", "finish_reason": "length", "logprobs": logprobs, **changes}


def api(vocabulary: Vocabulary, answer: Any, *, has_token_ids: bool) -> tuple[ApiTeacher, list[Any]]:
    import json

    bodies: list[Any] = []

    def handle(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json=answer)

    client = GatewayClient("http://provider", transport=httpx.MockTransport(handle), retry_for_s=0.0)
    teacher = ApiTeacher(
        client,
        model="big",
        sampling=SamplingConfig(max_tokens=5),
        top_logprobs=2,
        vocabulary=vocabulary,
        has_token_ids=has_token_ids,
    )
    return teacher, bodies


def test_an_api_without_token_ids_is_read_by_the_texts_of_its_tokens(vocabulary: Vocabulary) -> None:
    unknown = choice(["t4", "never seen"])
    teacher, bodies = api(vocabulary, {"choices": [choice(["t4", "t5"]), unknown]}, has_token_ids=False)
    (sample,) = teacher.draw([Prompt("t1 t2")], num_per_prompt=2, seed=7)
    assert (sample.prompt_token_ids, sample.output_token_ids) == ((1, 2), (4, 5))
    assert sample.top_token_ids == ((4, 9), (4, 9))
    assert sample.top_logprobs == ((-0.5, -1.5), (-0.5, -1.5))
    assert bodies[0]["prompt"] == "t1 t2"
    assert (bodies[0]["logprobs"], bodies[0]["n"], bodies[0]["seed"]) == (2, 2, 7)


def test_an_api_with_token_ids_is_asked_with_and_read_by_them(vocabulary: Vocabulary) -> None:
    tokens = ["token_id:4", "token_id:5"]
    logprobs = {
        "tokens": tokens,
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [{"token_id:4": -0.5, "token_id:99": -1.5}, {"token_id:5": -0.25}],
    }
    answer = {"choices": [choice(tokens, logprobs=logprobs)]}
    teacher, bodies = api(vocabulary, answer, has_token_ids=True)
    (sample,) = teacher.draw([Prompt("t1 t2")], num_per_prompt=1, seed=0)
    assert sample.output_token_ids == (4, 5)
    assert sample.top_token_ids == ((4,), (5,))  # 99 is no token of the vocabulary: part of the rest
    assert bodies[0]["prompt"] == [1, 2]


@pytest.mark.parametrize("answer", [{"choices": [{"text": "t4", "logprobs": None, "finish_reason": "stop"}]}, {}])
def test_an_api_that_tells_no_log_probabilities_is_an_error(vocabulary: Vocabulary, answer: Any) -> None:
    teacher, _ = api(vocabulary, answer, has_token_ids=False)
    with pytest.raises(EngineError, match="log-probabilities"):
        teacher.draw([Prompt("t1 t2")], num_per_prompt=1, seed=0)


def test_a_student_takes_in_no_rollouts(teacher: Any, vocabulary: Vocabulary) -> None:
    with pytest.raises(TypeError, match="no rollouts"):
        Distillation(drawn(teacher, vocabulary, 0), seed=0).add([], Student(teacher, num_known=64))
