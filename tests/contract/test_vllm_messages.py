"""Words of vLLM's that the gateway goes by."""

import pytest

from trimtab_server.engine.vllm_http import DEAD_ENGINE


def test_vllm_says_that_its_engine_died_in_the_words_we_know() -> None:
    exceptions = pytest.importorskip("vllm.v1.engine.exceptions", reason="vLLM is not installed")
    assert str(exceptions.EngineDeadError()).startswith(DEAD_ENGINE)
