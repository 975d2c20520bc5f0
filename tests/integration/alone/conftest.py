"""Tests that start engines of their own, collected before those that share one.

An idle vLLM engine goes on polling at full speed, so on two cores it must not be kept running beside another.
"""
