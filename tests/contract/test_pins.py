"""The pin files: complete, exact, without addresses, and in step with pyproject.toml."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FILES = ("cpu", "cuda", "dev")
RUN_EXTRAS = ("server", "postgres", "engine", "train")
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision"}
OURS = {"trimtab", "trimtab-client"}


def lines(name: str) -> list[str]:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    return [line for line in text.splitlines() if not line.startswith("#")]


def pins(name: str) -> dict[str, str]:
    return dict(line.split("==") for line in lines(name))


def requirements(extras: tuple[str, ...]) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    client = tomllib.loads((ROOT / "clients" / "python" / "pyproject.toml").read_text())["project"]
    found = [*project["dependencies"], *client["dependencies"]]
    for extra in extras:
        found += project["optional-dependencies"][extra]
    return [Requirement(text) for text in found]


@pytest.mark.parametrize("name", FILES)
def test_every_line_is_an_exact_pin_and_they_are_sorted(name: str) -> None:
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]*==[A-Za-z0-9.+!]+", line) for line in lines(name))
    names = [line.split("==")[0] for line in lines(name)]
    assert names == sorted(set(names))
    assert not OURS & set(names)


def test_the_cpu_pins_leave_out_the_cuda_builds_of_the_torch_family() -> None:
    assert not LEFT_OUT & pins("cpu").keys()
    assert pins("cpu")["torch"] == "2.13.0+cpu"
    assert not [name for name in pins("cpu") if name.startswith("nvidia")]


def test_dev_adds_to_the_others_and_repeats_nothing() -> None:
    assert not pins("dev").keys() & (pins("cpu").keys() | pins("cuda").keys())


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_pins_satisfy_what_pyproject_asks_for(variant: str) -> None:
    pinned = {**pins(variant), **pins("dev")}
    for requirement in requirements((*RUN_EXTRAS, variant, "dev")):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not pinned in {variant}.txt or dev.txt; run make pins"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} against {version}"


def test_the_editable_install_finds_its_build_tools_among_the_pins() -> None:
    assert {"hatchling", "editables", "packaging", "pathspec", "pluggy", "trove-classifiers"} <= pins("cpu").keys()


def test_the_pins_are_closed_under_the_installed_packages_own_requirements() -> None:
    """Nothing is resolved at installation, so what is missing here would be missing at run time."""
    pinned = pins("cpu").keys() | pins("dev").keys()
    missing = set()
    for name in pinned:
        try:
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed here: this environment was not made from cpu.txt and dev.txt")
        for requirement in map(Requirement, asked):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted = canonicalize_name(requirement.name)
                if wanted not in pinned | LEFT_OUT:
                    missing.add(f"{name} -> {wanted}")
    assert not missing
