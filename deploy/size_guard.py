"""Fail when a file has more than 500 lines or a function more than 80.

A file that grows past this has lost its one noun; split it instead of raising the numbers.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80

EXCUSED: frozenset[str] = frozenset()
"""`path` or `path:function`, each with a comment that says why."""


def main() -> None:
    """Print each finding and exit 1 if there is one."""
    root = Path.cwd()
    findings = [
        finding for path in python_files(root) for finding in oversized(path, path.relative_to(root).as_posix())
    ]
    for finding in findings:
        sys.stdout.write(f"{finding}\n")
    sys.exit(1 if findings else 0)


def python_files(root: Path) -> list[Path]:
    """Python files that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    return sorted(path for name in listed.stdout.split("\0") if name and (path := root / name).is_file())


def oversized(path: Path, name: str) -> Iterator[str]:
    """One line for the file and one per function that is too long; the lines call the file `name`."""
    source = path.read_text(encoding="utf-8")
    num_lines = len(source.splitlines())
    if num_lines > MAX_FILE_LINES and name not in EXCUSED:
        yield f"{name}: {num_lines} lines, {MAX_FILE_LINES} allowed"
    for node in ast.walk(ast.parse(source, filename=str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and f"{name}:{node.name}" not in EXCUSED:
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                yield f"{name}:{node.lineno}: {node.name} has {num_lines} lines, {MAX_FUNCTION_LINES} allowed"


if __name__ == "__main__":
    main()
