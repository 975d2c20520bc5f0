"""`trimtab engines`."""

from typing import Any

from trimtab_server.commands.admin_client import AdminClient
from trimtab_server.commands.options import DEFAULT_URL, AdminKey, AsJson, Url
from trimtab_server.commands.output import print_rows

_COLUMNS = {
    "name": "NAME",
    "state": "STATE",
    "model": "MODEL",
    "vllm_version": "VLLM",
    "versions": "ADAPTER VERSIONS",
    "memory": "ADAPTER MEMORY",
    "error": "ERROR",
}


def list_engines(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """List the engines and what they hold."""
    with AdminClient(url, admin_key) as client:
        engines = client.get("engines")["data"]
    rows = engines if as_json else [_row(engine) for engine in engines]
    print_rows(rows, _COLUMNS, as_json=as_json, empty="There is no engine.")


def _row(engine: dict[str, Any]) -> dict[str, Any]:
    status = engine["status"] or {}
    versions = [f"{v['name']}@{v['version']} ({v['state']})" for v in status.get("versions", [])]
    state = "ready" if engine["is_available"] else "away"
    return {
        **status,
        "name": engine["name"],
        "state": state,
        "versions": versions,
        "memory": _memory(status.get("weights")),
        "error": engine["error"],
    }


def _memory(weights: dict[str, Any] | None) -> str | None:
    if weights is None:
        return None
    budget = weights["budget_bytes"]
    return f"{weights['used_bytes']} B" if budget is None else f"{weights['used_bytes']} of {budget} B"
