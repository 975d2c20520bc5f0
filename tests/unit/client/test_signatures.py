"""Both clients offer the same calls with the same arguments, and the package exports what it says."""

import inspect
import typing

import pytest

import trimtab_client
from trimtab_client import AsyncClient, Client


def resources(client: object, path: str = "") -> dict[str, type]:
    """Each resource of a client by its dotted name, found from the attributes."""
    found: dict[str, type] = {}
    for name, value in vars(client).items():
        if not name.startswith("_"):
            found[path + name] = type(value)
            found |= resources(value, f"{path}{name}.")
    return found


PAIRS = {
    name: (kind, resources(AsyncClient())[name]) for name, kind in (("", Client), *resources(Client()).items()) if name
}


def methods(kind: type) -> dict[str, typing.Any]:
    return {name: value for name, value in vars(kind).items() if inspect.isfunction(value) and not name.startswith("_")}


def test_both_clients_have_the_same_resources() -> None:
    assert resources(Client()).keys() == resources(AsyncClient()).keys()
    assert len(PAIRS) == 11


@pytest.mark.parametrize("name", PAIRS)
def test_methods_have_the_same_arguments_and_answers(name: str) -> None:
    blocking, awaited = PAIRS[name]
    assert methods(blocking).keys() == methods(awaited).keys()
    for method, function in methods(blocking).items():
        ours, theirs = inspect.signature(function), inspect.signature(methods(awaited)[method])
        assert ours.parameters == theirs.parameters, f"{name}.{method}"
        expected = str(ours.return_annotation).replace("_stream.Stream[", "_stream.AsyncStream[")
        assert expected == str(theirs.return_annotation), f"{name}.{method}"
        assert inspect.getdoc(function) == inspect.getdoc(methods(awaited)[method])
        assert inspect.iscoroutinefunction(methods(awaited)[method]) == (method != "stream")


def test_constructors_differ_in_the_transport_type_only() -> None:
    blocking, awaited = inspect.signature(Client).parameters, inspect.signature(AsyncClient).parameters
    assert list(blocking) == list(awaited)
    assert [name for name in blocking if blocking[name] != awaited[name]] == ["transport"]


def test_everything_exported_exists_and_is_listed() -> None:
    public = {
        name for name, value in vars(trimtab_client).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public | {"__version__"} == set(trimtab_client.__all__)
