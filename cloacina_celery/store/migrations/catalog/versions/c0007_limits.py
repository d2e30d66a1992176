"""A tenant's limits: how many tasks at once, how many starts a second, or none while it is paused."""

from alembic import op

revision = "c0007"
down_revision = "c0006"
works_from = "c0005"


def upgrade() -> None:
    op.execute(
        """
        ALTER TABLE tenants
            ADD COLUMN max_concurrent_tasks integer CHECK (max_concurrent_tasks > 0),
            ADD COLUMN max_rate double precision CHECK (max_rate > 0),
            ADD COLUMN is_paused boolean NOT NULL DEFAULT false,
            ADD COLUMN limits_changed_at timestamptz NOT NULL DEFAULT now()
        """
    )
    # Workers ask for what has changed lately, each second or so.
    op.execute("CREATE INDEX tenants_limits_changed ON tenants (limits_changed_at)")
