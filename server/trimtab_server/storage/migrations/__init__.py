"""The history of the schema, as Alembic scripts. Each is written once and never changed after a release."""
