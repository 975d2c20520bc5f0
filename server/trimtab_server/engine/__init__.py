"""Engines behind one Protocol: vLLM over HTTP and a shipped fake."""
