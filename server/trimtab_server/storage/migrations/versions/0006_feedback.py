"""Feedback, choices that can be named, and rewards of rollouts to filter by."""

import json
import math
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_BATCH = 1000


def upgrade() -> None:
    """Apply. Which choice of its answer an earlier rollout was is not known, so there can be no feedback on it."""
    op.create_table(
        "rollout_rewards",
        sa.Column("rollout_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("raw", sa.Double(), nullable=True),
        sa.Column("calibrated", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["rollout_id"], ["rollouts.id"], name="fk_rollout_rewards_rollout_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("rollout_id", "position", name="pk_rollout_rewards"),
    )
    op.create_table(
        "feedback",
        sa.Column("rollout_id", sa.Text(), nullable=False),
        sa.Column("rater", sa.Text(), nullable=False),
        sa.Column("rating", sa.Double(), nullable=True),
        sa.Column("comment", sa.Text(), nullable=True),
        sa.Column("preferred_index", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["rollout_id"], ["rollouts.id"], name="fk_feedback_rollout_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("rollout_id", "rater", name="pk_feedback"),
    )
    op.add_column("rollouts", sa.Column("choice_index", sa.Integer(), nullable=True))
    op.add_column("rollouts", sa.Column("x_request_id", sa.String(length=128), nullable=True))
    _fill()
    # After the rows, which is faster.
    op.create_index("ix_rollouts_x_request_id", "rollouts", ["x_request_id"], unique=False)
    op.create_index("ix_rollout_rewards_name_raw", "rollout_rewards", ["name", "raw"], unique=False)
    op.create_index("ix_rollout_rewards_name_calibrated", "rollout_rewards", ["name", "calibrated"], unique=False)


def downgrade() -> None:
    """Undo; feedback is forgotten."""
    op.drop_index("ix_rollouts_x_request_id", "rollouts")
    op.drop_column("rollouts", "x_request_id")
    op.drop_column("rollouts", "choice_index")
    op.drop_table("feedback")
    op.drop_table("rollout_rewards")


def _fill() -> None:
    """Take rewards and request ids out of the JSON of the rollouts that are there, some at a time."""
    connection = op.get_bind()
    columns: list[sa.ColumnClause[Any]] = [sa.column(name) for name in ("id", "rewards", "metadata")]
    rollouts = sa.table("rollouts", *columns, sa.column("x_request_id"))
    names = ("rollout_id", "position", "name", "raw", "calibrated")
    rollout_rewards = sa.table("rollout_rewards", *(sa.column(name) for name in names))
    statement = sa.select(*columns).order_by(rollouts.c.id).limit(_BATCH)
    batch = connection.execute(statement).all()
    while batch:
        rows = [row for rollout_id, rewards, _ in batch for row in _reward_rows(rollout_id, json.loads(rewards))]
        if rows:
            connection.execute(sa.insert(rollout_rewards), rows)
        for rollout_id, _, metadata in batch:
            caller_id = json.loads(metadata).get("x_request_id")
            if caller_id is not None:
                where = rollouts.c.id == rollout_id
                connection.execute(sa.update(rollouts).where(where).values(x_request_id=caller_id))
        batch = connection.execute(statement.where(rollouts.c.id > batch[-1].id)).all()


def _reward_rows(rollout_id: str, rewards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "rollout_id": rollout_id,
            "position": position,
            "name": reward["name"],
            "raw": None if math.isnan(reward["raw"]) else reward["raw"],
            "calibrated": reward.get("calibrated"),
        }
        for position, reward in enumerate(rewards)
    ]
