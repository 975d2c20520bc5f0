"""Versions that an admin keeps in the engine's memory."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("adapter_versions", sa.Column("pinned_at", sa.Double(), nullable=True))


def downgrade() -> None:
    """Undo."""
    op.drop_column("adapter_versions", "pinned_at")
