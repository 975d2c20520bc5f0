"""HTTP routes; knows HTTP and no engine internals."""
