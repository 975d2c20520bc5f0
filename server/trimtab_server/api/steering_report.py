"""How answers and lists say what a steering consists of."""

from collections.abc import Sequence
from typing import Any

from trimtab_adapters.contract.params import AdapterWeight, SteeringOperators
from trimtab_server.decoding.job import GenerationJob

STEERING_HEADER = "x-trimtab-steering"


def steering_object(
    steering: Sequence[AdapterWeight], operators: SteeringOperators, guidance_scale: float | None
) -> dict[str, Any]:
    """Exact versions and weights, and the operators that there are. A negative prompt itself is not told."""
    guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    return {
        "adapters": [weight.model_dump() for weight in steering],
        **operators.model_dump(include=set(SteeringOperators.model_fields), exclude_none=True),
        **guidance,
    }


def steering_of(job: GenerationJob) -> dict[str, Any] | None:
    """What steered an answer; None when nothing was asked for that could."""
    if not job.resolved.steering and job.guidance is None:
        return None
    scale = job.guidance.scale if job.guidance is not None else None
    return steering_object(job.resolved.steering, job.operators, scale)


def steering_header(job: GenerationJob) -> str:
    """The same as items `name@version;alpha=1.0`, `guidance;scale=1.5`, `plausibility;fraction=0.1` and so on."""
    items = [f"{weight.name}@{weight.version};alpha={weight.alpha}" for weight in job.resolved.steering]
    if job.guidance is not None:
        items.append(f"guidance;scale={job.guidance.scale}")
    operators = job.operators
    if (schedule := operators.schedule) is not None:
        first = "" if schedule.first is None else f";first={schedule.first}"
        items.append(f"schedule;start={schedule.start}{first};decay={schedule.decay}")
    if operators.plausibility is not None:
        items.append(f"plausibility;fraction={operators.plausibility}")
    if operators.max_kl is not None:
        items.append(f"max_kl;nats={operators.max_kl}")
    return ", ".join(items)
