"""The seeded demonstration: a small world, small LMs and the closed loop."""
