"""What must stay light is light, proved by importing it in a fresh process; the proof is tried on planted imports."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {
    "trimtab_adapters": ROOT / "adapters",
    "trimtab_server": ROOT / "server",
    "trimtab_training": ROOT / "training",
    "trimtab_client": ROOT / "clients" / "python" / "src",
}
HEAVY = ("torch", "transformers", "vllm")

GATEWAY_ONLY = ("fastapi", "uvicorn", "pydantic_settings", "psycopg")

LIGHT = {
    "trimtab_adapters.contract": HEAVY,
    "trimtab_adapters.infalign": (*HEAVY, "pydantic", "httpx", "sqlalchemy", *GATEWAY_ONLY),
    "trimtab_server.app": HEAVY,
    "trimtab_server.serve": HEAVY,
    # The trainer's image has none of the gateway's own dependencies, and starts through this module.
    "trimtab_server.cli": (*HEAVY, *GATEWAY_ONLY, "sqlalchemy", "pyarrow"),
    "trimtab_training": ("vllm", *GATEWAY_ONLY, "sqlalchemy"),
    # A reward that the gateway loads.
    "trimtab_training.demo.world": HEAVY,
    "trimtab_client": (*HEAVY, "numpy", "pydantic", "fastapi", "openai"),
}

PROBE = """
import importlib, pkgutil, sys
name, *forbidden = sys.argv[1:]
module = importlib.import_module(name)
for found in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
    importlib.import_module(found.name)
loaded = sorted(set(forbidden) & set(sys.modules))
sys.exit(f"{name} loads {', '.join(loaded)}" if loaded else 0)
"""


def import_alone(name: str, forbidden: tuple[str, ...], *paths: Path) -> subprocess.CompletedProcess[str]:
    """Import a module and all below it in a fresh process; exit 1 if that loads a forbidden one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, *SOURCES.values())))}
    command = [sys.executable, "-c", PROBE, name, *forbidden]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=False)


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_module_loads_nothing_heavy(name: str) -> None:
    finished = import_alone(name, LIGHT[name])
    assert finished.returncode == 0, finished.stderr


def test_a_planted_heavy_import_is_seen(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "__init__.py").write_text("")
    (planted / "inner.py").write_text("import torch\n")
    assert import_alone("planted", ("vllm",), tmp_path).returncode == 0
    finished = import_alone("planted", HEAVY, tmp_path)
    assert finished.returncode == 1
    assert "planted loads torch" in finished.stderr


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on copies of the packages."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    command = [
        str(Path(sys.executable).with_name("lint-imports")),
        "--config",
        str(ROOT / ".importlinter"),
        "--no-cache",
    ]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    for name, source in SOURCES.items():
        shutil.copytree(source / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_imports_point_one_way(packages: Path) -> None:
    finished = lint_imports(packages)
    assert finished.returncode == 0, finished.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("trimtab_server/planted.py", "import trimtab_training", "never by import"),
        ("trimtab_training/planted.py", "import vllm", "Only trimtab_adapters.vllm imports vLLM"),
        ("trimtab_server/planted.py", "def later() -> None:\n    import torch", "The gateway runs without"),
        ("trimtab_adapters/contract/planted.py", "import sqlalchemy", "The contract is light"),
        ("trimtab_client/planted.py", "import pydantic", "The client needs httpx"),
        ("trimtab_server/planted.py", "import trimtab_adapters.vllm", "Nothing imports trimtab_adapters.vllm"),
    ],
)
def test_a_planted_wrong_import_breaks_its_contract(packages: Path, file: str, line: str, contract: str) -> None:
    (packages / file).write_text(line + "\n")
    finished = lint_imports(packages)
    assert finished.returncode == 1, finished.stdout
    broken = [text for text in finished.stdout.splitlines() if " BROKEN" in text]
    assert any(contract in text for text in broken), finished.stdout
