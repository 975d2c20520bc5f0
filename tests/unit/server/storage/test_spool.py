"""The spool: what was acknowledged is found again, whatever happens to the files' ends."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab_adapters.contract.errors import StorageError
from trimtab_server.storage.spool import Spool
from trimtab_server.storage.spool_frames import encode_frames, scan_frames


def opened(directory: Path, *, segment_bytes: int = 1 << 20) -> Spool:
    spool = Spool(directory, segment_bytes=segment_bytes)
    spool.open()
    return spool


def drain(spool: Spool, max_records: int = 100) -> list[bytes]:
    found: list[bytes] = []
    while (batch := spool.peek(max_records)).payloads:
        found.extend(batch.payloads)
        spool.take(batch.end)
    return found


def crash(spool: Spool) -> None:
    """What is left of a killed process: its files, and no locks."""
    for descriptor in (spool._active_descriptor, spool._lock_descriptor):
        if descriptor is not None:
            os.close(descriptor)
    spool._active_descriptor = spool._lock_descriptor = None


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.seg"))


def test_a_frame_is_length_checksum_and_payload_on_one_line() -> None:
    # CRC-32 of "123456789" is the published check value cbf43926.
    assert encode_frames([b"123456789"]) == b"00000009 cbf43926 123456789\n"


def test_records_come_back_in_order_and_once(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.append([b"a", b"b"], sync=True)
    assert spool.peek(1).payloads == (b"a",)
    assert drain(spool, max_records=1) == [b"a", b"b"]
    spool.append([b"c"], sync=False)
    assert drain(spool) == [b"c"]
    assert spool.peek(1).payloads == ()
    spool.close()


def test_records_that_were_not_taken_wait_for_the_next_process(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.append([b"a", b"b"], sync=True)
    first.take(first.peek(1).end)
    first.close()
    second = Spool(tmp_path)
    assert second.open() == 2  # the place is not kept: what was taken is taken again, which is harmless
    assert drain(second) == [b"a", b"b"]
    second.close()
    assert segments(tmp_path) == []


def test_a_full_segment_is_followed_by_another_and_deleted_when_taken(tmp_path: Path) -> None:
    spool = opened(tmp_path, segment_bytes=50)
    for letter in (b"a", b"b", b"c", b"d", b"e"):
        spool.append([letter * 10], sync=True)  # 29 bytes each: two fill a segment
    assert [path.name for path in segments(tmp_path)] == ["0000000001.seg", "0000000002.seg", "0000000003.seg"]
    batch = spool.peek(100)
    assert len(batch.payloads) == 2
    spool.take(batch.end)
    assert [path.name for path in segments(tmp_path)] == ["0000000002.seg", "0000000003.seg"]
    assert len(drain(spool)) == 3
    assert [path.name for path in segments(tmp_path)] == ["0000000003.seg"]  # still appended to
    spool.close()
    assert segments(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 5, 18, 27])
def test_a_torn_tail_is_cut_and_nothing_before_it_is_lost(tmp_path: Path, cut: int) -> None:
    spool = opened(tmp_path)
    spool.append([b"first"], sync=True)
    spool.append([b"123456789"], sync=False)  # 28 bytes
    crash(spool)
    path = segments(tmp_path)[0]
    os.truncate(path, path.stat().st_size - cut)
    again = Spool(tmp_path)
    assert again.open() == 1
    assert path.read_bytes() == encode_frames([b"first"])
    again.append([b"next"], sync=True)
    assert drain(again) == [b"first", b"next"]
    again.close()


def test_a_segment_that_was_torn_in_its_first_record_is_removed(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    spool.append([b"123456789"], sync=False)
    crash(spool)
    os.truncate(segments(tmp_path)[0], 20)
    again = Spool(tmp_path)
    assert again.open() == 0
    assert segments(tmp_path) == []
    again.close()


def test_damage_in_the_middle_loses_only_the_damaged_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = opened(tmp_path)
    spool.append([b"first", b"second", b"third"], sync=True)
    crash(spool)
    path = segments(tmp_path)[0]
    path.write_bytes(path.read_bytes().replace(b"second", b"sEcond"))
    again = Spool(tmp_path)
    assert again.open() == 2
    assert drain(again) == [b"first", b"third"]
    assert "damaged bytes were passed over" in caplog.text
    again.close()


def test_a_segment_without_one_valid_record_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "0000000007.seg").write_bytes(b"garbage\ngarbage\n")
    spool = opened(tmp_path)
    assert (tmp_path / "0000000007.damaged").exists()
    spool.append([b"a"], sync=True)
    assert segments(tmp_path)[0].name == "0000000008.seg"
    spool.close()


def test_two_processes_cannot_share_a_spool(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    with pytest.raises(StorageError, match="in use by another gateway"):
        Spool(tmp_path).open()
    spool.close()
    opened(tmp_path).close()


def test_a_directory_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be opened"):
        Spool(tmp_path / "file").open()


def test_records_longer_than_a_read_are_found(tmp_path: Path) -> None:
    spool = opened(tmp_path, segment_bytes=1 << 24)
    long = b"x" * ((1 << 20) + 17)
    spool.append([long, b"a", long], sync=False)
    assert drain(spool) == [long, b"a", long]
    spool.close()


def test_a_payload_with_a_line_feed_is_refused(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    with pytest.raises(StorageError, match="line feed"):
        spool.append([b"a\nb"], sync=True)
    spool.close()


def test_a_full_disk_is_an_error_and_earlier_and_later_records_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened(tmp_path)
    spool.append([b"before"], sync=True)
    real_write = os.write

    def half_write(descriptor: int, data: memoryview) -> int:
        if len(data) > 8:
            return real_write(descriptor, data[:8])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half_write)
        for _ in range(3):
            with pytest.raises(StorageError, match="No space left on device"):
                spool.append([b"refused"], sync=True)
    assert [path.read_bytes() for path in segments(tmp_path)] == [encode_frames([b"before"])]
    spool.append([b"after"], sync=True)
    assert drain(spool) == [b"before", b"after"]
    crash(spool)
    assert drain(opened(tmp_path)) == [b"after"]  # the first segment was taken and deleted


def test_after_a_failed_flush_the_file_is_not_trusted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = opened(tmp_path)
    spool.append([b"before"], sync=True)

    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(StorageError, match="Input/output error"):
            spool.append([b"refused"], sync=True)
    spool.append([b"after"], sync=True)
    assert len(segments(tmp_path)) == 2
    assert drain(spool) == [b"before", b"after"]
    spool.close()


def test_sync_reaches_the_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = opened(tmp_path)
    spool.append([b"first"], sync=True)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    spool.append([b"123456789"], sync=False)
    assert synced == []
    spool.append([b"123456789"], sync=True)
    assert synced == [24 + 28 + 28]
    spool.close()


PAYLOADS = st.lists(st.binary(max_size=40).filter(lambda data: b"\n" not in data), min_size=1, max_size=4)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), PAYLOADS),
        st.tuples(st.just("take"), st.integers(1, 5)),
        st.tuples(st.just("crash"), st.integers(0, 200)),
        st.tuples(st.just("restart"), st.none()),
    ),
    max_size=20,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, segment_bytes=st.integers(1, 200))
def test_every_acknowledged_record_is_found_whatever_the_order_of_appends_crashes_and_restarts(
    tmp_path: Path, steps: list[tuple[str, object]], segment_bytes: int
) -> None:
    """A crash adds up to 200 bytes of an append that was never acknowledged, cut anywhere."""
    directory = tmp_path / "spool"
    shutil.rmtree(directory, ignore_errors=True)
    spool = opened(directory, segment_bytes=segment_bytes)
    acknowledged: list[bytes] = []
    taken: list[bytes] = []
    number = 0
    for kind, value in steps:
        if kind == "append":
            assert isinstance(value, list)
            payloads = [b"%d:" % (number + i) + payload for i, payload in enumerate(value)]
            number += len(payloads)
            spool.append(payloads, sync=True)
            acknowledged += payloads
        elif kind == "take":
            assert isinstance(value, int)
            batch = spool.peek(value)
            taken += batch.payloads
            spool.take(batch.end)
        elif kind == "crash":
            assert isinstance(value, int)
            crash(spool)
            if segments(directory) and value:
                torn = encode_frames([b"torn%d" % i for i in range(10)])[:value]
                with segments(directory)[-1].open("ab") as file:
                    file.write(torn)
            spool = opened(directory, segment_bytes=segment_bytes)
        else:
            spool.close()
            spool = opened(directory, segment_bytes=segment_bytes)
    found = taken + drain(spool)
    spool.close()
    genuine = [payload for payload in found if not payload.startswith(b"torn")]
    assert set(genuine) == set(acknowledged)
    assert list(dict.fromkeys(genuine)) == acknowledged  # in order, apart from what is taken again after a crash


@given(data=st.binary(max_size=300))
def test_scanning_never_fails_and_never_invents_a_record(data: bytes) -> None:
    scan = scan_frames(data)
    assert all(encode_frames([payload]) in data for payload in scan.payloads)
    assert 0 <= scan.end <= len(data)
