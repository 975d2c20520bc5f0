"""The tables. Times are Unix seconds. Migrations must build exactly this; a test compares them.

| table | holds |
|---|---|
| `adapter_versions` | registered versions; the files are in the version store |
| `routes` | which revision of each route is current |
| `route_revisions` | every state that a route ever had; never changed, kept when a route is deleted |
| `rollouts` | one row per candidate |
| `rollout_adapters` | the terms of each rollout's steering, to filter by |
| `rollout_rewards` | the rewards of each rollout, to filter by |
| `feedback` | what people said of rollouts, one row per person |
| `rewards` | rewards registered by the admin API |
| `calibrators` | rewards of reference rollouts per prompt |
| `pooled_calibrators` | calibrators for prompts never seen |
| `selection_caps` | measured caps for best-of-N |
| `training_jobs` | the trainer's queue |
| `training_job_lines` | the newest lines of each job's log and metrics |
| `training_schedules` | when jobs are posted by themselves |
| `training_schedule_runs` | which jobs a schedule posted, and why |
| `alembic_version` | the schema's revision, kept by Alembic |
"""

from sqlalchemy import (
    Boolean,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

from trimtab_server.storage.column_types import ExactText, JsonText, PackedLists, PackedNumbers

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

adapter_versions = Table(
    "adapter_versions",
    metadata,
    Column("version", String(16), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("path", Text, nullable=False),
    Column("manifest", JsonText, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("retired_at", Double),
    Column("pinned_at", Double),
    Index(None, "name", "created_at"),
)

route_revisions = Table(
    "route_revisions",
    metadata,
    Column("route", String(64), primary_key=True),
    Column("revision", Integer, primary_key=True, autoincrement=False),
    Column("steering", JsonText, nullable=False),
    Column("best_of", Integer),
    Column("reward", String(64)),
    Column("created_at", Double, nullable=False),
    Column("comment", ExactText, nullable=False),
    Column("options", JsonText),
    Column("canary", JsonText),
)

routes = Table(
    "routes",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("revision", Integer, nullable=False),
    ForeignKeyConstraint(["name", "revision"], ["route_revisions.route", "route_revisions.revision"]),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("schema_version", Integer, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("duration_s", Double, nullable=False),
    Column("route", Text, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("endpoint", String(32), nullable=False),
    Column("prompt", ExactText),
    Column("prompt_token_ids", PackedNumbers("<i4"), nullable=False),
    Column("output_text", ExactText, nullable=False),
    Column("output_token_ids", PackedNumbers("<i4"), nullable=False),
    Column("steering", JsonText, nullable=False),
    Column("base_logprobs", PackedNumbers("<f8")),
    Column("adapter_logprobs", PackedLists),
    Column("steered_logprobs", PackedNumbers("<f8")),
    Column("kl", PackedNumbers("<f8")),
    Column("flipped", PackedNumbers("?")),
    Column("sampling", JsonText, nullable=False),
    Column("candidate_index", Integer, nullable=False),
    Column("num_candidates", Integer, nullable=False),
    Column("chosen", Boolean, nullable=False),
    Column("choice_index", Integer),
    Column("finish_reason", Text),
    Column("rewards", JsonText, nullable=False),
    Column("metadata", JsonText, nullable=False),
    # Of independent samples of a reference policy: which policy, and which prompt. Null for all others.
    Column("policy", String(64)),
    Column("prompt_key", String(64)),
    # The id that the caller gave the request, where it gave one.
    Column("x_request_id", String(128)),
    Index(None, "policy", "prompt_key", "created_at"),
    Index(None, "created_at", "id"),
    Index(None, "route", "created_at", "id"),
    Index(None, "request_id"),
    Index(None, "x_request_id"),
)

rollout_adapters = Table(
    "rollout_adapters",
    metadata,
    Column("rollout_id", Text, ForeignKey("rollouts.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("name", String(64), nullable=False),
    Column("version", String(16), nullable=False),
    Column("alpha", Double, nullable=False),
    Index(None, "name", "version"),
    Index(None, "version"),
)

rollout_rewards = Table(
    "rollout_rewards",
    metadata,
    Column("rollout_id", Text, ForeignKey("rollouts.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("name", Text, nullable=False),
    # Null where it is NaN, which no database compares as it should.
    Column("raw", Double),
    Column("calibrated", Double),
    Index(None, "name", "raw"),
    Index(None, "name", "calibrated"),
)

feedback = Table(
    "feedback",
    metadata,
    Column("rollout_id", Text, ForeignKey("rollouts.id", ondelete="CASCADE"), primary_key=True),
    # Empty for everyone who was not named.
    Column("rater", Text, primary_key=True),
    Column("rating", Double),
    Column("comment", ExactText),
    Column("preferred_index", Integer),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
)

rewards = Table(
    "rewards",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("target", Text, nullable=False),
    Column("options", JsonText, nullable=False),
    Column("updated_at", Double, nullable=False),
)

calibrators = Table(
    "calibrators",
    metadata,
    # SHA-256 of the other three, which are too long for an index in every database.
    Column("key", String(64), primary_key=True),
    Column("prompt_key", Text, nullable=False),
    Column("reward", Text, nullable=False),
    Column("reference", Text, nullable=False),
    # Rollout by rollout, `num_parts` numbers each.
    Column("scores", PackedNumbers("<f8"), nullable=False),
    Column("num_parts", Integer, nullable=False),
    Column("num_rollouts", Integer, nullable=False),
    Column("updated_at", Double, nullable=False),
    Index(None, "reward"),
)

pooled_calibrators = Table(
    "pooled_calibrators",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("reward_name", String(64), nullable=False),
    # Numbers and texts, see `PooledCalibrator.to_json`.
    Column("calibrator", JsonText, nullable=False),
    Column("report", JsonText, nullable=False),
    Column("created_at", Double, nullable=False),
    Index(None, "reward_name", "created_at"),
)

selection_caps = Table(
    "selection_caps",
    metadata,
    # SHA-256 of the next three, which are too long for an index in every database.
    Column("key", String(64), primary_key=True),
    Column("proxy", Text, nullable=False),
    Column("gold", Text, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("cap", JsonText, nullable=False),
    Column("created_at", Double, nullable=False),
)

training_jobs = Table(
    "training_jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", ExactText, nullable=False),
    Column("state", String(16), nullable=False),
    Column("config", JsonText, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("heartbeat_at", Double),
    Column("worker", Text),
    Column("progress", JsonText, nullable=False),
    Column("version", String(16)),
    Column("evaluation", JsonText, nullable=False),
    Column("error", ExactText),
    Column("attempt", Integer, nullable=False, server_default="0"),
    # Workers lost one after the other without a step beyond `lost_at_step`.
    Column("num_lost", Integer, nullable=False, server_default="0"),
    Column("lost_at_step", Double),
    Index(None, "state", "created_at"),
)

training_job_lines = Table(
    "training_job_lines",
    metadata,
    Column("job_id", String(64), ForeignKey("training_jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("kind", String(8), primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("step", Double),
    # A text, or figures by name.
    Column("content", JsonText, nullable=False),
)

training_schedules = Table(
    "training_schedules",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("config", JsonText, nullable=False),
    Column("triggers", JsonText, nullable=False),
    Column("is_paused", Boolean, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    # What the last look found; what a look needs of those before.
    Column("last_look", JsonText, nullable=False),
)

training_schedule_runs = Table(
    "training_schedule_runs",
    metadata,
    Column("job_id", String(64), ForeignKey("training_jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("schedule", String(64), ForeignKey("training_schedules.name", ondelete="CASCADE"), nullable=False),
    Column("reason", JsonText, nullable=False),
    Column("created_at", Double, nullable=False),
    Index(None, "schedule", "created_at"),
)
