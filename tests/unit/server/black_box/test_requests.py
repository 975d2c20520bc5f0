"""What requests may ask of a black box, and what is refused instead of being ignored."""

from typing import Any

import pytest

from black_box_bench import MakeBench
from fake_provider import bigram_logprobs
from trimtab_adapters.contract.errors import EngineRequestError, InvalidRequestError
from trimtab_server.engine.base import EngineRequest

pytestmark = pytest.mark.anyio

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


async def test_constraints_that_leave_nothing_are_the_callers_fault(make_bench: MakeBench) -> None:
    bench = await make_bench(num_top=1)
    best = int(bigram_logprobs(5).argmax())
    with pytest.raises(EngineRequestError) as caught:
        await bench.engine.generate(bench.steered(min_tokens=2, stop_token_ids=[best]))
    assert caught.value.engine_status == 400


@pytest.mark.parametrize(
    ("unseen", "field", "value"),
    [
        ("exclude", "logit_bias", {"7": 1.0}),
        ("exclude", "allowed_token_ids", [1, 2]),
        ("residual", "repetition_penalty", 1.2),
        ("residual", "response_format", {"type": "json_object"}),
        ("residual", "structured_outputs", {"regex": "a"}),
        ("residual", "prompt_logprobs", 0),
        ("residual", "echo", True),
        ("residual", "bad_words", ["x"]),
        ("residual", "vllm_xargs", {"a": 1}),
        ("residual", "spaces_between_special_tokens", False),
        ("residual", "never_heard_of_it", 1),
    ],
)
async def test_what_cannot_be_done_is_refused(make_bench: MakeBench, unseen: str, field: str, value: Any) -> None:
    bench = await make_bench(unseen=unseen)
    with pytest.raises(InvalidRequestError) as caught:
        await bench.engine.generate(bench.steered(**{field: value}))
    assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")
    assert bench.fake.bodies == []


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.0, "echo": False, "response_format": {"type": "text"}, "priority": 0, "bad_words": []},
        {"logit_bias": {"7": -100.0}, "min_p": 0.1, "top_k": -1, "frequency_penalty": 1.0, "presence_penalty": 1.0},
        {"seed": None, "stop": None, "return_tokens_as_token_ids": True, "include_stop_str_in_output": True},
    ],
)
async def test_what_asks_for_nothing_or_can_be_done_is_not_refused(
    make_bench: MakeBench, fields: dict[str, Any]
) -> None:
    bench = await make_bench()
    candidate = await bench.engine.generate(bench.steered(max_tokens=3, **(GREEDY | fields)))
    assert len(candidate.token_ids) == 3
    if fields.get("return_tokens_as_token_ids"):
        assert candidate.choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in candidate.token_ids]


async def test_a_banned_token_is_never_sampled(make_bench: MakeBench) -> None:
    bench = await make_bench()
    (first,) = (await bench.engine.generate(bench.steered(max_tokens=1, **GREEDY))).token_ids
    for seed in range(10):
        request = bench.steered(max_tokens=1, seed=seed, logit_bias={str(first): -100.0})
        assert (await bench.engine.generate(request)).token_ids != [first]


@pytest.mark.parametrize(("prompt", "max_tokens"), [([3] * 64, 1), ([3] * 60, 5)])
async def test_what_does_not_fit_the_context_is_refused_as_vllm_does(
    make_bench: MakeBench, prompt: list[int], max_tokens: int
) -> None:
    bench = await make_bench()
    with pytest.raises(EngineRequestError, match="maximum context length is 64") as caught:
        await bench.engine.generate(bench.steered(prompt=prompt, max_tokens=max_tokens))
    assert caught.value.engine_status == 400


async def test_ids_beyond_the_vocabulary_are_refused(make_bench: MakeBench) -> None:
    bench = await make_bench()
    for fields in ({"prompt": [3, 128]}, {"stop_token_ids": [128]}, {"logit_bias": {"128": -1}}):
        with pytest.raises(EngineRequestError, match="Token id 128 is out of vocabulary"):
            await bench.engine.generate(bench.steered(**fields))


async def test_no_limit_of_its_own_means_to_the_end_of_the_context(make_bench: MakeBench) -> None:
    bench = await make_bench(max_model_len=12)
    body = {"messages": [{"role": "user", "content": "t3 t4"}], "logprobs": True, **GREEDY}
    chat = EngineRequest("chat.completions", body, bench.steered().steering, "u")
    assert len((await bench.engine.generate(chat)).token_ids) == 10
