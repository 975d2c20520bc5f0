"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    _create_adapter_versions()
    _create_calibrators()
    _create_rewards()
    _create_rollouts()
    _create_route_revisions()
    _create_training_jobs()
    _create_rollout_adapters()
    _create_routes()


def downgrade() -> None:
    """Undo."""
    for table in (
        "routes",
        "rollout_adapters",
        "training_jobs",
        "route_revisions",
        "rollouts",
        "rewards",
        "calibrators",
        "adapter_versions",
    ):
        op.drop_table(table)


def _create_adapter_versions() -> None:
    op.create_table(
        "adapter_versions",
        sa.Column("version", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("retired_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("version"),
    )
    op.create_index("ix_adapter_versions_name_created_at", "adapter_versions", ["name", "created_at"], unique=False)


def _create_calibrators() -> None:
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


def _create_rewards() -> None:
    op.create_table(
        "rewards",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("options", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )


def _create_rollouts() -> None:
    op.create_table(
        "rollouts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("schema_version", sa.Integer(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("duration_s", sa.Double(), nullable=False),
        sa.Column("route", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("endpoint", sa.String(length=32), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=True),
        sa.Column("prompt_token_ids", sa.LargeBinary(), nullable=False),
        sa.Column("output_text", sa.Text(), nullable=False),
        sa.Column("output_token_ids", sa.LargeBinary(), nullable=False),
        sa.Column("steering", sa.Text(), nullable=False),
        sa.Column("base_logprobs", sa.LargeBinary(), nullable=True),
        sa.Column("adapter_logprobs", sa.LargeBinary(), nullable=True),
        sa.Column("steered_logprobs", sa.LargeBinary(), nullable=True),
        sa.Column("kl", sa.LargeBinary(), nullable=True),
        sa.Column("flipped", sa.LargeBinary(), nullable=True),
        sa.Column("sampling", sa.Text(), nullable=False),
        sa.Column("candidate_index", sa.Integer(), nullable=False),
        sa.Column("num_candidates", sa.Integer(), nullable=False),
        sa.Column("chosen", sa.Boolean(), nullable=False),
        sa.Column("finish_reason", sa.Text(), nullable=True),
        sa.Column("rewards", sa.Text(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_rollouts_created_at_id", "rollouts", ["created_at", "id"], unique=False)
    op.create_index("ix_rollouts_request_id", "rollouts", ["request_id"], unique=False)
    op.create_index("ix_rollouts_route_created_at_id", "rollouts", ["route", "created_at", "id"], unique=False)


def _create_route_revisions() -> None:
    op.create_table(
        "route_revisions",
        sa.Column("route", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("steering", sa.Text(), nullable=False),
        sa.Column("best_of", sa.Integer(), nullable=True),
        sa.Column("reward", sa.String(length=64), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("route", "revision"),
    )


def _create_training_jobs() -> None:
    op.create_table(
        "training_jobs",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.Column("heartbeat_at", sa.Double(), nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("progress", sa.Text(), nullable=False),
        sa.Column("version", sa.String(length=16), nullable=True),
        sa.Column("evaluation", sa.Text(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_training_jobs_state_created_at", "training_jobs", ["state", "created_at"], unique=False)


def _create_rollout_adapters() -> None:
    op.create_table(
        "rollout_adapters",
        sa.Column("rollout_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("version", sa.String(length=16), nullable=False),
        sa.Column("alpha", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["rollout_id"], ["rollouts.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("rollout_id", "position"),
    )
    op.create_index("ix_rollout_adapters_name_version", "rollout_adapters", ["name", "version"], unique=False)
    op.create_index("ix_rollout_adapters_version", "rollout_adapters", ["version"], unique=False)


def _create_routes() -> None:
    op.create_table(
        "routes",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["name", "revision"], ["route_revisions.route", "route_revisions.revision"]),
        sa.PrimaryKeyConstraint("name"),
    )
