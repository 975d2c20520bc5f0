"""Runnable stages, each readable from top to bottom."""
