"""From a request to candidates to choices; no HTTP, no SQL."""
