"""What one application consists of, handed in from outside; `app.create_app` only puts it together."""

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter

from trimtab_server.decoding.abandoned_records import AbandonedRecords
from trimtab_server.decoding.explanations import Explainer
from trimtab_server.decoding.generation import CapWarnings, Generator
from trimtab_server.decoding.guidance import GuidanceResolver
from trimtab_server.decoding.scoring import Scoring
from trimtab_server.decoding.token_texts import TokenTexts
from trimtab_server.engine.base import Engine
from trimtab_server.engine.residency import Residency
from trimtab_server.metrics import Metrics, RequestObserver
from trimtab_server.settings import Settings
from trimtab_server.storage.base import Catalog, RolloutLog


@dataclass(slots=True)
class GatewayParts:
    """The parts of a gateway.

    Attributes:
        settings: Read once, at start.
        engine: Where candidates are generated.
        residency: Holds adapter versions in the engine.
        catalog: Adapters and routes.
        rollout_log: Where rollouts go.
        scoring: Scores candidates.
        caps: Knows beyond how many candidates a reward was found to mislead; None where nothing is known.
        canaries: Told what comes of requests; None where nobody watches.
        metrics: This application's own.
        routers: More routes, such as the admin API.
        background: Run from start to stop, such as the engine's supervisor and `residency.keep_converged`.
        on_stop: Awaited in order when the application stops, after the background tasks.
        guidance: Tokenises negative prompts.
        token_texts: Texts of the tokens in explanations.
        abandoned: Records that nobody will ask for.
    """

    settings: Settings
    engine: Engine
    residency: Residency
    catalog: Catalog
    rollout_log: RolloutLog
    scoring: Scoring
    caps: CapWarnings | None = None
    canaries: RequestObserver | None = None
    metrics: Metrics = field(default_factory=Metrics)
    routers: Sequence[APIRouter] = ()
    background: Sequence[Callable[[], Coroutine[Any, Any, None]]] = ()
    on_stop: Sequence[Callable[[], Coroutine[Any, Any, None]]] = ()
    guidance: GuidanceResolver = field(init=False)
    token_texts: TokenTexts = field(init=False)
    abandoned: AbandonedRecords = field(init=False)

    def __post_init__(self) -> None:
        """Parts that only depend on the others."""
        self.guidance = GuidanceResolver(self.engine, self.residency)
        self.token_texts = TokenTexts(self.engine)
        self.abandoned = AbandonedRecords(self.engine)
        self.metrics.watch_engine(lambda: self.residency.last_status)

    def generator(self) -> Generator:
        """The request path over these parts."""
        explainer = Explainer(self.engine, self.token_texts)
        return Generator(
            self.engine,
            self.residency,
            self.scoring,
            self.rollout_log,
            self.settings.rollouts,
            explainer,
            self.abandoned,
            self.caps,
        )
