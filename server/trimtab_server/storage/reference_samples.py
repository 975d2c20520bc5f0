"""Samples of reference policies in the rollout log."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, func, select

from trimtab_adapters.contract.calibration import prompt_key
from trimtab_adapters.contract.records import RewardValue, Rollout
from trimtab_adapters.contract.reference_policy import ReferencePolicy
from trimtab_server.storage.base import LoggedSample
from trimtab_server.storage.database import Database
from trimtab_server.storage.tables import rollouts

_COLUMNS = ("request_id", "endpoint", "prompt", "prompt_token_ids", "output_text", "candidate_index")
_MORE_COLUMNS = ("num_candidates", "rewards", "metadata")
_MAX_POLICIES = 32
_MARGIN = 256
"""Rows that are read beyond what is asked for, since requests that are not complete are dropped."""


class SqlSampleLog:
    """A `SampleLog` over the database. Samples are found by an index, so that a large log costs nothing."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def of_prompt(self, policy: str, prompt_token_ids: Sequence[int], *, limit: int) -> list[LoggedSample]:
        """At most `limit` samples of one prompt, the newest requests first; `policy` is a `ReferencePolicy.key`."""
        digest = ReferencePolicy.from_key(policy).digest
        statement = _samples(digest, limit).where(rollouts.c.prompt_key == prompt_key(prompt_token_ids))
        return await self._read(statement, limit)

    async def of_policy(self, policy: str, *, limit: int) -> list[LoggedSample]:
        """At most `limit` samples of any prompts, the newest requests first."""
        return await self._read(_samples(ReferencePolicy.from_key(policy).digest, limit), limit)

    async def most_sampled(self, base_model: str, identity: str | None) -> ReferencePolicy | None:
        """The policy of a base model, as it is now, that the log has the most samples of; None when it has none."""
        columns = rollouts.c
        count = func.count().label("count")
        counted = (
            select(columns.policy, func.min(columns.id).label("id"), count)
            .where(columns.policy.is_not(None), columns.base_model == base_model)
            .group_by(columns.policy)
            .order_by(count.desc(), columns.policy)
            .limit(_MAX_POLICIES)
        ).subquery()
        whole = [column for column in columns if column.name in Rollout.model_fields]
        examples = select(*whole).join(counted, counted.c.id == columns.id).order_by(counted.c.count.desc())

        def fetch(connection: Connection) -> list[Rollout]:
            return [Rollout.model_validate(dict(row)) for row in connection.execute(examples).mappings()]

        found = [ReferencePolicy.of_rollout(example) for example in await self._database.read(fetch)]
        return next((policy for policy in found if policy is not None and policy.identity == identity), None)

    async def _read(self, statement: Select[Any], limit: int) -> list[LoggedSample]:
        def fetch(connection: Connection) -> list[LoggedSample]:
            return [_sample(row) for row in complete(connection.execute(statement).mappings())][:limit]

        return await self._database.read(fetch)


def complete(rows: Iterable[RowMapping]) -> list[RowMapping]:
    """The rows of which all candidates of the same request and prompt are there, in the order of generation.

    A part of them may be the best ones only: a request's candidates reach the database best first.
    """
    groups: defaultdict[tuple[Any, ...], list[RowMapping]] = defaultdict(list)
    for row in rows:
        groups[row["request_id"], row["metadata"].get("prompt_index"), row["endpoint"]].append(row)
    whole = [group for group in groups.values() if len(group) == group[0]["num_candidates"]]
    return [row for group in whole for row in sorted(group, key=lambda row: int(row["candidate_index"]))]


def _samples(digest: str, limit: int) -> Select[Any]:
    columns = [rollouts.c[name] for name in (*_COLUMNS, *_MORE_COLUMNS)]
    newest_first = (rollouts.c.created_at.desc(), rollouts.c.request_id, rollouts.c.id)
    return select(*columns).where(rollouts.c.policy == digest).order_by(*newest_first).limit(limit + _MARGIN)


def _sample(row: RowMapping) -> LoggedSample:
    rewards = tuple(RewardValue.model_validate(value) for value in row["rewards"])
    return LoggedSample(row["prompt"], tuple(row["prompt_token_ids"]), row["output_text"], rewards)
