"""Calibrators of several rewards and of prompts never seen, and samples of reference policies found in the log."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply.

    Calibrators of before are forgotten, since what they hold for was only kept as a hash; they are drawn anew.
    Rollouts of before are not looked at as samples of a reference policy.
    """
    op.drop_table("calibrators")
    op.create_table(
        "calibrators",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("prompt_key", sa.Text(), nullable=False),
        sa.Column("reward", sa.Text(), nullable=False),
        sa.Column("reference", sa.Text(), nullable=False),
        sa.Column("scores", sa.LargeBinary(), nullable=False),
        sa.Column("num_parts", sa.Integer(), nullable=False),
        sa.Column("num_rollouts", sa.Integer(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_index("ix_calibrators_reward", "calibrators", ["reward"], unique=False)
    op.create_table(
        "pooled_calibrators",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("reward_name", sa.String(length=64), nullable=False),
        sa.Column("calibrator", sa.Text(), nullable=False),
        sa.Column("report", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "ix_pooled_calibrators_reward_name_created_at",
        "pooled_calibrators",
        ["reward_name", "created_at"],
        unique=False,
    )
    op.add_column("rollouts", sa.Column("policy", sa.String(length=64), nullable=True))
    op.add_column("rollouts", sa.Column("prompt_key", sa.String(length=64), nullable=True))
    op.create_index(
        "ix_rollouts_policy_prompt_key_created_at", "rollouts", ["policy", "prompt_key", "created_at"], unique=False
    )


def downgrade() -> None:
    """Undo; calibrators are forgotten."""
    op.drop_index("ix_rollouts_policy_prompt_key_created_at", "rollouts")
    op.drop_column("rollouts", "prompt_key")
    op.drop_column("rollouts", "policy")
    op.drop_table("pooled_calibrators")
    op.drop_table("calibrators")
    op.create_table(
        "calibrators",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("prompt_key", sa.Text(), nullable=False),
        sa.Column("reward", sa.Text(), nullable=False),
        sa.Column("reference", sa.Text(), nullable=False),
        sa.Column("scores", sa.LargeBinary(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
