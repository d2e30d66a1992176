"""Which tenants may have work: the sweeps look at these, and at the others now and then."""

from alembic import op

revision = "c0003"
down_revision = "c0002"


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE busy (
            tenant    text COLLATE "C" PRIMARY KEY,
            marked_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
    op.execute("INSERT INTO busy (tenant) SELECT name FROM tenants")
