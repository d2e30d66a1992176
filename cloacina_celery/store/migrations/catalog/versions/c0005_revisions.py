"""Which code works on which revision, told by the code that migrated: older code cannot know it by itself."""

from alembic import op

revision = "c0005"
down_revision = "c0004"
works_from = "c0005"


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE revisions (
            branch     text NOT NULL CHECK (branch IN ('catalog', 'tenant')),
            revision   text NOT NULL,
            works_from text NOT NULL,
            PRIMARY KEY (branch, revision)
        )
        """
    )
