"""What must hold of the V1 shell and the steering core after every step of a random schedule."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from schedule_job import Job
from trimtab_adapters.expert import Expert
from trimtab_adapters.kv_pool import BLOCK_SIZE, KvPool
from trimtab_adapters.steering import SteeredRow, StepResult
from trimtab_adapters.vllm.processor_v1 import SteeringProcessor


def open_rows(processor: SteeringProcessor) -> list[SteeredRow]:
    """The rows of all steered requests in the batch."""
    return [occupant.row for occupant in processor._occupants.values()]


def check_accounting(processor: SteeringProcessor, batch: Sequence[Job], committed: Iterable[str]) -> None:
    """Rows, blocks and bytes are counted right.

    Args:
        processor: Between two steps.
        batch: All requests in the batch.
        committed: Versions that are.
    """
    residents, rows = processor.residents, open_rows(processor)
    assert sorted(row.params.uid for row in rows) == sorted(job.uid for job in batch if job.terms)
    assert set(residents.committed) == set(committed)
    held: dict[KvPool, Counter[int]] = {pool: Counter() for pool in residents._pools.values()}
    holders: Counter[Expert] = Counter()
    for row in rows:
        for term in row.terms:
            resident, cache = term.expert, term.cache
            assert resident.pool in held, "a pool was given up while a row used it"
            held[resident.pool].update(cache.blocks)
            holders[resident] += 1
            assert cache.tokens == [*resident.prefix, *row.tokens][: len(cache.tokens)]
            assert len(cache.names) == len(cache.tokens) // BLOCK_SIZE, "exactly the full blocks are named"
            assert len(cache.blocks) == -(-len(cache.tokens) // BLOCK_SIZE)
    for resident in {*residents.committed.values(), *residents._retiring.values(), *holders}:
        assert resident.num_rows == holders[resident]
    assert all(resident.num_rows for resident in residents._retiring.values()), "never swept"
    for pool, blocks in held.items():
        assert pool._references == [blocks[block] for block in range(pool.num_blocks)]
        assert pool.num_used == len(blocks)
        assert sorted([*blocks, *pool._free, *pool._idle]) == list(range(1, pool.num_blocks))
        assert all(pool._names[block] == name for name, block in pool._by_name.items())
    used = sum(pool.num_blocks * pool.geometry.block_bytes for pool in held)
    assert residents.budget.allocated_bytes == used <= residents.budget.total_bytes


def check_membership(
    result: StepResult | None, counted: Mapping[int, Job]
) -> tuple[dict[int, SteeredRow], dict[int, SteeredRow]]:
    """Each row to be steered is steered or failed, and no other row is either. Returns failed and steered by index."""
    if result is None:
        assert not counted, "a row was silently left unsteered"
        return {}, {}
    steered = dict(zip(result.indices.tolist(), result.rows, strict=True))
    failed = {index: row for row, index in result.failed}
    assert sorted([*failed, *steered]) == sorted(counted)
    assert len(failed) + len(steered) == len(result.failed) + len(result.rows)
    for index, row in (*failed.items(), *steered.items()):
        assert row.params.uid == counted[index].uid
    return failed, steered


def check_read_ahead(processor: SteeringProcessor, batch: Sequence[Job]) -> int:
    """Adapter LMs have read no more of a prompt in chunked prefill than the base has. Returns how much they have.

    More would be right too, but it is not what `computed` promises, and it would be paid by this step alone.
    """
    num_tokens = 0
    for index, occupant in processor._occupants.items():
        job = batch[index]
        for term in occupant.row.terms if job.num_chunks else ():
            num_read = len(term.cache.tokens) - len(term.expert.prefix)
            limit = job.num_computed if processor.computed is not None else 0
            assert num_read <= limit, "an adapter LM is ahead of the base"
            num_tokens += max(num_read, 0)
    return num_tokens
