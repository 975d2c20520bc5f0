import os

import pytest

from trimtab_adapters.vllm import launch
from trimtab_adapters.vllm.launch import LaunchError


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER", "VLLM_NO_USAGE_STATS", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back whatever the code sets
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'], "speculative"),
        (["--enable-prompt-embeds"], "prompt embeddings"),
        (["--logits-processors", "vllm.v1.worker.gpu.sample.logits_processor.LogitsProcessor"], "V1 runner"),
        (["--logits-processors", "nowhere:Nothing"], "cannot be imported"),
        (["--host", "0.0.0.0"], "without a key"),
        (["--logprobs-mode", "processed_logprobs"], "raw_logprobs"),
        (["--pipeline-parallel-size", "2"], "several engines"),
        (["--data-parallel-size", "2"], "several engines"),
        (["--worker-extension-cls", "some.Class"], "taken by Trimtab"),
    ],
)
def test_what_would_break_steering_is_refused_with_what_to_change(arguments: list[str], words: str) -> None:
    args = launch._parse_vllm(["--model", "anything", *arguments])
    with pytest.raises(LaunchError, match=words):
        launch.check(args, {})


def test_model_runner_v2_is_refused() -> None:
    args = launch._parse_vllm(["--model", "anything"])
    with pytest.raises(LaunchError, match="Model Runner V2"):
        launch.check(args, {"VLLM_USE_V2_MODEL_RUNNER": "1"})


@pytest.mark.parametrize("arguments", [[], ["--host", "localhost"], ["--host", "::1"]])
def test_the_defaults_are_fine_and_listen_on_loopback(arguments: list[str]) -> None:
    args = launch._parse_vllm(["--model", "anything", *arguments])
    launch.check(args, {})
    assert args.port == launch.DEFAULT_PORT


def test_a_key_opens_other_addresses() -> None:
    args = launch._parse_vllm(["--model", "anything", "--host", "0.0.0.0"])
    launch.check(args, {"VLLM_API_KEY": "secret"})


def test_our_plugins_are_named_beside_the_users_own() -> None:
    own, rest = launch._own_parser().parse_known_args(
        ["--adapter-kv-bytes", "1000", "--model", "m", "--additional-config", '{"other": 1}']
    )
    args = launch._parse_vllm(rest)
    launch._add_plugins(args, own)
    assert args.logits_processors == [launch.PROCESSOR_V1]
    assert args.additional_config == {"other": 1, "trimtab": {"kv_bytes": 1000}}


@pytest.mark.parametrize(
    ("before", "after"), [("mine", "mine,trimtab"), ("trimtab,mine", "trimtab,mine"), ("", "trimtab")]
)
def test_a_list_of_plugins_that_the_user_has_set_is_kept(
    monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", before)
    launch._prepare_environment([])
    assert os.environ["VLLM_PLUGINS"] == after


def test_without_a_list_ours_is_added_to_what_is_installed() -> None:
    launch._prepare_environment([])
    assert "trimtab" in os.environ["VLLM_PLUGINS"].split(",")
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
