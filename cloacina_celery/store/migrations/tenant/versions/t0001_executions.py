"""A tenant's executions, their events, and the chords that wait for them.

The names carry a prefix because a tenant's own tables share the schema, and in ``public`` somebody else's do.
"""

from alembic import op

revision = "t0001"
down_revision = None


def upgrade() -> None:
    # fillfactor leaves room on the page for the two updates that every row sees.
    op.execute(
        """
        CREATE TABLE cloacina_executions (
            id               text COLLATE "C" PRIMARY KEY,
            task             text NOT NULL,
            state            text NOT NULL DEFAULT 'pending' CHECK (
                state IN ('pending', 'running', 'succeeded', 'failed', 'abandoned', 'cancelled')),
            attempt          integer NOT NULL DEFAULT 0,
            failures         integer NOT NULL DEFAULT 0,
            recoveries       integer NOT NULL DEFAULT 0,
            releases         integer NOT NULL DEFAULT 0,
            max_recoveries   integer NOT NULL,
            policy           text,
            message          text NOT NULL,
            group_id         text COLLATE "C",
            group_index      integer,
            worker_id        bigint,
            lease_expires_at timestamptz,
            submitted_at     timestamptz NOT NULL DEFAULT now(),
            run_at           timestamptz NOT NULL DEFAULT now(),
            rung_at          timestamptz,
            started_at       timestamptz,
            settled_at       timestamptz,
            result           text,
            error            text,
            CHECK ((state = 'running') = (lease_expires_at IS NOT NULL))
        ) WITH (fillfactor = 70)
        """
    )
    # Rows that nobody has rung for yet: delayed, waiting for their retry, or refused by the broker.
    op.execute(
        "CREATE INDEX cloacina_executions_due ON cloacina_executions (run_at) "
        "WHERE state = 'pending' AND rung_at IS NULL"
    )
    op.execute(
        "CREATE INDEX cloacina_executions_rung ON cloacina_executions (rung_at) "
        "WHERE state = 'pending' AND rung_at IS NOT NULL"
    )
    op.execute(
        "CREATE INDEX cloacina_executions_lease ON cloacina_executions (lease_expires_at) WHERE state = 'running'"
    )
    op.execute(
        "CREATE INDEX cloacina_executions_settled ON cloacina_executions (settled_at) WHERE settled_at IS NOT NULL"
    )
    op.execute(
        "CREATE INDEX cloacina_executions_group ON cloacina_executions (group_id) WHERE group_id IS NOT NULL"
    )
    op.execute(
        """
        CREATE TABLE cloacina_events (
            id           bigint GENERATED ALWAYS AS IDENTITY,
            execution_id text COLLATE "C" NOT NULL,
            at           timestamptz NOT NULL DEFAULT clock_timestamp(),
            kind         text NOT NULL,
            attempt      integer NOT NULL,
            worker_id    bigint,
            reason       text,
            error        text
        )
        """
    )
    op.execute("CREATE INDEX cloacina_events_of ON cloacina_events (execution_id, id)")
    op.execute(
        """
        CREATE TABLE cloacina_chords (
            group_id     text COLLATE "C" PRIMARY KEY,
            size         integer NOT NULL,
            created_at   timestamptz NOT NULL DEFAULT now(),
            completed_at timestamptz
        )
        """
    )
