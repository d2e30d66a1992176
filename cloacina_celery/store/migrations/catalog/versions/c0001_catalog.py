"""The catalog: tenants and workers."""

from alembic import op

revision = "c0001"
down_revision = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE tenants (
            name       text COLLATE "C" PRIMARY KEY,
            is_legacy  boolean NOT NULL DEFAULT false,
            created_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
    # Postgres keeps "Acme" and "acme" apart; people, brokers and file systems do not.
    op.execute("CREATE UNIQUE INDEX tenants_name_folded ON tenants (lower(name))")
    op.execute(
        """
        CREATE TABLE workers (
            id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            name         text NOT NULL,
            tenants      text[] NOT NULL,
            has_lock     boolean NOT NULL,
            reserved     jsonb NOT NULL DEFAULT '{}',
            started_at   timestamptz NOT NULL DEFAULT now(),
            heartbeat_at timestamptz NOT NULL DEFAULT now(),
            stopped_at   timestamptz,
            end_reason   text
        )
        """
    )
    op.execute("CREATE INDEX workers_alive ON workers (id) WHERE stopped_at IS NULL")
