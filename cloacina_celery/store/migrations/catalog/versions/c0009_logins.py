"""Tenants' own logins: who they are, and rules by which each sees of the shared tables what is its tenant's alone."""

from alembic import op

revision = "c0009"
down_revision = "c0008"
works_from = "c0008"


def upgrade() -> None:
    # No password: Postgres keeps what it checks one with, and nobody keeps the password.
    op.execute(
        """
        CREATE TABLE logins (
            username    text COLLATE "C" PRIMARY KEY,
            tenant      text COLLATE "C" NOT NULL,
            created_at  timestamptz NOT NULL DEFAULT now(),
            created_by  text NOT NULL,
            valid_until timestamptz
        )
        """
    )
    op.execute("CREATE INDEX logins_of ON logins (tenant)")
    op.execute(
        """
        CREATE OR REPLACE FUNCTION tenant_of(asked text) RETURNS text
            LANGUAGE sql STABLE SECURITY DEFINER SET search_path = ''
            AS 'SELECT t.name FROM cloacina.tenants t WHERE t.role OPERATOR(pg_catalog.=) asked
                UNION ALL
                SELECT l.tenant FROM cloacina.logins l WHERE l.username OPERATOR(pg_catalog.=) asked'
        """
    )
    # Whoever serves nobody yet is told apart by its login.
    op.execute("ALTER TABLE workers ADD COLUMN login text NOT NULL DEFAULT session_user")
    op.execute("ALTER TABLE workers ENABLE ROW LEVEL SECURITY")
    op.execute(
        """
        CREATE POLICY a_tenant_sees_its_workers ON workers
            USING ((SELECT cloacina.tenant_of(current_user)) IS NULL
                   OR tenants <@ ARRAY[(SELECT cloacina.tenant_of(current_user))]
                      AND (tenants <> '{}' OR login = session_user))
        """
    )
    op.execute("ALTER TABLE busy ENABLE ROW LEVEL SECURITY")
    op.execute(
        """
        CREATE POLICY a_tenant_sees_its_mark ON busy
            USING (coalesce(tenant = (SELECT cloacina.tenant_of(current_user)), true))
        """
    )
