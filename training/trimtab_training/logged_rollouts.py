"""Logged rollouts on their way into training: read, sifted, and counted where they are left out."""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from trimtab_adapters.contract.errors import InvalidRequestError
from trimtab_adapters.contract.records import Rollout
from trimtab_adapters.contract.reference_policy import NUM_LEFT_OUT
from trimtab_training.gateway import GatewayClient
from trimtab_training.logged_config import LoggedConfig
from trimtab_training.rollout_files import read_rollout_files

logger = logging.getLogger(__name__)

REASONS = {
    "broken_off": "are of requests in which a candidate was broken off or failed",
    "partial_request": "are of requests whose other candidates were not read: the chosen ones alone are no fair sample",
    "empty": "are of requests with an output or a prompt without tokens",
    "operators": "were steered with operators or a negative prompt; logged.with_operators takes them into a pool",
    "held_out": "are of prompts that are held out",
    "no_reference": "are of prompts without reference rollouts, so that their reward has no rank",
    "strategy": "were drawn until one was good enough, or rejected early, or put together from blocks",
    "no_logprobs": "have no recorded log-probabilities, without which only a pool can learn from them",
    "repeated": "repeat another one",
    "unrated": "have no rating",
}
"""Why rollouts are left out, by the word that metrics use. `sampling_` with the name of a setting stands for
log-probabilities that are not those of the distribution that was sampled from."""

_USABLE_FINISH_REASONS = ("stop", "length")

Reason = Callable[[Rollout], str | None]


def read_logged(config: LoggedConfig, gateway: GatewayClient | None) -> list[Rollout]:
    """The logged rollouts that `config` selects: of its files, or else of the gateway.

    Raises:
        TrimtabError: They cannot be read.
    """
    if not config.enabled:
        return []
    if config.path:
        return read_rollout_files(config.path, config.where)
    if gateway is None:
        raise InvalidRequestError("the configuration needs a [gateway], or logged.path")
    where = config.where.model_dump(exclude_none=True, exclude_defaults=True)
    if not config.asks_for_outcome:
        where.pop("whole_requests", None)
    return list(gateway.read_rollouts(where))


class RolloutSieve:
    """Rollouts of which more and more are left out.

    Attributes:
        rollouts: Those that are still in, in the order of the log.
        num_read: How many there were.
        left_out: How many are not, by reason; see `REASONS`.
    """

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self.rollouts = list(rollouts)
        self.num_read = len(self.rollouts)
        self.left_out: Counter[str] = Counter()

    def leave_out(self, reason: Reason) -> None:
        """Leave out each rollout for which there is a reason."""
        reasons = {rollout.id: reason(rollout) for rollout in self.rollouts}
        self._keep(reasons)

    def leave_out_requests(self, reason: Reason) -> None:
        """Leave out all candidates of a prompt of a request when there is a reason for one: all are read or none."""
        reasons: dict[str, str | None] = {}
        for group in requests_of(self.rollouts):
            found = next(filter(None, map(reason, group)), None)
            reasons |= {rollout.id: found for rollout in group}
        self._keep(reasons)

    def leave_out_incomplete(self) -> None:
        """Leave out requests of which not all candidates are there, ended by themselves and not empty."""
        self.leave_out_requests(_unusable)
        partial = {rollout.id for group in requests_of(self.rollouts) if not _is_whole(group) for rollout in group}
        self.leave_out(lambda rollout: "partial_request" if rollout.id in partial else None)

    def leave_out_repeats(self, key: Callable[[Rollout], Hashable]) -> None:
        """Of rollouts with the same key keep the first, with the rewards and the feedback of all."""
        kept: dict[Hashable, Rollout] = {}
        for rollout in self.rollouts:
            first = kept.get(key(rollout))
            kept[key(rollout)] = rollout if first is None else _merged(first, rollout)
        self.left_out["repeated"] += len(self.rollouts) - len(kept)
        self.rollouts = list(kept.values())

    def figures(self) -> dict[str, float]:
        """For the metrics."""
        left_out = {f"left_out/{reason}": float(num) for reason, num in sorted(self.left_out.items()) if num}
        return {"num_read": float(self.num_read), "num_used": float(len(self.rollouts)), **left_out}

    def report(self) -> None:
        """Say in the program's log what became of the rollouts."""
        logger.info("%d of %d logged rollouts are learned from", len(self.rollouts), self.num_read)
        for reason, num in self.left_out.most_common():
            if num:
                logger.info("left out: %d logged rollouts that %s", num, _in_words(reason))

    def _keep(self, reasons: dict[str, str | None]) -> None:
        self.left_out.update(reason for rollout in self.rollouts if (reason := reasons[rollout.id]) is not None)
        self.rollouts = [rollout for rollout in self.rollouts if reasons[rollout.id] is None]


def requests_of(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """The rollouts by request, prompt and endpoint: what was drawn together, in the order in which it was drawn."""
    groups: dict[Hashable, list[Rollout]] = {}
    for rollout in rollouts:
        key = (rollout.request_id, rollout.metadata.get("prompt_index"), rollout.endpoint)
        groups.setdefault(key, []).append(rollout)
    return [sorted(group, key=lambda rollout: rollout.candidate_index) for group in groups.values()]


def same_output(rollout: Rollout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Equal for the same output of the same prompt: a pool learns nothing from seeing it again."""
    return tuple(rollout.prompt_token_ids), tuple(rollout.output_token_ids)


def same_draw(rollout: Rollout) -> Hashable:
    """Equal for what is one draw, read twice or drawn twice with one seed.

    Samples that are equal by chance are two draws: with only one of them, what is probable would count for too little.
    """
    seed = rollout.sampling.get("seed")
    if seed is None:
        return rollout.id
    terms = tuple((term.version, term.alpha) for term in rollout.steering if term.alpha != 0.0)
    return same_output(rollout), seed, terms


def _unusable(rollout: Rollout) -> str | None:
    if rollout.finish_reason not in _USABLE_FINISH_REASONS or rollout.metadata.get(NUM_LEFT_OUT):
        return "broken_off"
    return None if rollout.prompt_token_ids and rollout.output_token_ids else "empty"


def _is_whole(group: Sequence[Rollout]) -> bool:
    return [rollout.candidate_index for rollout in group] == list(range(group[0].num_candidates))


def _merged(first: Rollout, other: Rollout) -> Rollout:
    return first.model_copy(
        update={"rewards": [*first.rewards, *other.rewards], "feedback": [*first.feedback, *other.feedback]}
    )


def _in_words(reason: str) -> str:
    if reason.startswith("sampling_"):
        return f"were sampled with another {reason.removeprefix('sampling_')} than the policy's own distribution has"
    return REASONS[reason]
