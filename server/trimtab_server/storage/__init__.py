"""The database, the rollout spool and the repositories."""
