"""What a tenant has for itself: how long it keeps what has ended, and how far its recoveries are paced."""

from alembic import op

revision = "c0002"
down_revision = "c0001"


def upgrade() -> None:
    # Null is the setting of the app. Seconds, 0 is for ever, as there.
    op.execute(
        """
        ALTER TABLE tenants
            ADD COLUMN retain_succeeded double precision CHECK (retain_succeeded >= 0),
            ADD COLUMN retain_failed double precision CHECK (retain_failed >= 0),
            ADD COLUMN recovery_paced_until timestamptz
        """
    )
