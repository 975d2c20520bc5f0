"""Makes adapter LMs fail while they read a prompt ahead, where nothing but their blocks shows it."""

from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from trimtab_adapters import adapter_passes
from trimtab_adapters.adapter_lm import AdapterLM
from trimtab_adapters.adapter_passes import AdapterPasses


@dataclass
class ForwardFault:
    """Makes the next forward pass that reads ahead raise. Its keys and values are not written then."""

    is_due: bool = False
    is_reading_ahead: bool = False
    num_raised: int = 0
    num_logged: int = 0

    def check(self) -> None:
        if self.is_due and self.is_reading_ahead:
            self.is_due = False
            self.num_raised += 1
            raise RuntimeError("injected")

    def inject(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let every adapter LM ask here before it runs."""
        forward, prefill = AdapterLM.forward, AdapterPasses.prefill

        def faulty_forward(adapter: AdapterLM, *args: Any, **options: Any) -> Tensor:
            self.check()
            return forward(adapter, *args, **options)

        def count_logged(*args: object) -> None:
            self.num_logged += 1

        def watched_prefill(passes: AdapterPasses, *args: Any) -> None:
            self.is_reading_ahead = True
            prefill(passes, *args)
            self.is_reading_ahead = False

        monkeypatch.setattr(adapter_passes.logger, "exception", count_logged)  # hundreds of tracebacks say nothing
        monkeypatch.setattr(AdapterLM, "forward", faulty_forward)
        monkeypatch.setattr(AdapterPasses, "prefill", watched_prefill)
