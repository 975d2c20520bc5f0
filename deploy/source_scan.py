"""Fail when a tracked file holds a secret, an address of a package registry, or a lock file with addresses.

Addresses of registries belong into the configuration of the machine: a mirror or a machine without internet must be
able to install from these files unchanged (docs/decisions).
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Written in pieces, so that this file does not find itself.
REGISTRY_HOSTS = (
    "pypi" + ".org",
    "files.python" + "hosted.org",
    "download.py" + "torch.org",
    "registry.npm" + "js.org",
    "registry.yarn" + "pkg.com",
    "deb.deb" + "ian.org",
    "archive.ubu" + "ntu.com",
    "proxy.go" + "lang.org",
    "static.crates" + ".io",
)

LOCK_FILES = frozenset({"uv.lock", "poetry.lock", "Pipfile.lock", "pdm.lock", "package-lock.json", "yarn.lock"})

SECRETS = {
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "OpenAI key": r"\bsk-[A-Za-z0-9_-]{32,}",
    "AWS key id": r"\bAKIA[0-9A-Z]{16}\b",
    "GitHub token": r"\b(?:ghp|gho|ghs|github_pat)_[A-Za-z0-9_]{30,}",
    "password in an address": r"\b[a-z][a-z0-9+]*://[^\s/:@$<{]+:(?!password@|\*+@)[^\s/@$<{*]+@"
    r"(?!localhost\b|127\.0\.0\.1\b|[a-z.]+\.invalid\b|host\b)[A-Za-z0-9]",
}

MAX_FILE_BYTES = 1_000_000


def main() -> None:
    """Print each finding and exit 1 if there is one."""
    root = Path.cwd()
    findings = [finding for path in tracked_files(root) for finding in scan(path, path.relative_to(root).as_posix())]
    for finding in findings:
        sys.stdout.write(f"{finding}\n")
    sys.exit(1 if findings else 0)


def tracked_files(root: Path) -> list[Path]:
    """Files that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    return sorted(path for name in listed.stdout.split("\0") if name and (path := root / name).is_file())


def scan(path: Path, name: str) -> Iterator[str]:
    """One line per finding in a file, which the lines call `name`."""
    if path.name in LOCK_FILES:
        yield f"{name}: lock files record download addresses; requirements/*.txt are the pins"
        return
    if path.stat().st_size > MAX_FILE_BYTES:
        yield f"{name}: {path.stat().st_size} bytes; files above {MAX_FILE_BYTES} do not belong in the repository"
        return
    text = path.read_bytes().decode("utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        for host in REGISTRY_HOSTS:
            if host in line.lower():
                yield f"{name}:{number}: address of a package registry ({host})"
        for what, pattern in SECRETS.items():
            if re.search(pattern, line):
                yield f"{name}:{number}: looks like a {what}"


if __name__ == "__main__":
    main()
