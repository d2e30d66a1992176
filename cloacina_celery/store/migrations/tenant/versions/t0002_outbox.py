"""The outbox: messages of plain tasks that are to follow a durable one's settlement, kept until they are sent."""

from alembic import op

revision = "t0002"
down_revision = "t0001"
works_from = "t0001"


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE cloacina_outbox (
            id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            task       text NOT NULL,
            message    text NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
