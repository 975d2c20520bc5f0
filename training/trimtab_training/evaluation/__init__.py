"""`trimtab evaluate`: inference-time win rates, KL and calibrated rewards of policies behind a running gateway."""
