"""What a route's steering has beside its adapters: operators and a negative prompt. Older revisions have none."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("route_revisions", sa.Column("options", sa.Text(), nullable=True))


def downgrade() -> None:
    """Undo."""
    op.drop_column("route_revisions", "options")
