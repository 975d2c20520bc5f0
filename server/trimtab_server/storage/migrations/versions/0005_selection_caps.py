"""Measured caps for best-of-N."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "selection_caps",
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("proxy", sa.Text(), nullable=False),
        sa.Column("gold", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("cap", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_selection_caps"),
    )


def downgrade() -> None:
    """Undo."""
    op.drop_table("selection_caps")
