"""The teacher that a configuration names."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trimtab_training.distillation.config import DistillConfig
from trimtab_training.distillation.config import LocalTeacher as LocalTeacherConfig
from trimtab_training.distillation.teachers import ApiTeacher, LocalTeacher, Teacher
from trimtab_training.gateway import GatewayClient
from trimtab_training.interruption import Interruption
from trimtab_training.models import load_base_lm, load_vocabulary


@contextmanager
def built_teacher(config: DistillConfig, interruption: Interruption) -> Iterator[Teacher]:
    """The teacher, connected or loaded.

    Raises:
        AdapterError: A local one cannot be loaded.
    """
    vocabulary, teacher = load_vocabulary(config.student), config.teacher
    if isinstance(teacher, LocalTeacherConfig):
        model = load_base_lm(teacher.path, dtype=torch.float32, device=config.device)
        yield LocalTeacher(model, sampling=config.sampling, top_logprobs=config.top_logprobs, vocabulary=vocabulary)
        return
    client = GatewayClient(
        teacher.url,
        api_key=os.environ.get(teacher.api_key_env),
        concurrency=teacher.concurrency,
        timeout_s=teacher.timeout_s,
        retry_for_s=teacher.retry_for_s,
        interruption=interruption,
    )
    with client:
        yield ApiTeacher(
            client,
            model=teacher.model,
            sampling=config.sampling,
            top_logprobs=config.top_logprobs,
            vocabulary=vocabulary,
            has_token_ids=teacher.has_token_ids,
        )
