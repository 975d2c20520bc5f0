"""The admin API's resources of the asyncio client; signatures as in `_admin`."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Unpack

import httpx

from trimtab_client import _admin_operations as operations
from trimtab_client._base import connection_error, given
from trimtab_client._caller import AsyncCaller
from trimtab_client._download import Download
from trimtab_client.admin_types import (
    AdapterVersion,
    Engine,
    JobState,
    Reward,
    RewardScores,
    RolloutPage,
    RouteRevision,
    TrainingJob,
)
from trimtab_client.types import AdapterChoice, RewardInput, RolloutFilter, RolloutPageFilter, SteeringOptions


class AsyncAdapters:
    """`/admin/adapters`: immutable versions of adapter LMs."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    async def add(
        self,
        *,
        name: str,
        path: str,
        trunk: str | None = None,
        prefix_token_ids: Sequence[int] | None = None,
        default_alpha: float | None = None,
        route: str | None = None,
        alpha: float | None = None,
    ) -> AdapterVersion:
        """Register a directory that the gateway can read.

        Args:
            name: Name of the adapter.
            path: A version directory, or any causal-LM directory with safetensors weights. With `trunk`, a LoRA as PEFT
                saves it.
            trunk: Directory of the LM that the LoRA was trained on.
            prefix_token_ids: What the adapter sees before prompt and output.
            default_alpha: Weight where a request names none.
            route: Also activate it on this route.
            alpha: Its weight there.
        """
        ids = None if prefix_token_ids is None else list(prefix_token_ids)
        optional = given(trunk=trunk, prefix_token_ids=ids, default_alpha=default_alpha, route=route, alpha=alpha)
        return await self._caller.send(operations.add_adapter({"name": name, "path": path, **optional}))

    async def get(self, name: str) -> list[AdapterVersion]:
        """All versions of one adapter."""
        return await self._caller.send(operations.get_adapter(name))

    async def activate(
        self, *, route: str, adapter: str, version: str | None = None, alpha: float | None = None, comment: str = ""
    ) -> RouteRevision:
        """Put an adapter version, by default the newest, on a route. Requests in flight keep their version."""
        return await self._caller.send(
            operations.activate(route, adapter, version=version, alpha=alpha, comment=comment)
        )

    async def promote(
        self,
        *,
        route: str,
        adapter: str,
        version: str | None = None,
        alpha: float | None = None,
        percent: float | None = None,
        num_answers: int | None = None,
        min_answers: int | None = None,
        timeout_s: float | None = None,
        force: bool = False,
        comment: str = "",
    ) -> RouteRevision:
        """Let a share of a route's requests try a version; the gateway promotes it, or rolls it back if it is worse.

        Args:
            route: Must exist.
            adapter: Its name.
            version: By default the newest.
            alpha: By default the version's own.
            percent: Of the route's requests.
            num_answers: Requests of that share after which the version takes the whole route.
            min_answers: With fewer when the time is up it is rolled back.
            timeout_s: Time after which the trial ends.
            force: Also a version that has not passed the gate of its training.
            comment: Kept in the history.
        """
        operation = operations.promote(
            route,
            adapter,
            version=version,
            alpha=alpha,
            percent=percent,
            num_answers=num_answers,
            min_answers=min_answers,
            timeout_s=timeout_s,
            force=force,
            comment=comment,
        )
        return await self._caller.send(operation)

    async def rollback(self, *, route: str, revision: int | None = None) -> RouteRevision:
        """Take a route back to its previous revision, or to the one named."""
        return await self._caller.send(operations.rollback(route, revision=revision))

    async def pin(self, *, name: str, version: str) -> AdapterVersion:
        """Keep a version in the engine's memory, whether it is used or not."""
        return await self._caller.send(operations.pin_version(name, version))

    async def unpin(self, *, name: str, version: str) -> None:
        """Let the engine give a version's memory to others while no route uses it."""
        await self._caller.send(operations.unpin_version(name, version))

    async def retire(self, *, name: str, version: str) -> AdapterVersion:
        """Refuse new requests for a version and free its memory when its last request ends."""
        return await self._caller.send(operations.retire_version(name, version))

    async def list(self) -> list[AdapterVersion]:
        """All versions of all adapters."""
        return await self._caller.send(operations.list_adapters())


class AsyncRoutes:
    """`/admin/routes`: public model names with their steering and defaults."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    async def get(self, route: str) -> RouteRevision:
        """The current revision of one route."""
        return await self._caller.send(operations.get_route(route))

    async def put(
        self,
        route: str,
        *,
        adapters: Sequence[AdapterChoice],
        operators: SteeringOptions | None = None,
        best_of: int | None = None,
        reward: str | None = None,
        comment: str = "",
    ) -> RouteRevision:
        """Make a route, or give it a new revision. Without any steering it is the base under another name."""
        return await self._caller.send(
            operations.put_route(route, adapters, operators=operators, best_of=best_of, reward=reward, comment=comment)
        )

    async def delete(self, route: str) -> None:
        """Remove a route; its history stays."""
        await self._caller.send(operations.delete_route(route))

    async def history(self, route: str) -> list[RouteRevision]:
        """All revisions of a route."""
        return await self._caller.send(operations.route_history(route))

    async def list(self) -> list[RouteRevision]:
        """The current revision of each route."""
        return await self._caller.send(operations.list_routes())


class AsyncRollouts:
    """`/admin/rollouts`: the log of all candidates."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    async def list(self, **where: Unpack[RolloutPageFilter]) -> RolloutPage:
        """One page of logged candidates, oldest first."""
        return await self._caller.send(operations.list_rollouts(where))

    async def export(
        self,
        destination: str | PathLike[str],
        *,
        format: Literal["jsonl", "parquet"] = "jsonl",
        **where: Unpack[RolloutFilter],
    ) -> int:
        """Write logged candidates to a file and return its size in bytes.

        The file appears under its name only when it is complete.
        """
        response = await self._caller.open(operations.export_rollouts(where, format=format))
        try:
            with Download(destination) as download:
                async for chunk in response.aiter_bytes():
                    download.write(chunk)
        except httpx.HTTPError as exc:
            raise connection_error(exc) from exc
        finally:
            await response.aclose()
        return download.size_bytes


class AsyncTrainingJobs:
    """`/admin/training-jobs`: what the trainer is asked to do."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    async def create(self, config: Mapping[str, Any], *, name: str = "") -> TrainingJob:
        """Queue a job with this training configuration; the name is for people."""
        return await self._caller.send(operations.create_training_job(config, name=name))

    async def list(self, state: JobState | None = None) -> list[TrainingJob]:
        """All jobs, or those in one state."""
        return await self._caller.send(operations.list_training_jobs(state))

    async def get(self, job: str) -> TrainingJob:
        """One job with its progress."""
        return await self._caller.send(operations.get_training_job(job))

    async def cancel(self, job: str) -> TrainingJob:
        """Ask a job to stop."""
        return await self._caller.send(operations.cancel_training_job(job))


class AsyncRewards:
    """`/admin/rewards`: what candidates are judged by."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    async def list(self) -> list[Reward]:
        """All registered rewards."""
        return await self._caller.send(operations.list_rewards())

    async def add(self, *, name: str, kind: str, target: str = "", options: Mapping[str, Any] | None = None) -> Reward:
        """Register a reward, or replace the one of that name."""
        return await self._caller.send(operations.put_reward(name, kind=kind, target=target, options=options))

    async def get(self, name: str) -> Reward:
        """One reward with its version, and the state of its circuit breaker and cache."""
        return await self._caller.send(operations.get_reward(name))

    async def delete(self, name: str) -> None:
        """Take a registered reward away; refused while a route or a composite names it."""
        await self._caller.send(operations.delete_reward(name))

    async def score(self, name: str, inputs: Sequence[RewardInput]) -> RewardScores:
        """Judge texts."""
        return await self._caller.send(operations.score(name, inputs))


class AsyncEngines:
    """`/admin/engines`."""

    def __init__(self, caller: AsyncCaller) -> None:
        self._caller = caller

    async def list(self) -> list[Engine]:
        """What each engine says of itself."""
        return await self._caller.send(operations.list_engines())


class AsyncAdmin:
    """Everything under `/admin`."""

    def __init__(self, caller: AsyncCaller) -> None:
        self.adapters = AsyncAdapters(caller)
        self.routes = AsyncRoutes(caller)
        self.rollouts = AsyncRollouts(caller)
        self.training_jobs = AsyncTrainingJobs(caller)
        self.rewards = AsyncRewards(caller)
        self.engines = AsyncEngines(caller)
