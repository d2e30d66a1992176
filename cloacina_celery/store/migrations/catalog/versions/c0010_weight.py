"""A tenant's weight: how many turns it gets on a worker for each of a tenant of weight 1."""

from alembic import op

revision = "c0010"
down_revision = "c0009"
works_from = "c0008"


def upgrade() -> None:
    op.execute(
        "ALTER TABLE tenants ADD COLUMN weight integer NOT NULL DEFAULT 1 CHECK (weight BETWEEN 1 AND 100)"
    )
