"""When each worker last swept its tenants: its heartbeat goes on while its sweeps hang."""

from alembic import op

revision = "c0011"
down_revision = "c0010"
works_from = "c0008"


def upgrade() -> None:
    op.execute("ALTER TABLE workers ADD COLUMN swept_at timestamptz")
