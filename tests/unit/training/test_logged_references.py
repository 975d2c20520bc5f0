import json
from pathlib import Path
from typing import Any

import pytest

from trimtab_adapters.contract.engine_api import CacheStatus, EngineStatus, WeightStatus
from trimtab_adapters.contract.records import Rollout
from trimtab_training.config import SamplingConfig
from trimtab_training.gateway import ScoreReply
from trimtab_training.logged_references import read_references
from trimtab_training.prompts import Prompt
from trimtab_training.recipes.train import train
from trimtab_training.reference_rewards import draw_reference_scores
from trimtab_training.rollouts import Sample

STATUS = EngineStatus(
    boot_id="1",
    vllm_version="0.32.0",
    runner="v1",
    model="/models/base",
    max_model_len=128,
    vocab_size=64,
    vocabulary_sha256="0" * 64,
    num_tokens=64,
    versions=[],
    cache=CacheStatus(
        budget_bytes=1,
        allocated_bytes=1,
        used_blocks=0,
        cached_blocks=0,
        total_blocks=1,
        block_size=16,
        hit_tokens=0,
        computed_tokens=0,
        recomputed_tokens=0,
    ),
    weights=WeightStatus(budget_bytes=None, used_bytes=0),
)
SAMPLING = SamplingConfig(max_tokens=4)
PROMPTS = [Prompt("t1"), Prompt("t2 t3", (2, 3))]


def request(name: str, num: int, prompt: str = "t1", **fields: Any) -> list[Rollout]:
    """All candidates of a request for one prompt, as `SAMPLING` draws them."""
    metadata = {"base_identity": STATUS.base_identity, "prompt_index": 0, **fields.pop("metadata", {})}
    ids = [int(word[1:]) for word in prompt.split()]
    return [
        Rollout.model_validate(
            {
                "id": f"{name}-{index}",
                "request_id": name,
                "created_at": 0.0,
                "duration_s": 0.1,
                "route": "tiny",
                "base_model": "tiny",
                "endpoint": "completions",
                "prompt": prompt,
                "prompt_token_ids": ids,
                "output_text": f"t{7 + index}",
                "output_token_ids": [7 + index],
                "steering": [],
                "sampling": {"temperature": 1.0, "max_tokens": 4},
                "candidate_index": index,
                "num_candidates": num,
                "finish_reason": "length",
                "metadata": metadata,
                **fields,
            }
        )
        for index in range(num)
    ]


def read(gateway: Any, *rollouts: Rollout, size: int = 8, **settings: Any) -> dict[str, list[str]]:
    gateway.engine = gateway.engine or STATUS.model_dump()
    gateway.rollouts = [rollout.model_dump_json() for rollout in rollouts]
    with gateway.client() as client:
        asked = {"sampling": SAMPLING, "defaults": {}, "size": size, **settings}
        found = read_references(client, PROMPTS, **asked)
    return {text: [rollout.id for rollout in of_prompt] for text, of_prompt in found.items()}


def test_completions_and_references_of_the_base_stand_for_what_would_be_drawn(gateway: Any) -> None:
    drawn_for_calibration = request("b", 2, endpoint="reference", metadata={"endpoint": "completions"})
    other_prompt = request("c", 1, "t2 t3")
    assert read(gateway, *request("a", 2), *drawn_for_calibration, *other_prompt) == {
        "t1": ["a-0", "a-1", "b-0", "b-1"],
        "t2 t3": ["c-0"],
    }
    assert read(gateway, *request("a", 2), *drawn_for_calibration, size=3) == {"t1": ["a-0", "a-1", "b-0"]}
    assert gateway.bodies("/admin/rollouts/export")[:2] == [
        {"format": "jsonl", "endpoint": "completions", "steered": "false"},
        {"format": "jsonl", "endpoint": "reference", "steered": "false"},
    ]


STEERED = [{"name": "kind", "version": "a" * 16, "alpha": 1.0}]


@pytest.mark.parametrize(
    "fields",
    [
        {"steering": STEERED},
        {"metadata": {"base_identity": "another base"}},
        {"metadata": {"base_identity": None}},
        {"metadata": {"selection": "adaptive"}},
        {"metadata": {"num_left_out": 1}},
        {"sampling": {"temperature": 0.5, "max_tokens": 4}},
        {"sampling": {"temperature": 1.0, "max_tokens": 5}},
        {"sampling": {"temperature": 1.0, "max_tokens": 4, "guidance": {"token_ids": [1], "scale": 2.0}}},
        {"endpoint": "chat.completions"},
        {"endpoint": "reference", "metadata": {"endpoint": "chat.completions"}},
        {"finish_reason": "abort"},
        {"prompt": "t9"},
        {"num_candidates": 3},
    ],
)
def test_what_differs_in_anything_does_not(gateway: Any, fields: dict[str, Any]) -> None:
    assert read(gateway, *request("a", 2, **fields)) == {}
    assert read(gateway, *request("a", 2)) == {"t1": ["a-0", "a-1"]}


def test_prompts_of_token_ids_are_found_by_these_and_texts_by_their_tokens_too(gateway: Any) -> None:
    of_ids = [rollout.model_copy(update={"prompt": None}) for rollout in request("a", 1, "t2 t3")]
    other_tokens = request("b", 1, "t2 t3", prompt_token_ids=[2, 3, 0])
    assert read(gateway, *of_ids, *other_tokens) == {"t2 t3": ["a-0"]}


def test_a_draw_that_was_repeated_counts_once(gateway: Any) -> None:
    seeded: dict[str, Any] = {"sampling": {"temperature": 1.0, "max_tokens": 4, "seed": 3}}
    assert read(gateway, *request("a", 1, **seeded), *request("b", 1, **seeded)) == {"t1": ["a-0"]}
    assert read(gateway, *request("a", 1), *request("b", 1)) == {"t1": ["a-0", "b-0"]}


def test_where_the_base_is_not_known_or_cuts_its_distribution_nothing_fits(gateway: Any) -> None:
    assert read(gateway, *request("a", 2), defaults={"top_k": 20}) == {}
    gateway.engine = {**STATUS.model_dump(), "model": "/models/other"}
    assert read(gateway, *request("a", 2)) == {}
    with gateway.client() as client:
        gateway.engine = None
        assert read_references(client, PROMPTS, sampling=SAMPLING, defaults={}, size=8) == {}


class CountingSource:
    """Each output has the number of its draw; remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], int, int]] = []

    def draw(self, prompts: Any, *, num_per_prompt: int, seed: int, steered: bool, on_done: Any = None) -> Any:
        assert not steered
        self.asked.append(([prompt.text for prompt in prompts], num_per_prompt, seed))
        sample = [Sample("", (1,), "drawn", (1,))] * num_per_prompt
        return [sample for _ in prompts]


class OneScorer:
    name = "one"

    def score(self, inputs: Any) -> ScoreReply:
        return ScoreReply(rewards=[1.0 for _ in inputs], version="1")


def test_only_what_is_missing_is_drawn_and_never_with_the_seeds_of_before() -> None:
    prompts = [Prompt(text) for text in ("a", "b", "c", "d")]
    source = CountingSource()
    known = {"a": [0.5] * 20, "b": [0.25] * 3, "c": [0.125] * 3}
    scores = draw_reference_scores(source, OneScorer(), prompts, size=20, seed=9, known=known)
    assert scores == {
        "a": [0.5] * 20,
        "b": [0.25] * 3 + [1.0] * 17,
        "c": [0.125] * 3 + [1.0] * 17,
        "d": [1.0] * 20,
    }
    assert [(texts, num) for texts, num, _ in source.asked] == [
        (["d"], 16),
        (["d"], 4),
        (["b", "c"], 16),
        (["b", "c"], 1),
    ]
    before = CountingSource()
    draw_reference_scores(before, OneScorer(), prompts, size=20, seed=9)
    seeds = {seed for _, _, seed in source.asked[2:]}
    assert not seeds & {seed for _, _, seed in before.asked}


def test_a_run_takes_its_references_from_the_log_and_draws_the_others(make_config: Any, gateway: Any) -> None:
    """Prompts t1 and t2; the log has two of three references of t1, and none of t2."""
    gateway.engine = STATUS.model_dump()
    gateway.rollouts = [rollout.model_dump_json() for rollout in request("a", 2)]

    def run(name: str, **transform: Any) -> tuple[Any, list[Any], dict[str, float]]:
        config = make_config(
            output_dir=str(Path(make_config().output_dir).parent / name),
            gateway={"url": "http://gateway"},
            prompts={"type": "file", "path": str(prompts)},
            reward={"source": "gateway", "transform": {"kind": "calibrated", "num_reference": 3, **transform}},
            fresh={"source": "gateway", "model": "tiny"},
            sampling={"max_tokens": 4},
            evaluation={"share": 0.0},
            steps=1,
        )
        gateway.requests.clear()
        with gateway.client() as client:
            train(config, gateway=client)
        unsteered = [body for body in gateway.bodies("/v1/completions") if not body["steering"]["adapters"]]
        lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
        figures = next(line for line in lines if "calibration/num_drawn" in line)
        return json.loads((config.output_dir / "reference_rewards.json").read_text()), unsteered, figures

    prompts = Path(make_config().output_dir).parent / "two.jsonl"
    prompts.write_text('{"prompt": "t1"}\n{"prompt": "t2"}\n')
    scores, drawn, figures = run("with")
    # Outputs t7 and t8 of the log: the gateway's reward counts the sevens.
    assert scores["t1"][:2] == [1.0, 0.0]
    assert [len(scores[text]) for text in ("t1", "t2")] == [3, 3]
    assert sorted((body["prompt"], body["n"]) for body in drawn[:2]) == [("t1", 1), ("t2", 3)]
    assert (figures["calibration/num_from_log"], figures["calibration/num_drawn"]) == (2.0, 4.0)
    _, drawn, figures = run("without", reference_from_log=False)
    assert sorted((body["prompt"], body["n"]) for body in drawn[:2]) == [("t1", 3), ("t2", 3)]
    assert figures["calibration/num_from_log"] == 0.0
