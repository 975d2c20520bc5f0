"""Two families of text classifiers: a linear model of hashed words, and boosted trees over characters.

Both give the probability that an output is good. They are fitted in seconds, always the same from the same rows, and so
are not kept anywhere.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from tasks.task import Scores
from trimtab_adapters.contract.rewards import RewardInput

Floats = NDArray[np.float64]
Texts = Callable[[RewardInput], str]
Numbers = Callable[[RewardInput], Sequence[float]]

_SMALLEST: Final = 1e-6
"""Probability that is told from 0 or 1."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """One labelled output.

    Attributes:
        item: The output with its prompt.
        target: Probability that it is good, 0 or 1 where raters said so plainly.
    """

    item: RewardInput
    target: float


@dataclass(frozen=True, slots=True)
class View:
    """What of an output a classifier looks at.

    Attributes:
        texts: Each gives one text, whose n-grams are features of their own.
        numbers: Gives plain numbers, always as many.
    """

    texts: tuple[Texts, ...]
    numbers: Numbers | None = None


def output_of(item: RewardInput) -> str:
    """The output, for a `View`."""
    return item.output


def prompt_of(item: RewardInput) -> str:
    """The prompt, for a `View`."""
    return item.prompt


class WordModel:
    """Logistic regression on hashed words and pairs of words, and on numbers where the view has them.

    Args:
        rows: To learn from; targets between 0 and 1 count as that much of each label.
        view: What it looks at.
        strength: Inverse of the regularisation.
    """

    def __init__(self, rows: Sequence[Labelled], view: View, *, strength: float = 4.0) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        self._view = view
        self._words = HashingVectorizer(
            n_features=1 << 17, ngram_range=(1, 2), alternate_sign=False, token_pattern=r"(?u)\b\w[\w'-]*\b"
        )
        self._scaler = StandardScaler().fit(_numbers(view, rows_of(rows))) if view.numbers else None
        features = self._features(rows_of(rows))
        self._model = LogisticRegression(C=strength, max_iter=500)
        _fit(self._model, features, rows)
        self.version = _version("words", rows)

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """Probability of `good` for each output."""
        return _probabilities(self._model, self._features(inputs)) if inputs else []

    def _features(self, items: Sequence[RewardInput]) -> Any:
        blocks = [self._words.transform([text(item) for item in items]) for text in self._view.texts]
        if self._scaler is not None:
            blocks.append(sparse.csr_matrix(self._scaler.transform(_numbers(self._view, items))))
        return sparse.hstack(blocks).tocsr()


class TreeModel:
    """Gradient-boosted trees over the most telling runs of characters, and over numbers where the view has them.

    Args:
        rows: To learn from, as for `WordModel`.
        view: What it looks at.
        num_features: Runs of characters that are kept, by their chi-squared statistic, per text of the view.
        seed: Of the trees.
    """

    def __init__(self, rows: Sequence[Labelled], view: View, *, num_features: int = 400, seed: int = 0) -> None:
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.feature_selection import SelectKBest, chi2

        self._view = view
        self._counters: list[tuple[Any, Any]] = []
        items, targets = rows_of(rows), np.array([row.target for row in rows])
        for text in view.texts:
            counter = CountVectorizer(analyzer="char_wb", ngram_range=(2, 6), min_df=5, binary=True)
            counts = counter.fit_transform([text(item) for item in items])
            select = SelectKBest(chi2, k=min(num_features, counts.shape[1])).fit(counts, targets > 0.5)
            self._counters.append((counter, select))
        self._model = HistGradientBoostingClassifier(
            max_iter=200, learning_rate=0.08, max_leaf_nodes=15, l2_regularization=1.0, random_state=seed
        )
        _fit(self._model, self._features(items), rows)
        self.version = _version(f"trees {seed}", rows)

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """Probability of `good` for each output."""
        return _probabilities(self._model, self._features(inputs)) if inputs else []

    def _features(self, items: Sequence[RewardInput]) -> Floats:
        blocks = [
            select.transform(counter.transform([text(item) for item in items])).toarray().astype(np.float32)
            for text, (counter, select) in zip(self._view.texts, self._counters, strict=True)
        ]
        if self._view.numbers is not None:
            blocks.append(_numbers(self._view, items))
        return np.hstack(blocks)


class LogOdds:
    """log(p / (1 - p)) of a probability: where nearly all outputs are bad, it still says which of them are less so.

    Args:
        scores: Gives the probabilities.
    """

    def __init__(self, scores: Scores) -> None:
        self._scores = scores
        self.version = f"log-odds of {scores.version}"

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """In nats, between -14 and 14."""
        found = np.clip(self._scores.score(inputs), _SMALLEST, 1 - _SMALLEST)
        return [float(value) for value in np.log(found / (1 - found))]


def rows_of(rows: Sequence[Labelled]) -> list[RewardInput]:
    """The outputs without their labels."""
    return [row.item for row in rows]


def mean_target(rows: Sequence[Labelled]) -> float:
    """The mean label, which is what an output is worth of which nothing is known."""
    return float(np.mean([row.target for row in rows]))


def quality(scores: Sequence[float], rows: Sequence[Labelled], *, threshold: float = 0.5) -> dict[str, float]:
    """Accuracy at `threshold` and area under the ROC curve on rows not learned from; targets are cut at 0.5."""
    from sklearn.metrics import roc_auc_score

    is_good = np.array([row.target for row in rows]) > 0.5
    found = np.asarray(scores)
    return {
        "accuracy": float(((found > threshold) == is_good).mean()),
        "auc": float(roc_auc_score(is_good, found)),
        "share_good": float(is_good.mean()),
        "rows": float(len(rows)),
    }


def _fit(model: Any, features: Any, rows: Sequence[Labelled]) -> None:
    """Fit on each row twice, as good with the weight of its target and as bad with the rest."""
    targets = np.array([row.target for row in rows])
    stack: Any = sparse.vstack if sparse.issparse(features) else np.vstack
    twice = stack([features, features])
    labels = np.repeat([1, 0], len(rows))
    weights = np.concatenate([targets, 1.0 - targets])
    used = weights > 0
    model.fit(
        twice.tocsr()[used] if sparse.issparse(features) else twice[used], labels[used], sample_weight=weights[used]
    )


def _probabilities(model: Any, features: Any) -> list[float]:
    return [float(p) for p in model.predict_proba(features)[:, list(model.classes_).index(1)]]


def _numbers(view: View, items: Sequence[RewardInput]) -> Floats:
    if view.numbers is None:
        raise ValueError("this view has no numbers")
    return np.array([view.numbers(item) for item in items], dtype=np.float64)


def _version(kind: str, rows: Sequence[Labelled]) -> str:
    digest = hashlib.sha256(kind.encode())
    for row in rows:
        digest.update(f"{row.item.prompt}\0{row.item.output}\0{row.target}\0".encode())
    return digest.hexdigest()[:12]
