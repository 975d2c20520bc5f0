import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab_adapters.contract.errors import ConflictError, IntegrityError
from trimtab_training.checkpoint import RunState, latest_checkpoint, open_checkpoint, save_checkpoint
from trimtab_training.config import TrainConfig
from trimtab_training.learner import Learner
from trimtab_training.models import Vocabulary
from trimtab_training.objectives.objective import ScoredRollout
from trimtab_training.wiring import build_learner, checkpoints_of, find_checkpoint

STATE = RunState(next_round=2, reward_version="9", parent=None, control_token_ids=(64, 65, 66, 67, 68), fixed_prefix=())


def items(seed: int) -> list[ScoredRollout]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, (30, 8), generator=generator).tolist()
    return [
        ScoredRollout(tuple(row[: 1 + i % 4]), tuple(row[4 : 5 + i % 4]), float(row[0]), group=i)
        for i, row in enumerate(ids)
    ]


def save(config: TrainConfig, learner: Learner, vocabulary: Vocabulary, keep: int = 2) -> Path:
    return save_checkpoint(checkpoints_of(config), learner, STATE, config=config, vocabulary=vocabulary, keep=keep)


@pytest.mark.parametrize("adapter", ["adapter", "untied", "gpt2"])
def test_a_resumed_run_goes_on_bit_for_bit(
    make_config: Any, vocabulary: Vocabulary, model_dirs: dict[str, Path], adapter: str
) -> None:
    """10 steps straight against 5, a checkpoint, a fresh process' worth of objects, and 5 more. GPT-2 has dropout, so
    torch's random state counts as well; the pool grows in between, so bins, order and shuffling do."""
    config = make_config(
        models={"adapter": str(model_dirs[adapter])}, optimiser={"max_grad_norm": 0.5, "grad_accumulation": 2}
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        straight, _ = build_learner(config, vocabulary, None)
        straight.add_rollouts(items(0))
        metrics = [straight.train_step() for _ in range(5)]
        save(config, straight, vocabulary)
        straight.add_rollouts(items(1))
        metrics += [straight.train_step() for _ in range(5)]

        torch.manual_seed(99)  # whatever the new process' state is
        resumed, _ = build_learner(config, vocabulary, find_checkpoint(config, resume=True))
        assert resumed.step == 5
        resumed.add_rollouts(items(1))
        assert [resumed.train_step() for _ in range(5)] == metrics[5:]
    pairs = zip(straight.policy.adapter.state_dict().items(), resumed.policy.adapter.state_dict().items(), strict=True)
    for (name, tensor), (other_name, other) in pairs:
        assert name == other_name
        assert torch.equal(tensor, other), name
    assert resumed.objective.prefix == straight.objective.prefix == (64,)


def test_only_the_newest_are_kept_and_the_newest_is_found(make_config: Any, vocabulary: Vocabulary) -> None:
    config = make_config()
    learner, _ = build_learner(config, vocabulary, None)
    learner.add_rollouts(items(0))
    for _ in range(4):
        learner.train_step()
        save(config, learner, vocabulary, keep=2)
    directory = checkpoints_of(config)
    assert sorted(path.name for path in directory.iterdir()) == ["step-00000003", "step-00000004"]
    latest = latest_checkpoint(directory)
    assert latest is not None
    checkpoint = open_checkpoint(latest, config)
    assert (checkpoint.step, checkpoint.run) == (4, STATE)


def test_saving_a_step_again_replaces_it(make_config: Any, vocabulary: Vocabulary) -> None:
    config = make_config()
    learner, _ = build_learner(config, vocabulary, None)
    learner.add_rollouts(items(0))
    first = save(config, learner, vocabulary)
    (first.parent / ".tmp-left-by-a-crash").mkdir()
    second = save(config, learner, vocabulary)
    assert [first.name, second.name] == ["step-00000000", "step-00000000.1"]
    assert list(first.parent.iterdir()) == [second]
    assert latest_checkpoint(first.parent) == second


def test_a_write_that_fails_leaves_the_older_checkpoint_alone(
    make_config: Any, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    learner, _ = build_learner(config, vocabulary, None)
    learner.add_rollouts(items(0))
    good = save(config, learner, vocabulary)
    learner.train_step()

    def break_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("numpy.savez", break_off)
    with pytest.raises(KeyboardInterrupt):
        save(config, learner, vocabulary)
    assert list(checkpoints_of(config).iterdir()) == [good]


def test_another_configuration_is_refused_and_named(make_config: Any, vocabulary: Vocabulary) -> None:
    config = make_config()
    learner, _ = build_learner(config, vocabulary, None)
    save(config, learner, vocabulary)
    for change in ({"steps": 11}, {"optimiser": {"lr": 1.0}}, {"evaluation": {"share": 0.5}}):
        with pytest.raises(ConflictError, match=r"steps|optimiser\.lr|evaluation\.share"):
            find_checkpoint(make_config(**change), resume=True)
    after_training = {
        "evaluation": {"max_prompts": 3, "procedure": "best_of_n:2", "refusal_phrases": ["no"]},
        "gate": {"max_kl_per_token": 0.5},
        "report": {"show_samples": True},
    }
    harmless = make_config(log_every=3, checkpoint={"every": 7}, publish={"name": "b"}, **after_training)
    assert find_checkpoint(harmless, resume=True) is not None
    second = {"second_reward": {"name": "r", "source": "local"}}
    assert find_checkpoint(make_config(evaluation=second), resume=True) is not None
    with pytest.raises(ConflictError, match="holds a run already"):
        find_checkpoint(config, resume=False)


@pytest.mark.parametrize("damage", ["state.json", "objective.npz", "optimiser.pt", "schema"])
def test_a_damaged_checkpoint_is_refused(make_config: Any, vocabulary: Vocabulary, damage: str) -> None:
    config = make_config()
    learner, _ = build_learner(config, vocabulary, None)
    learner.add_rollouts(items(0))
    learner.train_step()
    path = save(config, learner, vocabulary)
    if damage == "schema":
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**state, "schema_version": 3}))
    else:
        content = (path / damage).read_bytes()
        (path / damage).write_bytes(content[: len(content) // 2])
    with pytest.raises(IntegrityError, match=r"step-00000001"):
        build_learner(config, vocabulary, find_checkpoint(config, resume=True))


def test_a_half_written_directory_is_not_a_checkpoint(make_config: Any, vocabulary: Vocabulary) -> None:
    config = make_config()
    learner, _ = build_learner(config, vocabulary, None)
    path = save(config, learner, vocabulary)
    shutil.move(path, path.with_name(".tmp-abc"))
    assert find_checkpoint(config, resume=True) is None
