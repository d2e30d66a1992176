"""Each tenant's role, and a rule by which a tenant's own session sees its own row of the catalog alone."""

from alembic import op

revision = "c0008"
down_revision = "c0007"
# Before it no session knew that it has a role to take.
works_from = "c0008"


def upgrade() -> None:
    # Null is a tenant that is kept apart by search_path alone.
    op.execute('ALTER TABLE tenants ADD COLUMN role text COLLATE "C" UNIQUE')
    # By its owner's rights, since whoever asks may not look; with a fixed path, so that nobody can give its
    # words another meaning.
    op.execute(
        """
        CREATE FUNCTION tenant_of(asked text) RETURNS text
            LANGUAGE sql STABLE SECURITY DEFINER SET search_path = ''
            AS 'SELECT t.name FROM cloacina.tenants t WHERE t.role OPERATOR(pg_catalog.=) asked'
        """
    )
    # The owner and superusers are not bound by it, and nobody but a tenant's role is narrowed by it.
    op.execute("ALTER TABLE tenants ENABLE ROW LEVEL SECURITY")
    op.execute(
        """
        CREATE POLICY a_tenant_sees_itself ON tenants
            USING (coalesce(name = (SELECT cloacina.tenant_of(current_user)), true))
        """
    )
