"""Attempts, log lines and metrics of training jobs, and schedules that post them."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("training_jobs", sa.Column("attempt", sa.Integer(), nullable=False, server_default="0"))
    op.create_table(
        "training_job_lines",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("step", sa.Double(), nullable=True),
        sa.Column("content", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["training_jobs.id"], name="fk_training_job_lines_job_id_training_jobs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "kind", "attempt", "number", name="pk_training_job_lines"),
    )
    op.create_table(
        "training_schedules",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("triggers", sa.Text(), nullable=False),
        sa.Column("is_paused", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.Column("last_look", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_training_schedules"),
    )
    op.create_table(
        "training_schedule_runs",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("schedule", sa.String(64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["training_jobs.id"], name="fk_training_schedule_runs_job_id_training_jobs", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["schedule"],
            ["training_schedules.name"],
            name="fk_training_schedule_runs_schedule_training_schedules",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("job_id", name="pk_training_schedule_runs"),
    )
    op.create_index(
        "ix_training_schedule_runs_schedule_created_at", "training_schedule_runs", ["schedule", "created_at"]
    )


def downgrade() -> None:
    """Undo."""
    for table in ("training_schedule_runs", "training_schedules", "training_job_lines"):
        op.drop_table(table)
    op.drop_column("training_jobs", "attempt")
