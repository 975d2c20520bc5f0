import os
from argparse import ArgumentTypeError
from types import SimpleNamespace

import pytest
import vllm.triton_utils
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname

from trimtab_adapters.vllm import launch
from trimtab_adapters.vllm.launch import LaunchError


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "VLLM_PLUGINS",
        "VLLM_USE_V2_MODEL_RUNNER",
        "VLLM_NO_USAGE_STATS",
        "VLLM_API_KEY",
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
    ):
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
        (["--watermark-config", '{"scheme": "any"}'], "watermark"),
        (["--enable-batch-sharded-sampling"], "all rows of a step"),
    ],
)
def test_what_would_break_steering_is_refused_with_what_to_change(arguments: list[str], words: str) -> None:
    args = launch._parse_vllm(["--model", "anything", *arguments])
    with pytest.raises(LaunchError, match=words):
        launch.check(args, {})


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_processors_of_the_other_runner_are_refused(runner: launch.Runner) -> None:
    other: launch.Runner = "v2" if runner == "v1" else "v1"
    fitting = launch._parse_vllm(["--model", "anything", "--logits-processors", launch.PROCESSORS[runner]])
    launch.check(fitting, {}, runner)
    wrong = launch._parse_vllm(["--model", "anything", "--logits-processors", launch.PROCESSORS[other]])
    with pytest.raises(LaunchError, match=f"not of the {runner.upper()} runner's interface"):
        launch.check(wrong, {}, runner)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_our_processors_are_of_their_runners_interface(runner: launch.Runner) -> None:
    ours, theirs = launch.PROCESSORS[runner].replace(":", "."), launch.INTERFACES[runner]
    assert issubclass(resolve_obj_by_qualname(ours), resolve_obj_by_qualname(theirs))


@pytest.mark.parametrize(
    ("flag", "before", "after", "runner"),
    [
        (None, None, "0", "v1"),  # V1 unless asked otherwise
        (None, "1", "1", "v2"),
        (None, "0", "0", "v1"),
        ("v1", None, "0", "v1"),
        ("v2", None, "1", "v2"),
        ("v2", "1", "1", "v2"),
        ("auto", "0", "0", "v1"),  # vLLM's own choice, and vLLM does what the variable says
        ("auto", "1", "1", "v2"),
    ],
)
def test_the_model_runner_is_the_flag_or_the_variable(
    monkeypatch: pytest.MonkeyPatch, flag: str | None, before: str | None, after: str, runner: str
) -> None:
    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", True)
    if before is not None:
        monkeypatch.setenv(launch.RUNNER_VARIABLE, before)
    launch._prepare_environment([], flag)
    assert launch.resolve_runner(launch._parse_vllm(["--model", "anything"])) == runner
    assert os.environ[launch.RUNNER_VARIABLE] == after


@pytest.mark.parametrize(("uses_v2", "runner"), [(True, "v2"), (False, "v1")])
def test_auto_takes_what_vllm_chooses_and_pins_it(monkeypatch: pytest.MonkeyPatch, uses_v2: bool, runner: str) -> None:
    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", True)
    config = SimpleNamespace(use_v2_model_runner=uses_v2)
    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", lambda self, usage_context: config)
    launch._prepare_environment([], "auto")
    assert launch.RUNNER_VARIABLE not in os.environ
    assert launch.resolve_runner(launch._parse_vllm(["--model", "anything"])) == runner
    assert os.environ[launch.RUNNER_VARIABLE] == str(int(uses_v2))


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [("v1", "1", "contradicts"), ("v2", "0", "contradicts"), (None, "yes", "neither 0 nor 1")],
)
def test_flag_and_variable_must_agree(monkeypatch: pytest.MonkeyPatch, flag: str, value: str, words: str) -> None:
    monkeypatch.setenv(launch.RUNNER_VARIABLE, value)
    with pytest.raises(LaunchError, match=words):
        launch._prepare_environment([], flag)


def test_v2_is_refused_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", False)
    launch._prepare_environment([], "v2")
    with pytest.raises(LaunchError, match="needs Triton"):
        launch.resolve_runner(launch._parse_vllm(["--model", "anything"]))


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
        [
            "--adapter-kv-bytes",
            "1000",
            "--adapter-memory",
            "2GiB",
            "--model",
            "m",
            "--additional-config",
            '{"other": 1}',
        ]
    )
    args = launch._parse_vllm(rest)
    assert args.model == "m", "and not taken for --model-runner"
    launch._add_plugins(args, own, "v2")
    assert args.logits_processors == [launch.PROCESSORS["v2"]]
    assert args.additional_config == {"other": 1, "trimtab": {"kv_bytes": 1000, "weight_bytes": 2 << 30}}


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("800000000", 800_000_000), ("2GiB", 2 << 30), ("1.5 gib", 3 << 29), ("512MiB", 512 << 20)]
)
def test_a_size_may_have_a_unit(text: str, num_bytes: int) -> None:
    assert launch.parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "2GB", "0.1KiBs", "many"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="not a size"):
        launch.parse_bytes(text)


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


@pytest.mark.parametrize(
    ("arguments", "given", "after"),
    [
        ([], None, "4"),
        ([], "9", "9"),
        (["--gpu-memory-utilization=0.5"], None, None),
        (["--kv-cache-memory-bytes", "100"], None, None),
    ],
)
def test_on_a_cpu_the_base_gets_a_modest_cache_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], given: str | None, after: str | None
) -> None:
    if given is None:
        monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    else:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", given)
    launch._prepare_environment(arguments)
    assert os.environ.get("VLLM_CPU_KVCACHE_SPACE") == after
