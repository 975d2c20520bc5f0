"""What stands in for a base in training: students of it, made by the product's own recipe."""

import json
import shutil
from pathlib import Path
from typing import Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.language_models import cached, fingerprint
from tasks.systems import World
from trimtab_training.config import OptimiserConfig, PromptFile, SamplingConfig
from trimtab_training.distillation.config import DistillConfig, LocalTeacher
from trimtab_training.distillation.teachers import LocalTeacher as Teacher
from trimtab_training.models import load_vocabulary, save_causal_lm
from trimtab_training.recipes.distill import distill

_NUM_PROMPTS: Final = 300
_SETTINGS: Final = {"num_per_prompt": 4, "top_logprobs": 20, "steps": 150, "lr": 5e-4, "batch_size": 32, "seed": 0}


def student(world: World, start: Path) -> Path:
    """Directory of a model that was distilled from the base's outputs for training prompts of the task."""
    prompts = list(world.task.train_prompts[:_NUM_PROMPTS])
    recipe = {
        **_SETTINGS,
        "start": fingerprint(start),
        "base": fingerprint(world.models.base),
        "prompts": prompts,
        "max_tokens": world.task.max_tokens,
        "stop_token_ids": list(world.models.stop_token_ids),
    }
    return cached("student", recipe, lambda directory: _distill(world, start, prompts, directory))


def untrained(start: Path) -> Path:
    """Directory of a model of the same sizes as `start` with random weights."""

    def make(directory: Path) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(start))
        save_causal_lm(model.float().eval(), directory, load_vocabulary(start).path)

    return cached("untrained", {"config": json.loads((start / "config.json").read_text())}, make)


def _distill(world: World, start: Path, prompts: list[str], directory: Path) -> None:
    run = directory / "run"
    run.mkdir()
    path = run / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    sampling = SamplingConfig(max_tokens=world.task.max_tokens, stop_token_ids=world.models.stop_token_ids)
    config = DistillConfig(
        output_dir=run,
        student=start,
        teacher=LocalTeacher(type="local", path=world.models.base),
        prompts=PromptFile(path=path),
        num_per_prompt=_SETTINGS["num_per_prompt"],
        sampling=sampling,
        top_logprobs=_SETTINGS["top_logprobs"],
        optimiser=OptimiserConfig(lr=_SETTINGS["lr"], eps=1e-8, batch_size=_SETTINGS["batch_size"], warmup_steps=10),
        steps=_SETTINGS["steps"],
        seed=_SETTINGS["seed"],
        num_threads=world.num_threads,
    )
    top_logprobs, vocabulary = config.top_logprobs, world.models.vocabulary
    teacher = Teacher(world.base, sampling=sampling, top_logprobs=top_logprobs, vocabulary=vocabulary)
    result = distill(config, teacher, show_progress=False)
    assert result.path is not None, "steps > 0"
    for file in result.path.iterdir():
        shutil.copyfile(file, directory / file.name)
    shutil.rmtree(run)
