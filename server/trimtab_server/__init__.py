"""The gateway: OpenAI-compatible API, routes, best-of-N, rollout log and admin API."""
