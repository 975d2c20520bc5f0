"""What an evaluation found out: as JSON, and its win rates as CSV."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab_adapters.contract.errors import StorageError
from trimtab_training.evaluation.figures import OutcomeFigures, PolicyFigures, WinRate, WinRateDifference
from trimtab_training.evaluation.policies import Policy

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """A policy and the figures of its plain samples."""

    policy: Policy
    figures: PolicyFigures


@dataclass(frozen=True, slots=True)
class Report:
    """The whole; docs/evaluate.md describes its JSON.

    Attributes:
        settings: What was asked for, as in the configuration.
        prompts: Their number and fingerprint.
        rewards: Version of each reward.
        reference: Name of the reference policy.
        kl_is_of_sampled_policy: Whether samples were drawn from the distributions that the log-probabilities are of
            (temperature 1, top_p 1). Else KL is that of the next-token distributions before temperature and truncation,
            along the outputs that were sampled with them.
        policies: In the order of the configuration.
        outcomes: Every policy under every procedure.
        win_rates: Of policies over the reference under the same procedure, then of the pairs that were asked for.
        differences: Between policies other than the reference.
        times: When it began (Unix seconds) and how long it took; all else is the same when it is repeated.
    """

    settings: Mapping[str, Any]
    prompts: Mapping[str, Any]
    rewards: Mapping[str, str]
    reference: str
    kl_is_of_sampled_policy: bool
    policies: tuple[PolicyReport, ...]
    outcomes: tuple[OutcomeFigures, ...]
    win_rates: tuple[WinRate, ...]
    differences: tuple[WinRateDifference, ...]
    times: Mapping[str, float]

    @property
    def reward(self) -> str:
        """Name of the reward that chooses."""
        return str(self.settings["reward"])

    @property
    def judge(self) -> str | None:
        """Name of the judging reward."""
        return None if self.settings["judge"] is None else str(self.settings["judge"])

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        policies = [{**entry.policy.to_json(), **asdict(entry.figures)} for entry in self.policies]
        return {
            "schema_version": SCHEMA_VERSION,
            "settings": dict(self.settings),
            "prompts": dict(self.prompts),
            "rewards": dict(self.rewards),
            "reference": self.reference,
            "kl_is_of_sampled_policy": self.kl_is_of_sampled_policy,
            "policies": policies,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "win_rates": [asdict(rate) for rate in self.win_rates],
            "differences": [asdict(difference) for difference in self.differences],
            "times": dict(self.times),
        }


def write_json(report: Report, path: Path) -> None:
    """Write the report under a temporary name and rename it. Raises `StorageError`."""
    write_text(path, json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n")


def write_csv(report: Report, path: Path) -> None:
    """Write the win rates, a line for each comparison and reward that judges it. Raises `StorageError`."""
    rows = []
    for rate in report.win_rates:
        for by, estimate in ((report.reward, rate.win_rate), (report.judge, rate.judge_win_rate)):
            if estimate is not None:
                sides = (rate.policy, rate.procedure, rate.opponent, rate.opponent_procedure)
                rows.append([*sides, by, *asdict(estimate).values()])
    header = ["policy", "procedure", "opponent", "opponent_procedure", "judged_by"]
    header += ["win_rate", "standard_error", "low", "high", "interval_method"]
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([header, *rows])
    write_text(path, lines.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it. Raises `StorageError`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """See `write_text`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as exc:
        raise StorageError(f"the report cannot be written to {path}: {exc}") from exc
