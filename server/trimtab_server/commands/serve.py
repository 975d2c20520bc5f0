"""`trimtab serve`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab_server.commands.errors import CommandError


def serve(
    model: Annotated[str | None, typer.Option(help="Hub id or directory of the base model.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Public name of the base model.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=DIRECTORY, registered at start; may be repeated.")
    ] = None,
    engine_url: Annotated[
        list[str] | None, typer.Option(help="Engine that runs elsewhere (one). Without it an engine is started here.")
    ] = None,
    engine_kind: Annotated[str | None, typer.Option(help="vllm (default), or transformers: slow, any LM.")] = None,
    black_box_url: Annotated[
        str | None, typer.Option(help="Completions API of a base behind somebody else's API, such as https://host/v1.")
    ] = None,
    black_box_model: Annotated[str | None, typer.Option(help="The base model's name there.")] = None,
    black_box_tokenizer: Annotated[
        str | None, typer.Option(help="Hub id or directory of the base model's tokenizer.")
    ] = None,
    black_box_api: Annotated[
        str | None, typer.Option(help="openai (default), or vllm for a vLLM server, which gives token ids.")
    ] = None,
    black_box_logprobs: Annotated[
        int | None, typer.Option(help="Most probable tokens asked for at each step; 20 by default.")
    ] = None,
    black_box_context: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer together; 4096 by default.")
    ] = None,
    black_box_unseen: Annotated[
        str | None, typer.Option(help="Tokens that the API does not show: exclude (default) or residual.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 8000 by default, 0 takes a free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Versions, rollouts and the SQLite database.")] = None,
    database_url: Annotated[
        str | None, typer.Option(help="PostgreSQL instead of SQLite in the data directory.")
    ] = None,
    rollouts: Annotated[str | None, typer.Option(help="durable (default), async or off.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key for /v1; may be repeated. Others on this machine see it: better set TRIMTAB_API_KEYS."),
    ] = None,
    admin_key: Annotated[
        list[str] | None, typer.Option(help="Key for /admin; may be repeated. Better set TRIMTAB_ADMIN_KEYS.")
    ] = None,
    engine_args: Annotated[
        list[str] | None, typer.Argument(metavar="-- ENGINE_ARGS", help="More arguments for the engine.")
    ] = None,
) -> None:
    """Start the gateway and, unless --engine-url, --black-box-url or --engine-kind transformers is given, an engine.

    What no option says comes from the environment: TRIMTAB_MODEL, TRIMTAB_ENGINE_URLS and so on. The key of a black
    box comes from there alone: TRIMTAB_BLACK_BOX_API_KEY.
    """
    if engine_args and not engine_args[0].startswith("-"):
        raise CommandError(f"unexpected argument {engine_args[0]!r}; arguments for the engine come after `--`")
    given: dict[str, Any] = {
        "model": model,
        "served_model_name": served_model_name,
        "adapters": adapter,
        "engine_urls": engine_url,
        "engine_kind": engine_kind,
        "black_box_url": black_box_url,
        "black_box_model": black_box_model,
        "black_box_tokenizer": black_box_tokenizer,
        "black_box_api": black_box_api,
        "black_box_logprobs": black_box_logprobs,
        "black_box_context": black_box_context,
        "black_box_unseen": black_box_unseen,
        "host": host,
        "port": port,
        "data_dir": data_dir,
        "database_url": database_url,
        "rollouts": rollouts,
        "api_keys": api_key,
        "admin_keys": admin_key,
        "engine_args": engine_args,
    }
    settings = _settings({name: value for name, value in given.items() if value not in (None, [])})
    from trimtab_server.serve import run  # noqa: PLC0415 - loads the whole gateway

    raise typer.Exit(run(settings))


def _settings(given: dict[str, Any]) -> Any:
    """The gateway's settings. Imported here, because the other commands start faster without them."""
    from pydantic import ValidationError  # noqa: PLC0415
    from pydantic_settings import SettingsError  # noqa: PLC0415

    from trimtab_server.settings import Settings  # noqa: PLC0415

    try:
        return Settings(**given)
    except ValidationError as exc:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in exc.errors(include_url=False)]
        raise CommandError("these settings cannot be used:\n  " + "\n  ".join(problems)) from exc
    except SettingsError as exc:
        raise CommandError(f"these settings cannot be used: {exc}") from exc
