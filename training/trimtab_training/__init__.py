"""The sidecar trainer: from logged rollouts to a published adapter version."""
