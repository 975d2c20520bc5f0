import logging
from pathlib import Path

import pytest

from trimtab_adapters.contract.errors import StorageError
from trimtab_training.job_feed import JobFeed, LineQueue, job_log


def test_lines_are_numbered_and_wait_until_they_were_sent() -> None:
    queue: LineQueue[str] = LineQueue()
    for text in "abc":
        queue.add(text)
    assert queue.waiting(2) == [(1, "a"), (2, "b")]
    assert queue.waiting(2) == [(1, "a"), (2, "b")]
    queue.sent(2)
    queue.add("d")
    assert queue.waiting() == [(3, "c"), (4, "d")]


def test_too_many_lines_leave_a_gap_in_the_numbers() -> None:
    queue: LineQueue[str] = LineQueue(most_waiting=2)
    for text in "abcd":
        queue.add(text)
    assert queue.waiting() == [(3, "c"), (4, "d")]
    queue.sent(2)  # an answer to what has been left out meanwhile
    assert queue.waiting() == [(3, "c"), (4, "d")]


def test_a_feed_tells_progress_each_time_and_lines_once() -> None:
    feed = JobFeed()
    feed({"step": 1, "loss": float("nan")})
    assert feed.body() == {"progress": {"step": 1, "loss": None}}
    feed.log.add("hello")
    feed.metrics.add({"step": 4, "time": 5.5, "train/loss": 2.0, "train/perplexity": float("inf")})
    body = feed.body()
    assert body == {
        "progress": {"step": 1, "loss": None},
        "log": [{"number": 1, "text": "hello"}],
        "metrics": [
            {"number": 1, "step": 4, "time": 5.5, "figures": {"train/loss": 2.0, "train/perplexity": None}},
        ],
    }
    feed.log.add("later")
    feed.sent(body)
    assert feed.body()["log"] == [{"number": 2, "text": "later"}]
    assert "metrics" not in feed.body()


def test_everything_logged_goes_to_the_file_and_the_feed(tmp_path: Path) -> None:
    feed, path = JobFeed(), tmp_path / "job/job.log"
    logger = logging.getLogger("anything")
    for attempt in (1, 2):
        with job_log(path, feed):
            logger.warning("attempt %d\nof two", attempt)
            logger.warning("x" * 5000)
    logger.warning("afterwards")
    lines = [text for _, text in feed.log.waiting()]
    assert [line.partition("anything: ")[2] for line in lines[:2]] == ["attempt 1", ""]
    assert (lines[1], len(lines[2])) == ("of two", 4000)
    text = path.read_text()
    assert "attempt 1" in text
    assert "attempt 2" in text
    assert "x" * 5000 in text
    assert "afterwards" not in text


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"), job_log(tmp_path / "file/job.log", JobFeed()):
        pytest.fail("it was opened")
