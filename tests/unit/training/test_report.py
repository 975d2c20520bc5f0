import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typing_extensions import override

from held_out_figures import estimate, good_figures
from trimtab_adapters.contract.errors import IntegrityError, StorageError
from trimtab_training.diagnostics import Diagnosis, diagnose
from trimtab_training.evaluation.held_out import Comparer, Drawn, HeldOutFigures
from trimtab_training.evaluation.intervals import Intervals
from trimtab_training.evaluation.procedures import Chosen
from trimtab_training.evaluation.token_sums import TokenSums
from trimtab_training.gate import decide
from trimtab_training.gate_config import GateConfig
from trimtab_training.recipes.evaluate import Evaluation
from trimtab_training.report.history import Series, read_history
from trimtab_training.report.page import render_page
from trimtab_training.report.run_report import RunReport
from trimtab_training.report.samples import choose_samples
from trimtab_training.report.writing import write_report
from trimtab_training.report_config import ReportConfig
from trimtab_training.rollouts import Sample

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>&\"'{{ 7*7 }}"
HISTORY = {
    "rollouts/mean_reward": Series((0, 5, 10), (0.1, 0.2, 0.4)),
    "train/kl": Series((1, 2, 3), (0.0, None, 0.2)),
    "train/loss": Series((1, 2, 3), (3.0, 2.0, 1.0)),
}


def drawn(seed: int, num_prompts: int = 6, size: int = 3, text: str = "out") -> Drawn:
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 9, (num_prompts, size, 4))
    samples = [
        [Sample(f"{HOSTILE} {i}", (1,), f"{text} {i}.{j}", tuple(ids[i, j].tolist())) for j in range(size)]
        for i in range(num_prompts)
    ]
    sums = TokenSums(*(np.full(num_prompts * size, value) for value in (4.0, -8.0, -7.0, 0.3, 6.0, 5.0)))
    return Drawn(samples, {"lucky": rng.normal(size=(num_prompts, size)) + 3 * seed}, sums)


def evaluation() -> Evaluation:
    base, steered = drawn(0, text=HOSTILE), drawn(1, text="steered\ud800")
    comparer = Comparer(Intervals("percentile", num_resamples=100), Chosen("best", 2), True, 4, ("sorry",))
    comparison = comparer.report(base, steered, versions={"lucky": "1"})
    return Evaluation(comparer.figures(base, steered, comparison), comparison, base, steered)


def report(found: Evaluation | None = None, **changes: Any) -> RunReport:
    figures = None if found is None else found.figures
    diagnoses = [] if figures is None else diagnose(figures)
    samples = [] if found is None else choose_samples(found.base, found.steered, num=3, seed=0)
    run = RunReport(
        name="kind",
        version="0" * 16,
        num_steps=10,
        reward="lucky@1",
        created_at=1_700_000_000.0,
        config={"steps": 10, "note": HOSTILE},
        history=HISTORY,
        evaluation=found,
        diagnoses=diagnoses,
        gate=decide(GateConfig(), figures, diagnoses),
        samples=samples,
    )
    return replace(run, **changes)


def with_figures(figures: HeldOutFigures) -> Evaluation:
    return replace(evaluation(), figures=figures)


class Tags(HTMLParser):
    """Every tag with its attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    @override
    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_page_that_needs_no_network_and_one_file_of_json(tmp_path: Path) -> None:
    write_report(report(evaluation()), tmp_path, ReportConfig())
    names = {"report.html", "report.json", "history.png", "win_rate.png", "lengths.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    page = Tags((tmp_path / "report.html").read_text(encoding="utf-8"))
    sources = [attributes["src"] or "" for tag, attributes in page.tags if "src" in attributes]
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,iVBORw0KGgo") for source in sources)
    assert not any("href" in attributes for _, attributes in page.tags)
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    for name in names - {"report.html", "report.json"}:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["evaluation"]["procedure"] == "best_of_n:2"
    assert data["history"]["train/kl"] == {"steps": [1, 2, 3], "values": [0.0, None, 0.2]}
    assert data["comparison"]["win_rates"][1]["procedure"] == "best_of_n:2"
    assert data["gate"]["passed"] is True


def test_outputs_are_in_neither_file_unless_they_are_asked_for(tmp_path: Path) -> None:
    run = report(evaluation())
    for settings, in_page, in_json in (
        ({}, False, False),
        ({"show_samples": True}, True, False),
        ({"samples_in_json": True}, False, True),
    ):
        write_report(run, tmp_path, ReportConfig(plots=False, **settings))
        assert ("steered" in Tags((tmp_path / "report.html").read_text()).text.partition("Samples")[2]) is in_page
        text = (tmp_path / "report.json").read_text()
        assert ("steered?" in text) is in_json
        assert ("samples" in json.loads(text)) is in_json


def test_texts_are_shown_as_they_are_and_never_as_markup() -> None:
    hostile = Diagnosis("no_improvement", HOSTILE)
    page = render_page(report(evaluation(), diagnoses=[hostile], name=HOSTILE), [], with_samples=True)
    tags = Tags(page)
    assert not {"script", "img"} & {tag for tag, _ in tags.tags}
    assert not any(name.startswith("on") for _, attributes in tags.tags for name in attributes)
    # 3 prompts, 3 outputs of the base, the diagnosis, the name in title and heading
    assert tags.text.count(HOSTILE) == 3 + 3 + 1 + 2


def test_a_closed_gate_says_why_and_failures_are_named() -> None:
    page = Tags(render_page(report(with_figures(good_figures(perplexity_ratio=estimate(3.0)))), [], with_samples=False))
    assert "The gate is not passed." in page.text
    assert "the perplexity ratio is 3; it must be at most 1.5 (max_perplexity_ratio)" in page.text
    assert "degraded fluency" in page.text
    rows = re.sub(r"\s+", " ", page.text)
    assert "0.300 [0.290, 0.310]" in rows
    assert "win rate of steered over base, best_of_n:4 on both sides0.600 [0.590, 0.610]" in rows


def test_a_run_without_held_out_prompts_has_a_report_of_its_training(tmp_path: Path) -> None:
    write_report(report(None), tmp_path, ReportConfig())
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json", "history.png"}
    page = Tags((tmp_path / "report.html").read_text())
    assert "nothing was held out" in page.text
    assert json.loads((tmp_path / "report.json").read_text())["evaluation"] is None


def test_the_seed_chooses_samples_and_not_the_outputs() -> None:
    base, steered = drawn(0, num_prompts=50), drawn(1, num_prompts=50)
    chosen = choose_samples(base, steered, num=5, seed=3)
    assert len(chosen) == 5
    assert chosen == choose_samples(base, steered, num=5, seed=3)
    assert chosen != choose_samples(base, steered, num=5, seed=4)
    again = choose_samples(drawn(7, num_prompts=50), steered, num=5, seed=3)
    assert [pair.prompt for pair in again] == [pair.prompt for pair in chosen]
    assert len(choose_samples(base, steered, num=99, seed=3)) == 50
    number = int(chosen[0].prompt.split()[-1])
    assert chosen[0].steered == f"out {number}.0"
    assert chosen[0].base_rewards == (float(base.rewards["lucky"][number, 0]),)


def test_long_texts_are_cut() -> None:
    base = drawn(0, num_prompts=1, text="x" * 5000)
    (pair,) = choose_samples(base, base, num=1, seed=0)
    assert pair.base == "x" * 4000 + " […]"


def test_the_history_has_every_figure_and_no_infinities(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "time": 1.0, "rollouts/mean_reward": 0.5},
        {"step": 1, "time": 2.0, "train/loss": 3.0, "train/kl": float("nan")},
        {"step": 2, "time": 3.0, "train/loss": float("inf"), "train/kl": 0.1},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_history(path) == {
        "rollouts/mean_reward": Series((0,), (0.5,)),
        "train/kl": Series((1, 2), (None, 0.1)),
        "train/loss": Series((1, 2), (3.0, None)),
    }
    path.write_text("{")
    with pytest.raises(IntegrityError, match="metrics"):
        read_history(path)


def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("a file where the directory should be")
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(report(None), tmp_path / "report", ReportConfig(plots=False))
