"""Writes into each rollout which base model it came from."""

from collections.abc import Callable, Sequence

from trimtab_adapters.contract.records import Rollout
from trimtab_adapters.contract.reference_policy import IDENTITY
from trimtab_server.storage.base import RolloutLog


class IdentifiedRolloutLog:
    """A `RolloutLog` before another one.

    The public name of a base may be given to another model some day. Samples in the log are only taken for those of a
    base whose identity they carry.

    Args:
        log: Where rollouts go.
        base_identity: What the engine tells of the base, None where it has not yet.
    """

    def __init__(self, log: RolloutLog, base_identity: Callable[[], str | None]) -> None:
        self._log = log
        self._base_identity = base_identity

    async def append(self, rollouts: Sequence[Rollout]) -> None:
        """Raises `StorageError`; nothing is lost silently."""
        identity = self._base_identity()
        if identity is not None:
            rollouts = [
                rollout.model_copy(update={"metadata": {**rollout.metadata, IDENTITY: identity}})
                for rollout in rollouts
            ]
        await self._log.append(rollouts)
