"""One script per change, applied in the order of their `down_revision`."""
