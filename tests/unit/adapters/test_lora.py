"""LoRAs on a shared LM against transformers' own model with the LoRA merged into its weights."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_directories import ATTENTION, MLP, merged, write_lora, write_model
from steering_reference import VOCAB_SIZE, Reference, base_description, live_bytes, load, params, wait
from tiny_models import TinyModels
from trimtab_adapters import residents as residents_module
from trimtab_adapters.adapter_lm import AdapterLM, UncheckedAdapterLM, read_adapter_lm
from trimtab_adapters.contract.manifest import Manifest
from trimtab_adapters.dense_ops import TorchOps
from trimtab_adapters.kv_pool import PoolExhaustedError
from trimtab_adapters.lora_layers import LoraLayers, LoraStacks
from trimtab_adapters.lora_lm import LoraLM
from trimtab_adapters.residents import Residents
from trimtab_adapters.steering import SteeredRow, SteeringCore
from trimtab_adapters.store import VersionStore

CPU = torch.device("cpu")
TOLERANCE = 1e-4
"""Sums of float32 in another order differ by a few 1e-6; a wrong row's LoRA by tenths of a nat."""
LONG = [1 + index % 90 for index in range(70)]


class World:
    """Versions in a store, engines that load them, and the reference for each."""

    def __init__(self, root: Path, residents: Residents) -> None:
        self.root, self.residents = root, residents
        self.store = VersionStore(root / "store")
        self.reference = Reference()

    def add(self, name: str, trunk: Path, *, scalings: dict[str, float] | None = None, **options: Any) -> str:
        """Make a LoRA, store it and load it; returns its version."""
        directory = write_lora(self.root / name, trunk, seed=len(self.reference.models), **options)
        manifest, path = self.store.add(directory, name=name, trunk=trunk)
        version = load(self.residents, path)
        assert version == manifest.version_id
        self.reference.models[version] = merged(trunk, directory, scalings)
        self.reference.prefixes[version] = []
        return version

    def add_whole(self, directory: Path) -> str:
        version = load(self.residents, directory)
        self.reference.add(version, directory)
        return version

    def core(self, max_forward_tokens: int = 64) -> SteeringCore:
        return SteeringCore(self.residents.committed, vocab_size=VOCAB_SIZE, max_forward_tokens=max_forward_tokens)

    def check(self, core: SteeringCore, rows: Sequence[SteeredRow], seed: int = 0) -> None:
        """One step; each row must be right, and goes on with its likeliest token."""
        base = torch.randn(len(rows), VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3
        logits = base.clone()
        result = core.step([(row, index) for index, row in enumerate(rows)], logits)
        assert result is not None
        assert not result.failed, [row.error for row, _ in result.failed]
        for index, row in enumerate(rows):
            want = base[index].clone()
            for weight in row.params.active:
                want += weight.alpha * self.reference.logprobs(str(weight.version), row.tokens)
            assert float((logits[index] - want).abs().max()) < TOLERANCE, index
            row.append([int(logits[index].argmax())])


@pytest.fixture
def world(tmp_path: Path, residents: Residents) -> World:
    return World(tmp_path, residents)


@pytest.fixture
def trunk(tmp_path: Path) -> Path:
    return write_model(tmp_path / "trunk", "Llama", seed=5)


def lora_of(world: World, version: str) -> LoraLM:
    adapter = world.residents.committed[version].adapter
    assert isinstance(adapter, LoraLM)
    return adapter


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows of each forward pass."""
    seen: list[int] = []
    plain = AdapterLM.forward

    def forward(self: AdapterLM, batch: Any, *options: Any) -> Tensor:
        seen.append(len(batch.num_new))
        return plain(self, batch, *options)

    monkeypatch.setattr(AdapterLM, "forward", forward)
    return seen


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Mistral", {"sliding_window": 8}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 32}),
    ],
)
def test_each_family_equals_its_merged_weights(
    world: World, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    directory = write_model(tmp_path / family, family, seed=1, **options)
    everything = world.add("everything", directory)
    some = world.add("some", directory, targets=("q_proj", "v_proj", "down_proj"), r=7)
    core = world.core()
    prompts = [[1], [2, 3, 4], LONG[:33], LONG, LONG[5:45]]
    rows = [core.open(params(f"u{i}", ([everything, some][i % 2], 1.0)), p, []) for i, p in enumerate(prompts)]
    for step in range(3):
        world.check(core, rows, step)


def test_rows_of_many_loras_of_two_trunks_and_of_whole_models_share_a_batch(
    world: World, trunk: Path, tmp_path: Path, tiny_models: TinyModels, passes: list[int]
) -> None:
    second = write_model(tmp_path / "second", "Qwen2", seed=6)
    whole = world.add_whole(tiny_models.adapter)
    loras = [world.add(f"lora-{n}", trunk, r=1 + n, targets=[ATTENTION, MLP, ("v_proj",)][n % 3]) for n in range(5)]
    others = [world.add(f"other-{n}", second) for n in range(2)]
    core = world.core()
    terms: list[list[tuple[str, float]]] = [[(lora, 1.0)] for lora in loras]
    terms += [[(whole, 0.5)], [(others[0], -1.0)], [(others[1], 1.0), (loras[0], 0.5)]]
    terms += [[(loras[1], 1.0), (loras[2], -0.5)], [(loras[0], 2.0), (whole, 1.0), (others[0], 0.5)], [(loras[0], 1.0)]]
    lengths = [1, 2, 40, 17, 64, 5, 33, 100, 16, 3, 1]
    rows = [
        core.open(params(f"u{i}", *term), [1 + (7 * i + k) % 120 for k in range(length)], [])
        for i, (term, length) in enumerate(zip(terms, lengths, strict=True))
    ]
    core.prefill([(rows[7], 60), (rows[4], 40), (rows[2], 30)])
    world.check(core, rows)
    for step in range(1, 4):
        passes.clear()
        world.check(core, rows, step)
        # The terms above: two of the whole model, three of LoRAs on the second trunk, ten of those on the first.
        assert sorted(passes) == [2, 3, 10], "one pass for each LM, whichever LoRAs its rows use"
    rows.append(core.open(params("late", (loras[4], 1.0)), LONG, []))
    core.close(rows.pop(0))
    world.check(core, rows, 9)


def test_rank_and_alpha_patterns_and_rank_stabilised_scaling(world: World, trunk: Path) -> None:
    q = "model.layers.0.self_attn.q_proj"
    scalings = {q: 3 / 2} | {f"model.layers.{n}.self_attn.v_proj": 8 / math.sqrt(4) for n in range(2)}
    patterned = world.add(
        "patterned",
        trunk,
        targets=("q_proj",),
        ranks={q: 2},
        rank_pattern={"layers.0.self_attn.q_proj": 2},
        alpha_pattern={f"^{q}": 3},
        scalings=scalings,
    )
    stabilised = world.add("stabilised", trunk, targets=("v_proj",), use_rslora=True, scalings=scalings)
    core = world.core()
    world.check(core, [core.open(params(v, (v, 1.0)), [5, 6, 7], []) for v in (patterned, stabilised)])


def test_a_prefix_belongs_to_the_lora_and_not_to_its_trunk(world: World, trunk: Path) -> None:
    plain = world.add("plain", trunk)
    _, path = world.store.add(world.root / "plain", name="prefixed", trunk=trunk, prefix_token_ids=[9, 8, 7])
    prefixed = load(world.residents, path)
    world.reference.models[prefixed] = world.reference.models[plain]
    world.reference.prefixes[prefixed] = [9, 8, 7]
    core = world.core()
    rows = [core.open(params(f"u{n}", (v, 1.0)), LONG[:20], []) for n, v in enumerate((plain, prefixed, plain))]
    for step in range(2):
        world.check(core, rows, step)


def test_a_full_pool_takes_from_rows_of_other_loras_and_stays_right(
    trunk: Path, tmp_path: Path, tiny_models: TinyModels
) -> None:
    block_bytes = 2 * 2 * 16 * 2 * 16 * 4
    small = Residents(base_description(tiny_models.base), CPU, kv_bytes=20 * block_bytes, dtype=torch.float32)
    world = World(tmp_path, small)
    versions = [world.add(f"lora-{n}", trunk) for n in range(3)]
    core = world.core()
    rows = [core.open(params(f"u{n}", (versions[n % 3], 1.0)), LONG[n:], []) for n in range(6)]
    for step in range(3):
        world.check(core, rows, step)
    assert world.residents.cache_status().recomputed_tokens > 0, "the pool was large enough after all"


# Memory


def test_the_trunk_is_in_memory_once_and_leaves_with_its_last_lora(
    world: World, trunk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = live_bytes()
    first = world.add("first", trunk)
    trunk_lm = lora_of(world, first).trunk
    monkeypatch.setattr("trimtab_adapters.adapter_lm.AutoModelForCausalLM", None)  # nobody may read the trunk again
    others = [world.add(f"lora-{n}", trunk, targets=("q_proj",)) for n in range(3)]
    world.reference.models.clear()
    assert {id(lora_of(world, version).trunk) for version in others} == {id(trunk_lm)}
    own = 2 * 4 * (64 + 64) * 4
    assert [world.residents.poll(version).weight_bytes for version in others] == [own] * 3
    # Seven layers of rank 4 with these (in, out), twice.
    widths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
    first_bytes = 2 * 4 * 4 * sum(sum(pair) for pair in widths)
    assert world.residents.poll(first).weight_bytes == first_bytes
    assert world.residents.weight_status().used_bytes == trunk_lm.weight_bytes + first_bytes + 3 * own
    assert live_bytes() - before < 1.5 * trunk_lm.weight_bytes + world.residents.budget.allocated_bytes
    core = world.core()
    row = core.open(params("u", (others[2], 1.0)), [1, 2], [])
    assert core.step([(row, 0)], torch.zeros(1, VOCAB_SIZE)) is not None
    assert world.residents.weight_status().used_bytes == trunk_lm.weight_bytes + first_bytes + 4 * own, "with its stack"
    for version in (first, *others):
        world.residents.retire(version)
    assert world.residents.weight_status().used_bytes == trunk_lm.weight_bytes + 2 * own, "its last row still holds it"
    core.close(row)
    world.residents.sweep()
    assert world.residents.weight_status().used_bytes == 0
    assert world.residents.budget.allocated_bytes == 0
    del core, row
    assert live_bytes() - before < trunk_lm.weight_bytes / 4, "given back even while somebody holds the trunk's object"


def test_a_lora_that_leaves_takes_its_copies_with_it(world: World, trunk: Path) -> None:
    versions = [world.add(f"lora-{n}", trunk) for n in range(3)]
    model, own = lora_of(world, versions[0]).trunk.weight_bytes, world.residents.poll(versions[0]).weight_bytes
    core = world.core()
    rows = [core.open(params(version, (version, 1.0)), [1, 2, 3], []) for version in versions]
    world.check(core, rows)
    assert world.residents.weight_status().used_bytes == model + 3 * own + 3 * own
    core.close(rows.pop(1))
    world.residents.retire(versions[1])
    assert world.residents.weight_status().used_bytes == model + 2 * own
    world.check(core, rows, 1)
    assert world.residents.weight_status().used_bytes == model + 2 * own + 2 * own


def test_loras_that_are_loaded_at_the_same_time_read_their_trunk_once(
    world: World, trunk: Path, monkeypatch: pytest.MonkeyPatch, tiny_models: TinyModels
) -> None:
    loads: list[Any] = []
    gate = threading.Event()
    plain = read_adapter_lm

    def slow(directory: Path, *args: Any, **options: Any) -> UncheckedAdapterLM:
        loads.append(directory)
        assert gate.wait(20)
        return plain(directory, *args, **options)

    monkeypatch.setattr(residents_module, "read_adapter_lm", slow)
    residents = Residents(base_description(tiny_models.base), CPU, kv_bytes=1 << 24, dtype=torch.float32)
    paths: dict[str, Path] = {}
    for n in range(4):
        manifest, path = world.store.add(write_lora(world.root / f"l{n}", trunk, seed=n), name=f"l{n}", trunk=trunk)
        paths[manifest.version_id] = path
    for version, path in paths.items():
        residents.prepare(version, str(path))
    gate.set()
    assert [wait(residents, version).state for version in paths] == ["prepared"] * 4
    assert len(loads) == 1
    for version in paths:
        residents.retire(version)
    assert residents.weight_status().used_bytes == 0


def test_a_budget_counts_a_trunk_once_and_says_what_a_lora_needs_with_its_own(
    trunk: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    whole = (trunk / "model.safetensors").stat().st_size
    residents = Residents(
        base_description(tiny_models.base), CPU, kv_bytes=1 << 24, weight_bytes=int(1.9 * whole), dtype=torch.float32
    )
    world = World(tmp_path, residents)
    for number in range(4):  # as whole models they would need more than four times the room
        world.add(f"lora-{number}", trunk, r=1)
    second = write_model(tmp_path / "second", "Llama", seed=9)
    manifest, path = world.store.add(write_lora(tmp_path / "l9", second, seed=9, r=1), name="l9", trunk=second)
    residents.prepare(manifest.version_id, str(path))
    status = wait(residents, manifest.version_id)
    assert (status.state, status.error_code) == ("failed", "adapter_memory_full")
    assert status.weight_bytes > 0.9 * whole, "who makes room must know of its trunk"
    used = residents.weight_status().used_bytes
    world.add("one-more", trunk, r=1)
    assert 0 < residents.weight_status().used_bytes - used < 0.1 * whole


def test_a_lora_that_is_refused_does_not_keep_its_trunk(world: World, trunk: Path) -> None:
    bad = write_lora(world.root / "bad", trunk, seed=1, size=1e25)
    manifest, path = world.store.add(bad, name="bad", trunk=trunk)
    world.residents.prepare(manifest.version_id, str(path))
    status = wait(world.residents, manifest.version_id)
    assert (status.state, status.error_code) == ("failed", "invalid_weights")
    assert "NaN or infinite logits" in str(status.error)
    assert world.residents.weight_status().used_bytes == 0


def test_a_family_outside_our_layers_is_merged_into_a_model_of_its_own(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gemma = write_model(tmp_path / "gemma", "Gemma", seed=3, head_dim=16)
    version = world.add("merged", gemma)
    assert "not shared" in caplog.text
    assert world.residents.poll(version).weight_bytes > sum(
        p.numel() for p in world.reference.models[version].parameters()
    )
    core = world.core()
    world.check(core, [core.open(params("u", (version, 1.0)), LONG, [])])


def test_the_stack_grows_at_once_and_shrinks_when_little_of_it_was_used_for_long() -> None:
    loras = [LoraLayers({}) for _ in range(6)]
    stacks = LoraStacks(TorchOps(), CPU)
    assert stacks.stack_for(loras[:2]).loras == (loras[0], loras[1])
    assert stacks.stack_for(loras[1:]).loras == (*loras[:2], *loras[2:])
    built = stacks.stack_for(loras[:1])
    for _ in range(62):
        assert stacks.stack_for(loras[:1]) is built
    shrunk = stacks.stack_for(loras[:1])
    assert shrunk.loras == (loras[0],)
    stacks.discard(loras[3])
    assert stacks.stack_for(loras[:1]) is shrunk
    stacks.discard(loras[0])
    assert stacks.weight_bytes == 0


# Faults


@pytest.fixture
def trio(world: World, trunk: Path) -> list[str]:
    return [world.add(f"lora-{n}", trunk) for n in range(3)]


@pytest.fixture
def rows(world: World, trio: list[str]) -> Iterator[tuple[SteeringCore, list[SteeredRow]]]:
    """Two rows of each of three LoRAs, after one step that went well."""
    core = world.core()
    opened = [core.open(params(f"u{n}", (trio[n % 3], 1.0)), LONG[n : n + 20 + n], []) for n in range(6)]
    world.check(core, opened)
    yield core, opened
    for row in opened:
        core.close(row)
    assert world.residents.cache_status().used_blocks == 0


def break_up(lora: LoraLM) -> None:
    """NaN in its B's."""
    for group in lora.layers.parts.values():
        for part in group:
            part.up.fill_(math.nan)
    lora.stacks.discard(lora.layers)


def break_down(lora: LoraLM) -> None:
    """Infinity in its A's, so that what it makes of any row is infinite or NaN."""
    for group in lora.layers.parts.values():
        for part in group:
            part.down.fill_(math.inf)
    lora.stacks.discard(lora.layers)


def break_shape(lora: LoraLM) -> None:
    """Matrices that do not fit, so that every pass with it raises."""
    for site, group in lora.layers.parts.items():
        lora.layers.parts[site] = [type(part)(part.begin, part.end, part.down[:, :-1], part.up) for part in group]
    lora.stacks.discard(lora.layers)


@pytest.mark.parametrize(("fault", "reason"), [(break_up, "NaN"), (break_down, "NaN"), (break_shape, "RuntimeError")])
def test_a_broken_lora_fails_its_own_rows_alone(
    world: World,
    trio: list[str],
    rows: tuple[SteeringCore, list[SteeredRow]],
    fault: Callable[[LoraLM], None],
    reason: str,
) -> None:
    core, opened = rows
    fault(lora_of(world, trio[1]))
    long = core.open(params("long", (trio[1], 1.0)), LONG[3:], [])
    fine = core.open(params("fine", (trio[0], 1.0)), LONG[9:], [])
    core.prefill([(long, 50), (fine, 50)])
    everyone = [*opened, long, fine]
    result = core.step([(row, n) for n, row in enumerate(everyone)], torch.zeros(len(everyone), VOCAB_SIZE))
    assert result is not None
    assert [row for row, _ in result.failed] == [opened[1], opened[4], long]
    for row, _ in result.failed:
        assert trio[1] in str(row.error)
        assert reason in str(row.error)
    going_on = [row for row in everyone if row.error is None]
    for step in range(1, 3):
        world.check(core, going_on, step)
    core.close(long)
    core.close(fine)


def test_infinities_that_a_lora_makes_of_other_rows_do_not_reach_them(
    world: World, trio: list[str], rows: tuple[SteeringCore, list[SteeredRow]], passes: list[int]
) -> None:
    core, opened = rows
    break_down(lora_of(world, trio[1]))
    passes.clear()
    result = core.step([(row, n) for n, row in enumerate(opened)], torch.zeros(6, VOCAB_SIZE))
    assert result is not None
    assert [row for row, _ in result.failed] == [opened[1], opened[4]]
    assert passes == [6], "nothing had to be computed again"


def test_a_row_that_fits_no_pool_fails_alone_among_other_loras(
    world: World, trio: list[str], rows: tuple[SteeringCore, list[SteeredRow]], monkeypatch: pytest.MonkeyPatch
) -> None:
    core, opened = rows
    pool = world.residents.committed[trio[0]].pool
    plain = pool.extend

    def extend(sequence: Any, token_ids: Sequence[int]) -> None:
        if sequence is opened[2].terms[0].cache:
            raise PoolExhaustedError("no room")
        plain(sequence, token_ids)

    monkeypatch.setattr(pool, "extend", extend)
    result = core.step([(row, n) for n, row in enumerate(opened)], torch.zeros(6, VOCAB_SIZE))
    assert result is not None
    assert [row for row, _ in result.failed] == [opened[2]]
    assert "KV cache" in str(opened[2].error)
    monkeypatch.undo()
    world.check(core, [row for row in opened if row.error is None], 1)


def test_the_time_of_a_shared_pass_is_divided_by_rows(
    world: World, trio: list[str], rows: tuple[SteeringCore, list[SteeredRow]]
) -> None:
    core, opened = rows
    before = [world.residents.poll(version).activity for version in trio]
    world.check(core, [opened[0], opened[3], opened[1]], 1)
    after = [world.residents.poll(version).activity for version in trio]
    assert [b.steps - a.steps for a, b in zip(before, after, strict=True)] == [1, 1, 0]
    assert [b.rows - a.rows for a, b in zip(before, after, strict=True)] == [2, 1, 0]
    seconds = [b.step_seconds - a.step_seconds for a, b in zip(before, after, strict=True)]
    assert seconds[0] == pytest.approx(2 * seconds[1])
    assert seconds[2] == 0


def test_the_manifest_says_which_versions_share_a_trunk(world: World, trunk: Path, tmp_path: Path) -> None:
    manifests: list[Manifest] = []
    for n, directory in enumerate((trunk, trunk, write_model(tmp_path / "second", "Llama", seed=8))):
        manifests.append(
            world.store.add(write_lora(tmp_path / f"l{n}", directory, seed=n), name=f"l{n}", trunk=directory)[0]
        )
    keys = [manifest.lora.trunk_sha256 for manifest in manifests if manifest.lora is not None]
    assert len(keys) == 3
    assert keys[0] == keys[1] != keys[2]
