"""Fitting calibrators offline and telling how good they are."""
