"""docker-compose.yml: valid, safe by default, and made of commands and settings that exist."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab_server.settings import Settings

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
VARIABLE = re.compile(r"\$\{(?P<name>[A-Z0-9_]+)(?::(?P<kind>[?-])(?P<rest>[^}]*))?\}")
OURS = re.compile(r"--[a-z][a-z-]*")

SERVICES = ("gateway", "engine-cpu", "engine-gpu", "trainer-cpu", "trainer-gpu")


def interpolate(value: Any, environment: dict[str, str]) -> Any:
    """What Compose does with `${NAME}`, `${NAME:-default}` and `${NAME:?message}`."""
    if isinstance(value, dict):
        return {key: interpolate(item, environment) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item, environment) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        given = environment.get(match["name"])
        if given:
            return given
        if match["kind"] == "?":
            raise KeyError(match["name"])
        return match["rest"] or ""

    return VARIABLE.sub(replace, value)


REQUIRED = {
    "TRIMTAB_API_KEY": "api",
    "TRIMTAB_ADMIN_KEY": "admin",
    "TRIMTAB_ENGINE_KEY": "engine",
    "TRIMTAB_MODEL": "/models/base",
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document: dict[str, Any] = interpolate(yaml.safe_load(FILE.read_text()), REQUIRED)
    return document


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest, compose: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = compose["services"][request.param]
    return found


def test_the_file_fits_the_compose_specification() -> None:
    command = [str(Path(sys.executable).with_name("check-jsonschema")), "--builtin-schema", "vendor.compose-spec"]
    finished = subprocess.run([*command, str(FILE)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_a_broken_file_does_not_fit_it(tmp_path: Path) -> None:
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(FILE.read_text().replace("read_only: true", "read_onyl: true"))
    command = [str(Path(sys.executable).with_name("check-jsonschema")), "--builtin-schema", "vendor.compose-spec"]
    assert subprocess.run([*command, str(broken)], capture_output=True, check=False).returncode == 1


def test_there_are_exactly_these_services(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == set(SERVICES)


@pytest.mark.parametrize("missing", REQUIRED)
def test_a_missing_key_or_model_stops_everything(missing: str) -> None:
    with pytest.raises(KeyError, match=missing):
        interpolate(yaml.safe_load(FILE.read_text()), {k: v for k, v in REQUIRED.items() if k != missing})


def test_the_example_environment_names_every_variable() -> None:
    example = (ROOT / "deploy" / "example.env").read_text()
    named = set(re.findall(r"(?m)^#?([A-Z0-9_]+)=", example))
    assert named == {match["name"] for match in VARIABLE.finditer(FILE.read_text())}
    assert set(re.findall(r"(?m)^([A-Z0-9_]+)=", example)) == set(REQUIRED)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_each_profile_runs_one_gateway_one_engine_and_one_trainer(compose: dict[str, Any], profile: str) -> None:
    active = [name.split("-")[0] for name, service in compose["services"].items() if profile in service["profiles"]]
    assert sorted(active) == ["engine", "gateway", "trainer"]
    assert "engine" in compose["services"][f"engine-{profile}"]["networks"]["default"]["aliases"]
    variant = {"cpu": "cpu", "gpu": "cuda"}[profile]
    for kind in ("engine", "trainer"):
        service = compose["services"][f"{kind}-{profile}"]
        assert service["build"]["args"] == {"VARIANT": variant}
        assert ("deploy" in service) == (profile == "gpu")


def test_a_service_runs_as_an_ordinary_user_without_privileges(service: dict[str, Any]) -> None:
    assert service["user"].split(":")[0].isdigit()
    assert int(service["user"].split(":")[0]) >= 1000
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")


def test_a_service_names_an_exact_image_and_how_to_build_it(service: dict[str, Any]) -> None:
    tag = service["image"].rpartition(":")[2]
    assert re.fullmatch(r"\d+\.\d+\.\d+", tag)
    assert re.search(rf"(?m)^FROM base AS {service['build']['target']}$", (ROOT / "Dockerfile").read_text())


def test_a_service_restarts_and_has_a_health_check(service: dict[str, Any]) -> None:
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][:2] == ["CMD", "python"]
    assert {"interval", "timeout", "retries", "start_period"} <= service["healthcheck"].keys()


def test_only_the_gateway_is_published_and_only_on_loopback(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert published == {"gateway": ["127.0.0.1:8000:8000"]}


def test_dependencies_exist_and_state_a_condition(compose: dict[str, Any], service: dict[str, Any]) -> None:
    for name, dependency in service.get("depends_on", {}).items():
        assert name in compose["services"]
        assert dependency["condition"] in ("service_started", "service_healthy")
        # A service of the other profile is not there, which must not keep this one from starting.
        if not set(service["profiles"]) <= set(compose["services"][name]["profiles"]):
            assert dependency["required"] is False


def test_volumes_are_declared_and_the_engine_cannot_write_adapters(compose: dict[str, Any]) -> None:
    used: set[str] = set()
    for service in compose["services"].values():
        used |= {volume.split(":")[0] for volume in service["volumes"] if not volume.startswith((".", "/"))}
    assert used == set(compose["volumes"])
    for profile in ("cpu", "gpu"):
        assert "adapters:/data/adapters:ro" in compose["services"][f"engine-{profile}"]["volumes"]
    assert "adapters:/data/adapters" in compose["services"]["gateway"]["volumes"]


def test_the_gateways_settings_exist_and_make_a_valid_configuration(
    compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment: dict[str, str] = compose["services"]["gateway"]["environment"]
    fields = {f"TRIMTAB_{name.upper()}" for name in Settings.model_fields}
    assert set(environment) <= fields
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = Settings(host="0.0.0.0", port=8000, engine_urls=("http://engine:8100",))
    assert [key.get_secret_value() for key in settings.api_keys] == ["api"]
    assert [key.get_secret_value() for key in settings.admin_keys] == ["admin"]


def test_gateway_trainer_and_engine_hold_the_same_keys(compose: dict[str, Any]) -> None:
    gateway = compose["services"]["gateway"]["environment"]
    for profile in ("cpu", "gpu"):
        assert (
            compose["services"][f"engine-{profile}"]["environment"]["VLLM_API_KEY"] == gateway["TRIMTAB_ENGINE_API_KEY"]
        )
        trainer = compose["services"][f"trainer-{profile}"]["environment"]
        assert trainer["TRIMTAB_API_KEY"] == gateway["TRIMTAB_API_KEYS"]
        assert trainer["TRIMTAB_ADMIN_KEY"] == gateway["TRIMTAB_ADMIN_KEYS"]


ENGINES_OWN = {"--model", "--host", "--port"}
"""Flags of vLLM's server, which `trimtab engine` passes on."""


def help_of(subcommand: str) -> str:
    """What `trimtab SUBCOMMAND --help` prints."""
    program = "import sys; from trimtab_server.cli import main; sys.exit(main())"
    finished = subprocess.run(
        [sys.executable, "-c", program, subcommand, "--help"],
        capture_output=True,
        text=True,
        check=False,
        env={"COLUMNS": "200", "TERM": "dumb", "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.parametrize("name", ["gateway", "engine-cpu", "trainer-cpu"])
def test_the_commands_options_exist_and_none_is_missing(compose: dict[str, Any], name: str) -> None:
    subcommand, *arguments = compose["services"][name]["command"].split()
    (default,) = re.findall(rf'(?m)^CMD \["{subcommand}", (.*)\]$', (ROOT / "Dockerfile").read_text())
    text = help_of(subcommand)
    usage = re.search(r"(?is)usage:.*?\n\s*\n", text)
    assert usage is not None
    required = set(OURS.findall(re.sub(r"\[[^]]*\]", "", usage[0])))
    known = set(OURS.findall(text)) | (ENGINES_OWN if subcommand == "engine" else set())
    for given in ({a for a in arguments if a.startswith("-")}, set(re.findall(r'"(--[a-z-]+)"', default))):
        assert given <= known
        assert required <= given
