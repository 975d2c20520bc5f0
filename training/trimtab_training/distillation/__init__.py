"""Students that stand in for a base model: sampled from it, trained, and measured against it."""
