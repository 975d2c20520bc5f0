"""What continuous integration reads of a test run: the exit status, and a last line that sums up both parts."""

import os
import subprocess
from pathlib import Path

import pytest

_RUN = Path(__file__).resolve().parents[2] / ".ci" / "run"
_PARTS = """\
==== 2 failed, 4814 passed, 1 warning in 1193.15s (0:19:53) ====
.................................................
===== 3 passed, 6 skipped, 1 error in 85.93s (0:01:25) =====
make: *** [Makefile:48: test] Error 1"""


@pytest.mark.parametrize(
    ("printed", "status", "closing"),
    [
        (_PARTS, 2, "2 failed, 4817 passed, 6 skipped, 1 warnings, 1 errors in 1279.08s"),
        ("==== 7 passed in 1.50s ====", 0, "7 passed in 1.50s"),
        ("make: *** [Makefile:31: setup] Error 1", 2, "no tests were run"),
    ],
)
def test_the_last_line_sums_up_and_the_status_is_that_of_the_tests(
    printed: str, status: int, closing: str, tmp_path: Path
) -> None:
    make = tmp_path / "make"
    make.write_text(f"#!/bin/sh\ncat <<'EOF'\n{printed}\nEOF\nexit {status}\n")
    make.chmod(0o755)
    done = subprocess.run(
        [_RUN],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status
    assert done.stdout.splitlines()[-1] == closing
