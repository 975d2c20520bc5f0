"""A seeded request in chunked prefill must not kill an engine on CPU.

vLLM 0.32.0 throws a sample of partial prefill away and then winds the request's generator back by
`generator.set_offset(generator.get_offset() - 4)` (`v1/worker/gpu_model_runner.py`, `_bookkeeping_sync`). Offsets
exist on CUDA only: on CPU the call raises, and an exception there ends the engine for good. So on CPU each request's
generator is replaced by one whose offset calls do nothing, and the recording sampler winds the thrown-away rows back.

Remove when vLLM does this on CPU.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from typing_extensions import override


class RewindableGenerator(torch.Generator):
    """A CPU generator that survives vLLM's offset arithmetic. It starts in the state of the one that it replaces."""

    @classmethod
    def replacing(cls, generator: torch.Generator) -> "RewindableGenerator":
        """A generator that goes on where another one stands."""
        made = cls()
        made.set_state(generator.get_state())
        return made

    @override
    def get_offset(self) -> int:
        """Nothing to read on CPU."""
        return 0

    @override
    def set_offset(self, offset: int) -> torch.Generator:
        """Nothing to do: `rewound` has put the state back already."""
        return self


def replace_generators(runner: Any) -> None:
    """Give every seeded request in the runner's batch a rewindable generator, once."""
    batch = runner.input_batch
    for index, generator in batch.generators.items():
        if not isinstance(generator, RewindableGenerator):
            made = RewindableGenerator.replacing(generator)
            batch.generators[index] = made
            runner.requests[batch.req_ids[index]].generator = made  # kept there over a preemption


@contextmanager
def rewound(
    generators: Mapping[int, torch.Generator], discarded: "np.ndarray[Any, np.dtype[np.bool_]]"
) -> Iterator[None]:
    """Put the generators of rows whose sample is thrown away back to where they stood before."""
    saved = [
        (generator, generator.get_state())
        for index, generator in generators.items()
        if isinstance(generator, RewindableGenerator) and discarded[index]
    ]
    yield
    for generator, state in saved:
        generator.set_state(state)
