"""How often in a row the workers of a training job were lost, and how far it had got."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("training_jobs", sa.Column("num_lost", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("training_jobs", sa.Column("lost_at_step", sa.Double(), nullable=True))


def downgrade() -> None:
    """Undo."""
    with op.batch_alter_table("training_jobs") as batch:
        batch.drop_column("lost_at_step")
        batch.drop_column("num_lost")
