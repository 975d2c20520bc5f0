"""The gateway's settings: frozen, read once, and the only place that reads the environment."""

import ipaddress
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from trimtab_adapters.contract.sampling import UnseenTokens

RolloutMode = Literal["off", "async", "durable"]


def is_loopback(host: str) -> bool:
    """Whether a bind address can only be reached from this machine. Names other than `localhost` count as public."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Settings(BaseSettings):
    """Settings of `trimtab serve`. Each can be set as an environment variable with the prefix `TRIMTAB_`.

    Lists are written with commas in the environment (`TRIMTAB_API_KEYS=a,b`); `engine_args` is written as on a
    command line. An unknown keyword argument is an error.
    """

    model_config = SettingsConfigDict(env_prefix="TRIMTAB_", extra="forbid", frozen=True, env_ignore_empty=True)

    host: str = "127.0.0.1"
    """Address to listen on. Other machines can reach anything but a loopback address, so that needs `api_keys`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free port."""
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """Keys that open `/v1`. With none, everyone who can reach a loopback address may use it."""
    admin_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """Keys that open `/admin`. With none, `/admin` is open on a loopback address and closed on any other."""
    data_dir: Path = Field(default_factory=lambda: Path.home() / ".trimtab")
    """Where adapter versions, the spool and the default database live."""
    database_url: str | None = None
    """SQLAlchemy URL; None means SQLite in `data_dir`."""
    engine_urls: Annotated[tuple[str, ...], NoDecode] = ()
    """Base URL of an engine that runs elsewhere; at most one. With none, an engine is started as a child."""
    engine_api_key: SecretStr | None = None
    """Key that the engines were started with."""
    model: str | None = None
    """Hub id or directory of the base model."""
    served_model_name: str | None = None
    """Public name of the base model; None means `model`."""
    adapters: Annotated[dict[str, Path], NoDecode] = Field(default_factory=dict)
    """Adapters to register at start, `name=directory`."""
    adapter_roots: Annotated[tuple[Path, ...], NoDecode] = ()
    """Directories that the admin API may register adapters from. With none, any directory that the gateway can read."""
    max_body_bytes: int = Field(default=32 * 1024 * 1024, gt=0)
    """Largest request body."""
    request_timeout_s: float | None = Field(default=600.0, gt=0)
    """Longest time one request may take, streaming included. None means no limit."""
    keep_alive_s: float = Field(default=10.0, gt=0)
    """Longest silence of a stream that waits for its choices; a comment is sent then, as proxies end silent ones."""
    max_concurrent_candidates: int = Field(default=1024, gt=0)
    """Candidates sent to one engine at the same time; more wait in the gateway."""
    adapter_wait_s: float = Field(default=30.0, ge=0)
    """Longest time that a request waits for adapter memory, where the engine has a budget for it."""
    rollouts: RolloutMode = "durable"
    """`durable` answers only when the rollouts are on disk, `async` soon after, `off` logs nothing."""
    calibration_size: int = Field(default=16, ge=1, le=1024)
    """Reference rollouts drawn per prompt to calibrate a reward."""
    engine_args: Annotated[tuple[str, ...], NoDecode] = ()
    """More arguments for the supervised engine, as on vLLM's command line."""
    engine_nice: int = Field(default=10, ge=0, le=19)
    """Priority of the supervised engine. Its busy loops would starve the gateway on a small machine at priority 0."""
    engine_kind: Literal["vllm", "transformers"] = "vllm"
    """What runs `model`: a supervised engine of vLLM, or transformers in the gateway's own process, which is slower and
    also runs encoder-decoder models."""
    transformers_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base's weights in transformers; `auto` is that of its files."""
    transformers_device: str = "cpu"
    """Where the base runs in transformers. Adapter LMs run on the CPU beside it."""
    transformers_context: int | None = Field(default=None, ge=2)
    """Most tokens of prompt and answer together in transformers, where the model does not say so or less is wanted."""
    adapter_kv_bytes: int = Field(default=1 << 30, gt=0)
    """Budget of the adapter LMs' KV cache where they run in the gateway's process: beside a black box, and in
    transformers."""
    black_box_url: str | None = None
    """Base URL of an OpenAI-compatible completions API, with its version (`https://host/v1`), behind which the base
    model is. It takes the place of an engine, and adapter LMs run in the gateway's process."""
    black_box_model: str | None = None
    """The base model's name there."""
    black_box_api_key: SecretStr | None = None
    """Key of that API. Set it in the environment; no command-line option takes it."""
    black_box_tokenizer: str | None = None
    """Hub id or directory of the base model's tokenizer, with its chat template for chat completions."""
    black_box_api: Literal["openai", "vllm"] = "openai"
    """What the API understands: OpenAI's legacy completions alone, or vLLM's fields and token ids as well."""
    black_box_prompt: Literal["token_ids", "text"] = "token_ids"
    """How prompts are sent. Text is for APIs that take no token ids; they may split it into other tokens."""
    black_box_logprobs: int = Field(default=20, ge=1, le=10_000)
    """k: most probable tokens asked for at each step; no more than the API allows."""
    black_box_unseen: UnseenTokens = "exclude"
    """Tokens that the API does not show: `exclude` them from what can be sampled, or spread the `residual` of the
    probability evenly over them."""
    black_box_context: int = Field(default=4096, ge=2)
    """Most tokens of prompt and answer together. Adapter LMs must allow as many positions."""
    black_box_lookahead: int = Field(default=1, ge=1, le=256)
    """Tokens asked for in one call. With more than 1 the API goes on greedily, and calls are saved as long as the
    steered answer has the same tokens; its log-probabilities must not depend on temperature then."""
    black_box_timeout_s: float = Field(default=60.0, gt=0, le=3600)
    """How long one attempt at a call may take."""
    black_box_deadline_s: float = Field(default=180.0, gt=0, le=3600)
    """How long one call may take in all attempts, waiting included."""
    black_box_max_retries: int = Field(default=4, ge=0, le=20)
    """Further attempts at a call after what may pass."""
    black_box_max_calls: int = Field(default=32, ge=1, le=4096)
    """Calls at the same time."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("api_keys", "admin_keys", "engine_urls", "adapter_roots", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("api_keys", "admin_keys")
    @classmethod
    def _real_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(not key.get_secret_value().strip() for key in keys):
            raise ValueError("a key must not be empty")
        return keys

    @field_validator("engine_urls")
    @classmethod
    def _http_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is not an http:// or https:// address")
        return tuple(url.rstrip("/") for url in urls)

    @field_validator("engine_args", mode="before")
    @classmethod
    def _split_command_line(cls, value: Any) -> Any:
        return tuple(shlex.split(value)) if isinstance(value, str) else value

    @field_validator("adapters", mode="before")
    @classmethod
    def _split_adapters(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, list | tuple):
            return value
        adapters: dict[str, str] = {}
        for item in value:
            name, separator, directory = str(item).partition("=")
            if not (separator and name and directory):
                raise ValueError(f"{item!r} is not name=directory")
            if name in adapters:
                raise ValueError(f"the adapter {name!r} is given twice")
            adapters[name] = directory
        return adapters

    @model_validator(mode="after")
    def _keys_for_public_binds(self) -> Self:
        if not self.is_loopback_bind and not self.api_keys:
            raise ValueError(
                f"host {self.host!r} can be reached from other machines: set TRIMTAB_API_KEYS, or listen on 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _transformers_run_a_model(self) -> Self:
        if self.engine_kind == "transformers" and (self.model is None or self.engine_urls or self.engine_args):
            raise ValueError("engine_kind transformers needs model, and has no use for engine_urls and engine_args")
        return self

    @model_validator(mode="after")
    def _whole_black_box(self) -> Self:
        if self.black_box_url is None:
            return self
        parsed = urlsplit(self.black_box_url)
        if parsed.scheme not in ("http", "https") or not parsed.hostname:
            raise ValueError("black_box_url must be an http:// or https:// address")
        if parsed.username or parsed.password or parsed.query or parsed.fragment:
            raise ValueError("black_box_url must hold no user, password or query; set TRIMTAB_BLACK_BOX_API_KEY")
        if self.black_box_model is None or self.black_box_tokenizer is None:
            raise ValueError("black_box_url needs black_box_model and black_box_tokenizer")
        if self.engine_urls or self.engine_args or self.model is not None:
            raise ValueError("black_box_url takes the place of an engine: leave model, engine_urls and engine_args out")
        return self

    @property
    def is_loopback_bind(self) -> bool:
        """Whether only this machine can reach the gateway."""
        return is_loopback(self.host)

    @property
    def base_model(self) -> str:
        """Public name of the base model."""
        return self.served_model_name or self.model or self.black_box_model or "base"

    @property
    def database(self) -> str:
        """SQLAlchemy URL of the database."""
        return self.database_url or f"sqlite:///{self.data_dir / 'trimtab.db'}"
