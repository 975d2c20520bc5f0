"""The version that a share of a route's requests tries. Older revisions have none."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("route_revisions", sa.Column("canary", sa.Text(), nullable=True))


def downgrade() -> None:
    """Undo."""
    op.drop_column("route_revisions", "canary")
