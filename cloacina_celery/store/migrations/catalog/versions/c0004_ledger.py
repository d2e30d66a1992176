"""The ledger: at which revision each tenant's schema is, so that finding nothing to do is one query."""

from alembic import op

revision = "c0004"
down_revision = "c0003"


def upgrade() -> None:
    # Null is not known yet: the next migration looks, and enters what it finds.
    op.execute("ALTER TABLE tenants ADD COLUMN revision text")
