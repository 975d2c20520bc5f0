"""What commands print: tables for people, JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_json(value: Any) -> None:
    """JSON to standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_line(text: str) -> None:
    """A line to standard output."""
    typer.echo(text)


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, as_json: bool, empty: str) -> None:
    """A list of objects.

    Args:
        rows: The objects.
        columns: Field of an object -> heading.
        as_json: Print the whole objects as JSON.
        empty: What to say when there is none.
    """
    if as_json:
        print_json(rows)
    elif not rows:
        typer.echo(empty, err=True)
    else:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in columns.values():
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(Text(_cell(field, row.get(field))) for field in columns))
        console = Console()
        if not console.is_terminal:  # in a pipe nothing is wrapped
            console = Console(width=10_000)
        console.print(table)


def describe_steering(
    steering: Sequence[Mapping[str, Any]], operators: Mapping[str, Any] = MappingProxyType({})
) -> str:
    """A steering in one line; `base` when there is none."""
    terms = [f"{term['name']}@{term['version']}={term['alpha']:g}" for term in steering]
    if not terms and "negative_prompt" not in operators:
        terms = ["base"]  # operators have nothing to act on
    for name, value in operators.items():
        if isinstance(value, Mapping):
            terms += [f"{name}.{part}={item:g}" for part, item in value.items()]
        else:
            terms.append(f"{name}={value:g}" if isinstance(value, int | float) else name)
    return " ".join(terms)


def _cell(field: str, value: Any) -> str:
    if value is None or value == "":
        return "-"
    if field.endswith("_at"):
        return datetime.fromtimestamp(float(value), UTC).strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "-"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
