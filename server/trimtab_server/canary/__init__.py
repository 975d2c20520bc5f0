"""A new version on a share of a route's requests, judged by its answers, and then promoted or rolled back."""
