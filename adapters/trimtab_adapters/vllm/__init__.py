"""Everything that depends on vLLM. Written for and tested with vLLM 0.32.0."""
