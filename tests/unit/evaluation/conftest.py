import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation_bench import Bench, evaluation_bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    with evaluation_bench() as made:
        yield made


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """Six prompts, and the first of them once more."""
    path = tmp_path / "prompts.jsonl"
    lines: list[dict[str, Any]] = [{"prompt": f"Question {i}?"} for i in range(4)]
    lines.append({"prompt_token_ids": [72, 105]})
    lines.append({"messages": [{"role": "user", "content": "Hello"}]})
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    return path
