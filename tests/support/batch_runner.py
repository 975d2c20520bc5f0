"""vLLM's V1 runner as a logits processor sees it: requests in rows, and the batch updates that their moves make.

Mirrors `InputBatch.add_request`, `remove_request`, `condense` and `swap_states` of vLLM 0.32.0 over vLLM's own
`BatchUpdateBuilder`. Within a step the runner first removes, then adds, then condenses, then swaps.
"""

from dataclasses import dataclass, field

from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.state import BatchUpdateBuilder


@dataclass(eq=False)
class RunnerRequest:
    """What the runner keeps of a request.

    Attributes:
        sampling_params: With the steering in its extra arguments.
        prompt_token_ids: The whole prompt, however little of it was computed.
        output_token_ids: Live: the runner appends to it, and hands the list itself to processors.
    """

    sampling_params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int] = field(default_factory=list)


class BatchRunner:
    """Rows of the persistent batch; row i of the logits is row i here. Without holes between two steps."""

    def __init__(self) -> None:
        self.rows: list[RunnerRequest | None] = []
        self._builder = BatchUpdateBuilder()

    @property
    def num_rows(self) -> int:
        return sum(request is not None for request in self.rows)

    def remove(self, request: RunnerRequest) -> None:
        """Take a request out: finished, aborted, preempted or not scheduled in this step; the runner says not which."""
        index = self.rows.index(request)
        self.rows[index] = None
        self._builder.removed_append(index)

    def add(self, request: RunnerRequest) -> None:
        """Put a request into the lowest hole, which then no longer counts as removed, or behind the last row."""
        hole = self._builder.pop_removed()
        index = self.num_rows if hole is None else hole
        if index == len(self.rows):
            self.rows.append(None)
        assert self.rows[index] is None
        self.rows[index] = request
        self._builder.added.append((index, request.sampling_params, request.prompt_token_ids, request.output_token_ids))

    def condense(self) -> None:
        """Move the last rows into the holes that are left."""
        holes = self._builder.removed
        last = len(self.rows) - 1
        while holes and self.num_rows:
            while last in holes:
                last -= 1
            hole = self._builder.peek_removed()
            if hole is None or hole >= last:
                break
            self._builder.pop_removed()
            self.rows[hole], self.rows[last] = self.rows[last], None
            self._builder.moved.append((last, hole, MoveDirectionality.UNIDIRECTIONAL))
            last -= 1
        del self.rows[self.num_rows :]

    def swap(self, first: int, second: int) -> None:
        """Exchange two rows, as attention backends do that sort their batch."""
        self.rows[first], self.rows[second] = self.rows[second], self.rows[first]
        self._builder.moved.append((first, second, MoveDirectionality.SWAP))

    def take_update(self) -> BatchUpdate | None:
        """What happened since the last step; None for nothing."""
        return self._builder.get_and_reset(self.num_rows)
