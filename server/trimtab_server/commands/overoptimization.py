"""`trimtab rewards overoptimization` and `trimtab rewards caps`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab_server.commands.admin_client import AdminClient
from trimtab_server.commands.options import DEFAULT_URL, AdminKey, AsJson, Url
from trimtab_server.commands.output import print_json, print_line, print_rows
from trimtab_server.commands.overoptimization_plot import plot_cap

_CURVE = {"n": "N", "kl": "KL", "gold": "GOLD", "interval": "95 %", "gain": "GAIN", "error": "ERROR", "law": "LAW"}
_CAPS = {
    "proxy": "CHOSEN BY",
    "gold": "GOLD",
    "base_model": "BASE",
    "cap": "CAP",
    "verdict": "VERDICT",
    "num_prompts": "PROMPTS",
    "num_samples": "SAMPLES",
    "created_at": "MEASURED (UTC)",
}
_VERDICTS = {
    "cap": "Cap: best-of-N by {proxy} up to N = {cap}; with more candidates {gold} falls.",
    "no significant bend": "No cap: over these N {gold} is not seen to turn; beta is not 1.96 standard errors above 0.",
    "no significant fall": "No cap: {gold} does not rise all the way, but neither is it seen to fall.",
    "beyond the data": "No cap: {gold} bends, but by the law it peaks at more candidates than the {max_n} measured.",
}


def overoptimization(
    proxy: Annotated[str, typer.Option(help="Reward that chooses among candidates.")],
    gold: Annotated[str, typer.Option(help="Reward that is trusted more.")],
    route: Annotated[str | None, typer.Option(help="Only rollouts of this route.")] = None,
    since: Annotated[float | None, typer.Option(help="Only rollouts completed at or after this Unix time.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rollouts to read, oldest first.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curve into this file (png, svg or pdf).")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Measure from logged rollouts how far choosing by one reward helps another, and store the cap for N.

    Rewards that the log lacks are computed, which may take a while.
    """
    body = {"proxy": proxy, "gold": gold, "route": route, "since": since, "limit": limit}
    with AdminClient(url, admin_key) as client:
        cap = client.post("selection-caps", body={name: value for name, value in body.items() if value is not None})
    if plot is not None:
        plot_cap(cap, plot)
    if as_json:
        print_json(cap)
        return
    print_line(
        f"{cap['gold']} of the best of n by {cap['proxy']}: {cap['num_prompts']} prompts, {cap['num_samples']} samples "
        f"of {cap['base_model']}, {cap['num_rollouts']} rollouts read"
    )
    for reason, count in cap["left_out"].items():
        print_line(f"left out: {count} {reason}")
    print_rows([_row(cap, point) for point in cap["curve"]], _CURVE, as_json=False, empty="")
    print_line(
        f"gain = d (alpha - beta d), d = sqrt(KL): alpha {cap['alpha']:.4g} +- {cap['alpha_standard_error']:.2g}, "
        f"beta {cap['beta']:.4g} +- {cap['beta_standard_error']:.2g}"
    )
    print_line(_VERDICTS[cap["verdict"]].format(**cap, max_n=cap["curve"][-1]["n"]))
    if plot is not None:
        print_line(f"{plot} is drawn")


def list_caps(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """List the measured caps for best-of-N."""
    with AdminClient(url, admin_key) as client:
        caps = client.get("selection-caps")["data"]
    empty = "No cap is measured; `trimtab rewards overoptimization` measures one."
    print_rows(caps, _CAPS, as_json=as_json, empty=empty)


def _row(cap: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    distance = point["kl"] ** 0.5
    return {
        **point,
        "kl": f"{point['kl']:.3f}",
        "interval": f"{point['gold_low']:.4g} .. {point['gold_high']:.4g}",
        "error": point["gain_standard_error"],
        "law": float(distance * (cap["alpha"] - cap["beta"] * distance)) + 0.0,  # no -0
    }
