from pathlib import Path

import pytest

from trimtab_adapters.contract.errors import ConflictError, StorageError
from trimtab_training.evaluation.sample_cache import SAMPLES_FILE, Sample, SampleFile

SAMPLE = Sample("a\nb\ud800", 3, -0.1234567890123456, 0.25, "stop")


def test_a_sample_comes_back_exactly(tmp_path: Path) -> None:
    with SampleFile(tmp_path / "work") as samples:
        assert samples.get("k") is None
        samples.put("k", SAMPLE)
        assert samples.get("k") == SAMPLE
    with SampleFile(tmp_path / "work") as samples:
        assert samples.get("k") == SAMPLE


def test_a_line_that_a_crash_cut_short_is_taken_off(tmp_path: Path) -> None:
    with SampleFile(tmp_path) as samples:
        samples.put("k", SAMPLE)
    path = tmp_path / SAMPLES_FILE
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-5])
    with SampleFile(tmp_path) as samples:
        assert samples.get("k") == SAMPLE
        samples.put("l", SAMPLE)
    with SampleFile(tmp_path) as samples:
        assert samples.get("l") == SAMPLE
    assert path.read_bytes().count(b"\n") == 2


def test_a_damaged_line_is_an_error_with_its_number(tmp_path: Path) -> None:
    (tmp_path / SAMPLES_FILE).write_text('{"key": "k"}\n')
    with pytest.raises(StorageError, match="line 1 is not a sample"):
        SampleFile(tmp_path)


def test_two_runs_do_not_share_a_directory_at_the_same_time(tmp_path: Path) -> None:
    with SampleFile(tmp_path), pytest.raises(ConflictError, match="another evaluation"):
        SampleFile(tmp_path)
    SampleFile(tmp_path).__exit__(None, None, None)
