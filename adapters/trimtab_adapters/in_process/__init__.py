"""Steering without vLLM, in the gateway's process: of a base behind somebody else's API, or of one of transformers."""
