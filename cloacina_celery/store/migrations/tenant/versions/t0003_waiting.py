"""Rows that wait for room within their tenant's limits, and how far its starts are paid for."""

from alembic import op

revision = "t0003"
down_revision = "t0002"
works_from = "t0001"


def upgrade() -> None:
    op.execute(
        "CREATE INDEX cloacina_executions_waiting ON cloacina_executions (run_at, id) "
        "WHERE state = 'pending' AND rung_at = 'infinity'"
    )
    # One row, and only where there is a rate: each start moves the instant on.
    op.execute(
        """
        CREATE TABLE cloacina_pace (
            is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
            full_at timestamptz NOT NULL
        )
        """
    )
