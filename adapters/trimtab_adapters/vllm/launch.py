"""`trimtab engine`: a stock vLLM server with Trimtab's three plug-ins.

Nothing of vLLM is patched or forked: its own argument parser and server function are called, with the processor, the
worker extension and the endpoint plug-in named by flags. All of vLLM's flags are accepted. Written for vLLM 0.32.
"""

import ctypes
import ipaddress
import json
import os
import re
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from importlib.metadata import entry_points
from typing import Any, Literal

SUPPORTED_VLLM = "0.32."
Runner = Literal["v1", "v2"]
PROCESSORS: dict[Runner, str] = {
    "v1": "trimtab_adapters.vllm.processor_v1:SteeringProcessor",
    "v2": "trimtab_adapters.vllm.processor_v2:SteeringProcessorV2",
}
INTERFACES: dict[Runner, str] = {
    "v1": "vllm.v1.sample.logits_processor.LogitsProcessor",
    "v2": "vllm.v1.worker.gpu.sample.logits_processor.LogitsProcessor",
}
"""What vLLM's two model runners take as a logits processor; neither takes the other's."""
RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
WORKER_EXTENSION = "trimtab_adapters.vllm.worker_extension.TrimtabWorkerExtension"
ENDPOINT_PLUGIN = "trimtab"
DEFAULT_PORT = 8100
KEEP_ALIVE_S = "75"
"""Seconds that vLLM's server keeps an idle connection. With its own 5 a server that has stood still for a moment, on a
busy machine say, closes connections on which requests wait: uvloop runs timers before it reads what has come in."""

DEFAULT_CPU_KV_GIB = "4"
"""The base's KV cache on a CPU, as in the Compose file."""
_MEMORY_FLAGS = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


class LaunchError(Exception):
    """The engine must not be started like this; the message says what to change."""


def main(argv: list[str]) -> int:
    """Run an engine in the foreground until it is told to stop. Returns the exit status."""
    own, rest = _own_parser().parse_known_args(argv)
    if own.help:
        _own_parser().print_help()
        print("\nAll flags of vLLM's OpenAI server are accepted too; `trimtab engine --vllm-help` lists them.")
        return 0
    if own.nice:
        os.nice(own.nice)
    if own.die_with_parent:
        die_with_parent()
    try:
        _prepare_environment(rest, own.model_runner)
        args = _parse_vllm(["--help"] if own.vllm_help else rest)
        runner = resolve_runner(args)
        check(args, dict(os.environ), runner)
    except LaunchError as exc:
        print(f"trimtab engine: {exc}", file=sys.stderr)
        return 2
    _add_plugins(args, own, runner)
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server

    uvloop.run(run_server(args))
    return 0


def _own_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="trimtab engine",
        add_help=False,
        allow_abbrev=False,  # or vLLM's --model would be taken for --model-runner
        description="Run a vLLM server that steers with adapter LMs.",
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help")
    parser.add_argument("--vllm-help", action="store_true", help="show vLLM's own flags")
    parser.add_argument(
        "--adapter-kv-bytes", type=int, default=1 << 30, help="budget of the adapter LMs' KV cache (default: 1 GiB)"
    )
    parser.add_argument(
        "--adapter-memory",
        type=parse_bytes,
        metavar="BYTES",
        help="budget of the weights of all adapter versions that are loaded, such as 800000000 or 2GiB "
        "(default: no bound)",
    )
    parser.add_argument(
        "--adapter-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of adapter weights and cache (default: as saved)",
    )
    parser.add_argument(
        "--model-runner",
        choices=("auto", "v1", "v2"),
        help=f"vLLM's model runner; auto is vLLM's own choice (default: what {RUNNER_VARIABLE} says, else v1; "
        "Trimtab has not been run on v2 yet)",
    )
    parser.add_argument(
        "--die-with-parent", action="store_true", help="stop when the process that started this one ends"
    )
    parser.add_argument("--nice", type=int, default=0, help="lower the priority by this much: vLLM busy-waits")
    return parser


def parse_bytes(text: str) -> int:
    """A number of bytes, plain or with a binary unit: `2GiB`, `1.5GiB`, `512MiB`.

    Raises:
        ArgumentTypeError: Another form, or not more than 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]iB)?", text.strip(), re.IGNORECASE)
    unit = "kmgt".index(match[2][0].lower()) + 1 if match and match[2] else 0
    num_bytes = int(float(match[1]) * 1024**unit) if match and (unit or "." not in match[1]) else 0
    if num_bytes < 1:
        raise ArgumentTypeError(f"{text!r} is not a size: write bytes, or a number with KiB, MiB, GiB or TiB")
    return num_bytes


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent ends, so that a killed gateway leaves no engine behind (Linux)."""
    pr_set_pdeathsig = 1
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM) != 0:
        raise LaunchError(f"--die-with-parent does not work here: {os.strerror(ctypes.get_errno())}")


def _prepare_environment(argv: list[str], model_runner: str | None = None) -> None:
    """Set what vLLM reads from the environment, before it is imported. What the user has set wins.

    Raises:
        LaunchError: Flag and environment name different model runners.
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:  # naming one plug-in forbids all others, so name what is installed
        names = {point.name for group in _PLUGIN_GROUPS for point in entry_points(group=group)}
        os.environ["VLLM_PLUGINS"] = ",".join(sorted(names | {ENDPOINT_PLUGIN}))
    elif ENDPOINT_PLUGIN not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = ",".join([*filter(None, allowed.split(",")), ENDPOINT_PLUGIN])
    _prepare_runner(model_runner)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", KEEP_ALIVE_S)
    if not any(argument.split("=")[0] in _MEMORY_FLAGS for argument in argv):
        # Only vLLM's CPU backend reads it. Without it an engine wants nearly all memory of the machine to be free.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", DEFAULT_CPU_KV_GIB)
    if "--enforce-eager" in argv:
        # On CPU the log-probability kernel is compiled even in eager mode: 10 s at the first request.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _prepare_runner(model_runner: str | None) -> None:
    """Put the wish for a model runner where vLLM looks for it; `auto` leaves the choice to vLLM."""
    if model_runner == "auto":
        return
    wanted = "1" if model_runner == "v2" else "0"
    given = os.environ.setdefault(RUNNER_VARIABLE, wanted)
    if given not in ("0", "1"):
        raise LaunchError(f"{RUNNER_VARIABLE}={given} is neither 0 nor 1.")
    if model_runner is not None and given != wanted:
        raise LaunchError(f"--model-runner {model_runner} contradicts {RUNNER_VARIABLE}={given}; drop one of the two.")


def resolve_runner(args: Namespace) -> Runner:
    """Which model runner vLLM will use, pinned in the environment so that no process of it decides otherwise.

    Raises:
        LaunchError: V2 is wanted where it cannot run.
    """
    if RUNNER_VARIABLE not in os.environ:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext

        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
        os.environ[RUNNER_VARIABLE] = "1" if config.use_v2_model_runner else "0"
    if os.environ[RUNNER_VARIABLE] == "0":
        return "v1"
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        raise LaunchError("Model Runner V2 needs Triton, which works on GPUs only; use --model-runner v1.")
    return "v2"


def _parse_vllm(argv: list[str]) -> Namespace:
    """vLLM's own parser, with a loopback bind and our port as defaults.

    Raises:
        LaunchError: vLLM is missing or has another version.
    """
    try:
        import vllm
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as exc:
        raise LaunchError(f"vLLM cannot be imported ({exc}); install trimtab's `cpu` or `cuda` extra") from exc
    if not vllm.__version__.startswith(SUPPORTED_VLLM):
        raise LaunchError(f"vLLM {vllm.__version__} is installed; this version of Trimtab works with {SUPPORTED_VLLM}x")
    parser = make_arg_parser(FlexibleArgumentParser(prog="trimtab engine"))
    parser.set_defaults(host="127.0.0.1", port=DEFAULT_PORT)
    args: Namespace = parser.parse_args(argv)
    if args.model_tag is not None:
        args.model = args.model_tag
    validate_parsed_serve_args(args)
    return args


def check(args: Namespace, environ: dict[str, str], runner: Runner = "v1") -> None:
    """Refuse what would break steering, before anything is loaded.

    Args:
        args: vLLM's parsed arguments.
        environ: The process environment.
        runner: The model runner that vLLM will use.

    Raises:
        LaunchError: With what to change.
    """
    if args.speculative_config is not None:
        raise LaunchError(
            "speculative decoding and steering do not go together: draft tokens would not be steered. "
            "Remove --speculative-config."
        )
    if args.enable_prompt_embeds:
        raise LaunchError(
            "prompt embeddings cannot be steered, because an adapter LM reads token ids. Remove --enable-prompt-embeds."
        )
    if args.watermark_config is not None:
        raise LaunchError("watermarks replace the sampler that reports steering. Remove --watermark-config.")
    if args.enable_batch_sharded_sampling:
        raise LaunchError("steering needs all rows of a step in each worker. Remove --enable-batch-sharded-sampling.")
    if args.logprobs_mode != "raw_logprobs":
        raise LaunchError(f"--logprobs-mode {args.logprobs_mode} hides the base's log-probabilities; use raw_logprobs.")
    for name, flag in (
        ("pipeline_parallel_size", "--pipeline-parallel-size"),
        ("data_parallel_size", "--data-parallel-size"),
    ):
        if getattr(args, name, 1) != 1:
            raise LaunchError(f"{flag} is not supported; run several engines behind one gateway instead.")
    if args.worker_extension_cls:
        raise LaunchError("--worker-extension-cls is taken by Trimtab; vLLM allows one only.")
    _check_processors(args.logits_processors or [], runner)
    keys = [key for key in (*(args.api_key or ()), environ.get("VLLM_API_KEY")) if key]
    if not keys and not _is_loopback(args.host):
        raise LaunchError(
            f"refusing to listen on {args.host} without a key: anybody could change the adapters. "
            "Set VLLM_API_KEY (or --api-key), or listen on 127.0.0.1."
        )


def _check_processors(names: list[Any], runner: Runner) -> None:
    """The user's own processors must be of the runner that will load them, or vLLM dies with a riddle."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    interface: Any = resolve_obj_by_qualname(INTERFACES[runner])
    for name in names:
        try:
            processor = resolve_obj_by_qualname(name.replace(":", ".")) if isinstance(name, str) else name
        except (ImportError, AttributeError, ValueError) as exc:
            raise LaunchError(f"--logits-processors {name} cannot be imported: {exc}") from exc
        if not (isinstance(processor, type) and issubclass(processor, interface)):
            raise LaunchError(
                f"--logits-processors {name} is not of the {runner.upper()} runner's interface "
                f"({INTERFACES[runner]}), which this engine uses."
            )


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _add_plugins(args: Namespace, own: Namespace, runner: Runner) -> None:
    """Name our plug-ins in vLLM's arguments."""
    args.logits_processors = [*(args.logits_processors or []), PROCESSORS[runner]]
    args.worker_extension_cls = WORKER_EXTENSION
    settings: dict[str, Any] = {"kv_bytes": own.adapter_kv_bytes}
    if own.adapter_memory is not None:
        settings["weight_bytes"] = own.adapter_memory
    if own.adapter_dtype:
        settings["dtype"] = own.adapter_dtype
    given = args.additional_config or {}
    args.additional_config = {**(json.loads(given) if isinstance(given, str) else given), "trimtab": settings}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
