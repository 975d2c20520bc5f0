"""Over-optimisation: whether choosing among more candidates by one reward still helps another."""
