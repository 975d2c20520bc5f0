"""Rewards from real vLLM pooling servers on the CPU, against transformers' own forward pass."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from reward_server import LABELS, reward_server, write_reward_model
from trimtab_adapters.contract.errors import InvalidRequestError, RewardError, RewardUnavailableError
from trimtab_adapters.contract.rewards import RewardInput, RewardSpec
from trimtab_server.rewards.registry import RewardRegistry

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

TOLERANCE = 1e-4
"""Both compute in float32; kernels that add in another order differ by about 3e-6 in logits of up to 6."""

INPUTS = [
    RewardInput(prompt=" ".join(f"t{(7 * i + j) % 120 + 1}" for j in range(i % 5 + 1)) + " ", output=output)
    for i, output in enumerate(" ".join(f"t{(11 * i + 3 * j) % 120 + 1}" for j in range(i + 1)) for i in range(20))
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("reward_models")
    return {n: write_reward_model(root / str(n), num_labels=n, seed=n) for n in (1, 3)}


@pytest.fixture(scope="module")
def servers(models: dict[int, Path], logs: Path) -> Iterator[dict[int, tuple[str, int]]]:
    """A server per number of labels, started side by side."""
    with ExitStack() as stack, ThreadPoolExecutor(len(models)) as pool:
        managers = {n: reward_server(model, logs / f"rewards-{n}.log") for n, model in models.items()}
        started = {n: pool.submit(stack.enter_context, manager) for n, manager in managers.items()}
        yield {n: future.result() for n, future in started.items()}


@pytest.fixture
async def registry() -> AsyncIterator[RewardRegistry]:
    registry = RewardRegistry()
    yield registry
    await registry.aclose()


def reference_logits(model: Path, texts: Sequence[str]) -> Any:
    """`[texts, labels]`, one text at a time, so that nothing is padded."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        rows = [classifier(torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts]
    return torch.stack(rows)


async def until_refused(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    while True:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except ConnectionRefusedError:
            return
        except ConnectionError:
            continue
        writer.close()
        await asyncio.sleep(0.02)


async def scores_of(registry: RewardRegistry, url: str, **options: Any) -> list[float]:
    await registry.add(RewardSpec(name="judge", kind="http", target=url, options=options))
    return await (await registry.batched("judge")).score(INPUTS)


@pytest.mark.parametrize("label", [None, 0, "neutral"])
@pytest.mark.parametrize("function", ["logit", "probability"])
async def test_classify_gives_the_class_that_transformers_gives(
    registry: RewardRegistry,
    servers: dict[int, tuple[str, int]],
    models: dict[int, Path],
    label: int | str | None,
    function: str,
) -> None:
    options: dict[str, Any] = {"label": label} if label is not None else {}
    found = await scores_of(
        registry, servers[3][0], api="classify", function=function, labels=list(LABELS), max_batch_size=7, **options
    )
    logits = reference_logits(models[3], [item.output for item in INPUTS])
    index = {None: 2, 0: 0, "neutral": 1}[label]
    expected = (logits if function == "logit" else logits.softmax(-1))[:, index].tolist()
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert max(expected) - min(expected) > 100 * TOLERANCE  # else any number would pass


@pytest.mark.parametrize("api", ["classify", "score"])
@pytest.mark.parametrize("function", ["logit", "probability"])
async def test_prompt_and_output_are_scored_as_one_text(
    registry: RewardRegistry, servers: dict[int, tuple[str, int]], models: dict[int, Path], api: str, function: str
) -> None:
    options: dict[str, Any] = {"template": "prompt_output"} if api == "classify" else {}
    found = await scores_of(registry, servers[1][0], api=api, function=function, max_batch_size=6, **options)
    logits = reference_logits(models[1], [item.prompt + item.output for item in INPUTS])[:, 0]
    expected = (logits if function == "logit" else logits.sigmoid()).tolist()
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert max(expected) - min(expected) > 100 * TOLERANCE


async def test_a_text_that_is_too_long_is_an_error_or_loses_its_beginning(
    registry: RewardRegistry, servers: dict[int, tuple[str, int]], models: dict[int, Path]
) -> None:
    text = " ".join(f"t{i % 90 + 1}" for i in range(200))
    spec = RewardSpec(name="judge", kind="http", target=servers[1][0], options={"api": "classify", "function": "logit"})
    await registry.add(spec)
    with pytest.raises(RewardError, match="'judge' answered 400"):
        await (await registry.batched("judge")).score([RewardInput("", text)])
    await registry.add(spec.model_copy(update={"options": {**spec.options, "truncate_prompt_tokens": 16}}))
    found = await (await registry.batched("judge")).score([RewardInput("", text)])
    expected = reference_logits(models[1], [" ".join(text.split()[-16:])])[0].tolist()
    assert found == pytest.approx(expected, abs=TOLERANCE)


async def test_names_that_the_server_does_not_give_are_refused(
    registry: RewardRegistry, servers: dict[int, tuple[str, int]]
) -> None:
    with pytest.raises(InvalidRequestError, match="calls its classes otherwise"):
        # Each name stands at another class than the server's, so that one answer is enough to see it.
        await scores_of(registry, servers[3][0], api="classify", labels=["kind", "unkind", "neutral"])


async def test_a_server_that_is_killed_in_the_middle_of_a_request_is_an_error(
    registry: RewardRegistry, servers: dict[int, tuple[str, int]]
) -> None:
    url, group = servers[1]
    options: dict[str, Any] = {"api": "score", "max_retries": 0, "timeout_s": 60.0, "cache_size": 0}
    await registry.add(RewardSpec(name="judge", kind="http", target=url, options=options))
    reward = await registry.batched("judge")
    assert len(await reward.score(INPUTS[:2])) == 2
    os.killpg(group, signal.SIGSTOP)  # so that the request is under way when the server dies
    asked = asyncio.create_task(reward.score(INPUTS))
    await asyncio.sleep(0.5)
    assert not asked.done()
    os.killpg(group, signal.SIGKILL)
    with pytest.raises(RewardUnavailableError, match="broke its answer off"):
        await asyncio.wait_for(asked, 30)
    # The group's processes end one after the other, and as long as one has the listening socket it takes connections.
    await asyncio.wait_for(until_refused(url), 30)
    with pytest.raises(RewardUnavailableError, match="cannot be reached"):
        await reward.score(INPUTS)
