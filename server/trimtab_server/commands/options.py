"""Options that many commands share."""

from typing import Annotated

import typer

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option("--url", envvar="TRIMTAB_URL", help="Address of the gateway.")]
AdminKey = Annotated[
    str | None, typer.Option("--admin-key", envvar="TRIMTAB_ADMIN_KEY", help="Key of the admin API.", show_envvar=True)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
RouteName = Annotated[str, typer.Option("--route", help="Public model name of the route.")]
