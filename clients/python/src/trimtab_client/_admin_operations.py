"""The admin API's calls, each as an `Operation`; written once for both clients."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from trimtab_client._base import Operation, given, path_of
from trimtab_client._decode import decode, decode_list
from trimtab_client.admin_types import (
    AdapterVersion,
    Engine,
    Reward,
    RewardScores,
    RolloutPage,
    RouteRevision,
    TrainingJob,
)
from trimtab_client.types import AdapterChoice, RewardInput, RolloutFilter, RolloutPageFilter, SteeringOptions


def add_adapter(body: Mapping[str, Any]) -> Operation[AdapterVersion]:
    """`POST /admin/adapters`."""
    return Operation("POST", "/admin/adapters", lambda value: decode(AdapterVersion, value), body)


def list_adapters() -> Operation[list[AdapterVersion]]:
    """`GET /admin/adapters`."""
    return Operation("GET", "/admin/adapters", lambda value: decode_list(AdapterVersion, value))


def get_adapter(name: str) -> Operation[list[AdapterVersion]]:
    """`GET /admin/adapters/{name}`."""
    return Operation("GET", path_of("admin", "adapters", name), lambda value: decode_list(AdapterVersion, value))


def retire_version(name: str, version: str) -> Operation[AdapterVersion]:
    """`POST /admin/adapters/{name}/versions/{version}/retire`."""
    path = path_of("admin", "adapters", name, "versions", version, "retire")
    return Operation("POST", path, lambda value: decode(AdapterVersion, value))


def pin_version(name: str, version: str) -> Operation[AdapterVersion]:
    """`PUT /admin/adapters/{name}/versions/{version}/pin`."""
    path = path_of("admin", "adapters", name, "versions", version, "pin")
    return Operation("PUT", path, lambda value: decode(AdapterVersion, value), {})


def unpin_version(name: str, version: str) -> Operation[None]:
    """`DELETE /admin/adapters/{name}/versions/{version}/pin`."""
    return Operation("DELETE", path_of("admin", "adapters", name, "versions", version, "pin"), lambda value: None)


def list_routes() -> Operation[list[RouteRevision]]:
    """`GET /admin/routes`."""
    return Operation("GET", "/admin/routes", lambda value: decode_list(RouteRevision, value))


def get_route(route: str) -> Operation[RouteRevision]:
    """`GET /admin/routes/{name}`."""
    return Operation("GET", path_of("admin", "routes", route), lambda value: decode(RouteRevision, value))


def put_route(
    route: str,
    steering: Sequence[AdapterChoice],
    *,
    operators: SteeringOptions | None,
    best_of: int | None,
    reward: str | None,
    comment: str,
) -> Operation[RouteRevision]:
    """`PUT /admin/routes/{name}`."""
    steering_body = {"adapters": list(steering), **(operators or {})}
    body = {"steering": steering_body, **given(best_of=best_of, reward=reward, comment=comment or None)}
    return Operation("PUT", path_of("admin", "routes", route), lambda value: decode(RouteRevision, value), body)


def delete_route(route: str) -> Operation[None]:
    """`DELETE /admin/routes/{name}`."""
    return Operation("DELETE", path_of("admin", "routes", route), lambda value: None)


def activate(
    route: str, adapter: str, *, version: str | None, alpha: float | None, comment: str
) -> Operation[RouteRevision]:
    """`POST /admin/routes/{name}/activate`."""
    body = {"adapter": adapter, **given(version=version, alpha=alpha, comment=comment or None)}
    path = path_of("admin", "routes", route, "activate")
    return Operation("POST", path, lambda value: decode(RouteRevision, value), body)


def promote(
    route: str,
    adapter: str,
    *,
    version: str | None,
    alpha: float | None,
    percent: float | None,
    num_answers: int | None,
    min_answers: int | None,
    timeout_s: float | None,
    force: bool,
    comment: str,
) -> Operation[RouteRevision]:
    """`POST /admin/routes/{name}/promote`."""
    rule = given(percent=percent, num_answers=num_answers, min_answers=min_answers, timeout_s=timeout_s)
    body = {"adapter": adapter, **given(version=version, alpha=alpha, comment=comment or None), **rule, "force": force}
    path = path_of("admin", "routes", route, "promote")
    return Operation("POST", path, lambda value: decode(RouteRevision, value), body)


def rollback(route: str, *, revision: int | None) -> Operation[RouteRevision]:
    """`POST /admin/routes/{name}/rollback`."""
    path = path_of("admin", "routes", route, "rollback")
    return Operation("POST", path, lambda value: decode(RouteRevision, value), given(revision=revision))


def route_history(route: str) -> Operation[list[RouteRevision]]:
    """`GET /admin/routes/{name}/history`."""
    path = path_of("admin", "routes", route, "history")
    return Operation("GET", path, lambda value: decode_list(RouteRevision, value))


def list_rollouts(where: RolloutPageFilter) -> Operation[RolloutPage]:
    """`GET /admin/rollouts`."""
    return Operation("GET", "/admin/rollouts", lambda value: decode(RolloutPage, value), query=where)


def export_rollouts(where: RolloutFilter, *, format: Literal["jsonl", "parquet"]) -> Operation[None]:
    """`GET /admin/rollouts/export`; the body is the file."""
    return Operation("GET", "/admin/rollouts/export", lambda value: None, query={"format": format, **where})


def create_training_job(config: Mapping[str, Any], *, name: str) -> Operation[TrainingJob]:
    """`POST /admin/training-jobs`."""
    body = {"config": dict(config), "name": name}
    return Operation("POST", "/admin/training-jobs", lambda value: decode(TrainingJob, value), body)


def list_training_jobs(state: str | None) -> Operation[list[TrainingJob]]:
    """`GET /admin/training-jobs`."""
    query = given(state=state)
    return Operation("GET", "/admin/training-jobs", lambda value: decode_list(TrainingJob, value), query=query)


def get_training_job(job: str) -> Operation[TrainingJob]:
    """`GET /admin/training-jobs/{id}`."""
    return Operation("GET", path_of("admin", "training-jobs", job), lambda value: decode(TrainingJob, value))


def cancel_training_job(job: str) -> Operation[TrainingJob]:
    """`POST /admin/training-jobs/{id}/cancel`."""
    path = path_of("admin", "training-jobs", job, "cancel")
    return Operation("POST", path, lambda value: decode(TrainingJob, value))


def list_rewards() -> Operation[list[Reward]]:
    """`GET /admin/rewards`."""
    return Operation("GET", "/admin/rewards", lambda value: decode_list(Reward, value))


def put_reward(name: str, *, kind: str, target: str, options: Mapping[str, Any] | None) -> Operation[Reward]:
    """`POST /admin/rewards`."""
    body = {"name": name, "kind": kind, "target": target, "options": dict(options or {})}
    return Operation("POST", "/admin/rewards", lambda value: decode(Reward, value), body)


def get_reward(name: str) -> Operation[Reward]:
    """`GET /admin/rewards/{name}`."""
    return Operation("GET", path_of("admin", "rewards", name), lambda value: decode(Reward, value))


def delete_reward(name: str) -> Operation[None]:
    """`DELETE /admin/rewards/{name}`."""
    return Operation("DELETE", path_of("admin", "rewards", name), lambda value: None)


def score(name: str, inputs: Iterable[RewardInput]) -> Operation[RewardScores]:
    """`POST /admin/rewards/{name}/score`."""
    path = path_of("admin", "rewards", name, "score")
    return Operation("POST", path, lambda value: decode(RewardScores, value), {"inputs": list(inputs)})


def list_engines() -> Operation[list[Engine]]:
    """`GET /admin/engines`."""
    return Operation("GET", "/admin/engines", lambda value: decode_list(Engine, value))
