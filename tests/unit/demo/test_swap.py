from types import ModuleType

import pytest

from trimtab_adapters.contract.errors import TrimtabError
from trimtab_training.demo.gateway import Gateway
from trimtab_training.demo.swap import StreamTrace, report_of, switch_under_streams


def test_streams_under_way_keep_their_version_and_later_ones_get_the_new(gateway: Gateway, stub: ModuleType) -> None:
    report = switch_under_streams(gateway, route="kind", adapter="kind", version=stub.NEW, body={"model": "kind"})
    assert report.num_spanning == report.num_kept == 3
    assert report.num_failed == 0
    assert report.num_on_new >= 1
    assert report.is_seamless


def test_a_stream_that_cannot_start_is_an_error_and_nothing_is_switched(
    gateway: Gateway, stub: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise TrimtabError("no engine")

    monkeypatch.setattr(Gateway, "stream", refuse)
    with pytest.raises(TrimtabError, match="did not start"):
        switch_under_streams(gateway, route="kind", adapter="kind", version=stub.NEW, body={"model": "kind"})
    assert gateway.route_version("kind") == stub.OLD


def _trace(start: float, end: float, first: str | None, last: str | None, error: str | None = None) -> StreamTrace:
    return StreamTrace(start, end, first, last, 3, error)


def test_a_stream_that_changed_its_version_or_broke_off_is_told() -> None:
    traces = [
        _trace(0, 9, "a", "a"),  # kept
        _trace(0, 9, "a", "b"),  # changed under way
        _trace(0, 9, "a", "a", "broke off"),
        _trace(0, 4, "a", "a"),  # over before the switch was
        _trace(7, 9, "b", "b"),
        _trace(7, 9, "a", "a"),  # began after the switch, on the old version
    ]
    report = report_of(traces, before=3, after=5, old="a", new="b")
    assert (report.num_spanning, report.num_kept, report.num_failed, report.num_on_new) == (3, 1, 1, 1)
    assert report.switch_s == 2
    assert not report.is_seamless


def test_streams_shorter_than_the_switch_span_its_moment_when_they_began_on_the_old_version() -> None:
    ended_before, spanning, mixed = _trace(2, 4, "a", "a"), _trace(4, 6, "a", "a"), _trace(4, 7, "a", "b")
    later = _trace(7, 9, "b", "b")
    assert report_of([ended_before, spanning, later], before=3, after=5, old="a", new="b").is_seamless
    report = report_of([spanning, mixed, later], before=3, after=5, old="a", new="b")
    assert (report.num_spanning, report.num_kept) == (2, 1)
    assert not report.is_seamless


def test_without_a_stream_under_way_nothing_is_shown() -> None:
    report = report_of([_trace(7, 9, "b", "b")], before=3, after=5, old="a", new="b")
    assert not report.is_seamless


def test_a_route_that_does_not_switch_is_an_error(
    gateway: Gateway, stub: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gateway, "route_version", lambda *_: stub.OLD)
    with pytest.raises(TrimtabError, match="should use version"):
        switch_under_streams(gateway, route="kind", adapter="kind", version=stub.NEW, body={"model": "kind"})
