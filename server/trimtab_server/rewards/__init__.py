"""Reward models and their registry."""
