"""A tenant's state, its epoch, and the audit of what operators did to tenants."""

from alembic import op

revision = "c0006"
down_revision = "c0005"
works_from = "c0005"


def upgrade() -> None:
    op.execute(
        """
        ALTER TABLE tenants
            ADD COLUMN state text NOT NULL DEFAULT 'active'
                CHECK (state IN ('active', 'suspended', 'draining', 'removed')),
            ADD COLUMN refuses_submits boolean NOT NULL DEFAULT false,
            ADD COLUMN epoch integer NOT NULL DEFAULT 1,
            ADD COLUMN unfinished text,
            ADD COLUMN moved_to text COLLATE "C",
            ADD COLUMN key_space text COLLATE "C",
            ADD COLUMN changed_at timestamptz NOT NULL DEFAULT now(),
            ADD COLUMN changed_by text
        """
    )
    op.execute(
        """
        CREATE TABLE audit (
            id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            tenant        text COLLATE "C" NOT NULL,
            epoch         integer,
            at            timestamptz NOT NULL DEFAULT clock_timestamp(),
            verb          text NOT NULL,
            step          text NOT NULL,
            database_user text NOT NULL DEFAULT session_user,
            operator      text NOT NULL,
            detail        text
        )
        """
    )
    op.execute("CREATE INDEX audit_of ON audit (tenant, id)")
    # An audit that can be changed proves nothing. The owner can still drop the trigger, and is seen doing so.
    op.execute(
        """
        CREATE FUNCTION refuse_to_change_audit() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'cloacina.audit is append-only' USING ERRCODE = 'insufficient_privilege';
        END $$
        """
    )
    op.execute(
        """
        CREATE TRIGGER audit_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
            FOR EACH STATEMENT EXECUTE FUNCTION refuse_to_change_audit()
        """
    )
