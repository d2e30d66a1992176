"""The attacks: one function each, which tells whether it got through, and what docs/isolation.md says of it.

The document's table is compared with this list, and each cell of it is a test, the stopped ones and the others.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloacina_celery.errors import ExecutionNotFound
from cloacina_celery.store import executions, queries, recovery, ringing, workers
from tests.isolation.stages import ATTACKER, SECRET, VICTIM, VICTIMS_EXECUTION
from tests.store.rows import submission

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.isolation.stages import Stage

STOPPED, OPEN = "stopped", "open"

READ = f"SELECT secret FROM {VICTIM}.secrets"
ROWS = f"SELECT message FROM {VICTIM}.cloacina_executions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One attack: what a hostile task does, and what each level makes of it."""

    name: str
    schema: str
    role: str
    login: str
    gets_through: Callable[[Stage], bool]

    def verdict(self, level: str) -> str:
        """Return what the documents say of it at a level."""
        return {"schema": self.schema, "role": self.role, "login": self.login}[level]


ATTACKS: list[Attack] = []


def attack(
    name: str, *, schema: str, role: str, login: str = STOPPED
) -> Callable[[Callable[[Stage], bool]], Callable[[Stage], bool]]:
    """Enter a function as an attack."""

    def enter(function: Callable[[Stage], bool]) -> Callable[[Stage], bool]:
        ATTACKS.append(Attack(name=name, schema=schema, role=role, login=login, gets_through=function))
        return function

    return enter


# --- reaching for another tenant's schema ---


@attack("Reading another tenant's table by its qualified name", schema=OPEN, role=STOPPED)
def _(stage: Stage) -> bool:
    return stage.reads_secret(READ)


@attack("Writing to it", schema=OPEN, role=STOPPED)
def _(stage: Stage) -> bool:
    return stage.gets_through(f"UPDATE {VICTIM}.secrets SET secret = secret")


@attack("Settling or deleting another tenant's execution", schema=OPEN, role=STOPPED)
def _(stage: Stage) -> bool:
    return any(
        stage.gets_through(statement)
        for statement in (
            f"UPDATE {VICTIM}.cloacina_executions SET result = '1'",
            f"DELETE FROM {VICTIM}.cloacina_executions WHERE id = 'none'",
            f"INSERT INTO {VICTIM}.cloacina_events (execution_id, kind, attempt) VALUES ('x', 'forged', 0)",
        )
    )


@attack("`SET search_path`, then plain names", schema=OPEN, role=STOPPED)
def _(stage: Stage) -> bool:
    return any(
        stage.reads_secret(f"SET {scope} search_path = {VICTIM}", "SELECT secret FROM secrets")
        for scope in ("LOCAL", "SESSION")
    )


@attack("Dropping or renaming another tenant's schema, or creating in it", schema=OPEN, role=STOPPED)
def _(stage: Stage) -> bool:
    return any(
        stage.gets_through(statement)
        for statement in (
            f"CREATE FUNCTION {VICTIM}.planted() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            f"DROP SCHEMA {VICTIM} CASCADE",
            f"ALTER SCHEMA {VICTIM} RENAME TO tenant_mine",
        )
    )


@attack("Reading another tenant's large object", schema=OPEN, role=STOPPED)
def _(stage: Stage) -> bool:
    with stage.session(VICTIM) as run:
        ((oid,),) = run("SELECT lo_from_bytea(0, convert_to(:secret, 'UTF8'))", secret=SECRET)
    return stage.reads_secret(f"SELECT convert_from(lo_get({oid}), 'UTF8')")


@attack("Reading other tenants' queries in `pg_stat_activity`", schema=OPEN, role=STOPPED)
def _(stage: Stage) -> bool:
    with stage.session(VICTIM) as run:
        run("SELECT 'a query with a secret in it'")
        with stage.session() as attacker:
            seen = attacker("SELECT query FROM pg_stat_activity WHERE datname = current_database()")
    return any("a query with a secret in it" in (query or "") for (query,) in seen)


# --- becoming somebody else ---


@attack("`RESET ROLE`, then another tenant's tables", schema=OPEN, role=STOPPED)
def _(stage: Stage) -> bool:
    return any(
        stage.reads_secret(reset, READ) for reset in ("RESET ROLE", "SET ROLE NONE", "SET LOCAL ROLE NONE")
    )


@attack("`RESET ROLE`, then another tenant's executions", schema=OPEN, role=OPEN)
def _(stage: Stage) -> bool:
    return stage.gets_through("RESET ROLE", ROWS)


@attack("`SET ROLE` to another tenant's role", schema=OPEN, role=OPEN)
def _(stage: Stage) -> bool:
    return stage.reads_secret(
        f"SET LOCAL ROLE {stage.role(VICTIM) if stage.level != 'schema' else 'NONE'}", READ
    )


@attack("`SET SESSION AUTHORIZATION`, or a superuser's role", schema=STOPPED, role=STOPPED)
def _(stage: Stage) -> bool:
    ((superuser,),) = stage.look("SELECT current_user")
    return any(
        stage.gets_through(f'{statement} "{superuser}"')
        for statement in ("SET SESSION AUTHORIZATION", "SET ROLE")
    )


# --- leaving something behind for somebody else to step on (CVE-2018-1058) ---


@attack("A function planted in `public` for another tenant's call", schema=STOPPED, role=STOPPED)
def _(stage: Stage) -> bool:
    stage.look("GRANT CREATE, USAGE ON SCHEMA public TO PUBLIC")  # as it is before Postgres 15
    with stage.session() as run:
        run(
            "CREATE OR REPLACE FUNCTION public.lower(varchar) RETURNS text LANGUAGE sql AS $$ SELECT 'caught'::text $$"
        )
    with stage.session(VICTIM) as run:
        return run("SELECT lower('X'::varchar)") == [("caught",)]


@attack("An operator planted in its own schema for our statements on its rows", schema=STOPPED, role=STOPPED)
def _(stage: Stage) -> bool:
    with stage.session() as run:
        run("CREATE SEQUENCE IF NOT EXISTS caught")
        run(
            "CREATE OR REPLACE FUNCTION caught(timestamptz, timestamptz) RETURNS boolean LANGUAGE sql"
            f" AS $$ SELECT nextval('{ATTACKER}.caught') > 0 $$"
        )
        if not run("SELECT 1 FROM pg_operator WHERE oprnamespace = current_schema()::regnamespace"):
            run("CREATE OPERATOR < (LEFTARG = timestamptz, RIGHTARG = timestamptz, FUNCTION = caught)")
            run("CREATE OPERATOR <= (LEFTARG = timestamptz, RIGHTARG = timestamptz, FUNCTION = caught)")
    _touch_as_the_reaper(stage)
    return stage.look(f"SELECT is_called FROM {ATTACKER}.caught") == [(True,)]


@attack(
    "A trigger, rule or policy on our tables of its schema, for the reaper to run", schema=OPEN, role=STOPPED
)
def _(stage: Stage) -> bool:
    with stage.session() as run:
        run(
            "CREATE OR REPLACE FUNCTION trap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$"
        )
    return any(
        stage.gets_through(statement)
        for statement in (
            "CREATE TRIGGER trap BEFORE UPDATE ON cloacina_executions FOR EACH ROW EXECUTE FUNCTION trap()",
            "CREATE RULE trap AS ON INSERT TO cloacina_events DO ALSO SELECT 1",
            "ALTER TABLE cloacina_chords ENABLE ROW LEVEL SECURITY",
            "CREATE INDEX ON cloacina_executions ((length(message)))",
        )
    )


@attack("Another table or view in the place of ours", schema=OPEN, role=STOPPED)
def _(stage: Stage) -> bool:
    return any(
        stage.gets_through(statement)
        for statement in (
            "ALTER TABLE cloacina_outbox RENAME TO mine",
            "DROP TABLE cloacina_outbox",
            f"ALTER SCHEMA {ATTACKER} RENAME TO tenant_other",
        )
    )


@attack("A temporary table in the place of ours, or of the next tenant's", schema=STOPPED, role=STOPPED)
def _(stage: Stage) -> bool:
    with stage.session() as run:
        ((mine,),) = run("SELECT pg_backend_pid()")
        for name in ("secrets", "cloacina_executions"):
            run(f"CREATE TEMP TABLE {name} (secret text, id text)")
        run("CREATE TEMP TABLE caught (secret text)")
        run("INSERT INTO pg_temp.secrets VALUES ('caught')")
    # A login of its own has connections of its own.
    shadowed = stage.level != "login" and _shadows_the_next(stage, mine)
    with stage.database.statement() as cursor:
        found = queries.get(cursor, VICTIM, VICTIMS_EXECUTION)
    return shadowed or found is None


# --- reaching for the server ---


@attack("`COPY ... TO PROGRAM`, `pg_read_file`, server-side `lo_import`", schema=STOPPED, role=STOPPED)
def _(stage: Stage) -> bool:
    return any(
        stage.gets_through(statement)
        for statement in (
            "COPY (SELECT 1) TO PROGRAM 'cat > /dev/null'",
            "SELECT pg_read_file('PG_VERSION')",
            "SELECT lo_import('/etc/hostname')",
        )
    )


@attack("Ending or cancelling another tenant's connection", schema=OPEN, role=STOPPED)
def _(stage: Stage) -> bool:
    with stage.session(VICTIM) as run:
        ((pid,),) = run("SELECT pg_backend_pid()")
        return stage.gets_through(f"SELECT pg_cancel_backend({pid})")


# --- reaching for what all tenants share ---


@attack("Reading other tenants' rows of the catalog, or the workers' register", schema=OPEN, role=STOPPED)
def _(stage: Stage) -> bool:
    with stage.session() as run:
        names = run("SELECT name FROM cloacina.tenants")
    return names != [(ATTACKER,)] or stage.gets_through("SELECT * FROM cloacina.workers")


@attack("Changing the catalog", schema=OPEN, role=STOPPED)
def _(stage: Stage) -> bool:
    return any(
        stage.gets_through(statement)
        for statement in (
            "UPDATE cloacina.tenants SET retain_failed = retain_failed",
            "INSERT INTO cloacina.workers (name, tenants, has_lock) VALUES ('forged', '{}', true)",
            "CREATE FUNCTION cloacina.planted() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        )
    )


@attack("`RESET ROLE`, then other tenants' workers, marks or settings", schema=OPEN, role=OPEN)
def _(stage: Stage) -> bool:
    with stage.database.statement() as cursor:
        worker_id = workers.register(cursor, name="victims", tenants=[VICTIM])
    reset = "RESET ROLE"
    touched = any(
        stage.finds(reset, statement)
        for statement in (
            f"SELECT 1 FROM cloacina.workers WHERE '{VICTIM}' = ANY (tenants)",
            f"UPDATE cloacina.workers SET heartbeat_at = '-infinity' WHERE '{VICTIM}' = ANY (tenants) RETURNING 1",
            f"INSERT INTO cloacina.workers (name, tenants, has_lock) VALUES ('x', '{{{VICTIM}}}', true) RETURNING 1",
            f"UPDATE cloacina.tenants SET recovery_paced_until = 'infinity' WHERE name = '{VICTIM}' RETURNING 1",
            "UPDATE cloacina.tenants SET state = 'active' RETURNING 1",
            f"DELETE FROM cloacina.busy WHERE tenant = '{VICTIM}' RETURNING 1",
            "SELECT 1 FROM cloacina.logins",
            "SELECT 1 FROM cloacina.audit",
        )
    )
    stage.look(f"DELETE FROM cloacina.workers WHERE id = {worker_id}")
    return touched


@attack("Holding a dead worker's liveness lock, so that it looks alive", schema=OPEN, role=OPEN, login=OPEN)
def _(stage: Stage) -> bool:
    with stage.database.statement() as cursor:
        worker_id = workers.register(cursor, name="dead", tenants=[VICTIM])
    stage.look(
        f"UPDATE cloacina.workers SET has_lock = true, heartbeat_at = '-infinity' WHERE id = {worker_id}"
    )
    with stage.session() as run, stage.database.statement() as cursor:
        assert run(f"SELECT pg_try_advisory_lock({workers.LOCK_CLASS}, {worker_id})") == [(True,)]
        looks_alive = worker_id not in [w.worker_id for w in workers.look(cursor, grace=1, lease_ttl=1).dead]
        # Late, not lost: the lease of what it ran is out all the same.
        executions.submit(cursor, VICTIM, submission(execution_id="held"))
        executions.claim(cursor, VICTIM, "held", attempt=1, worker_id=worker_id, lease_ttl=-1.0, policy=None)
        assert [o.execution_id for o in recovery.lock_expired(cursor, VICTIM, limit=9)] == ["held"]
    stage.look(f"DELETE FROM cloacina.workers WHERE id = {worker_id}")
    stage.look(f"DELETE FROM {VICTIM}.cloacina_executions WHERE id = 'held'")
    return looks_alive


@attack("Asking its own schema for another tenant's execution or result", schema=STOPPED, role=STOPPED)
def _(stage: Stage) -> bool:
    with stage.database.statement() as cursor:
        try:
            if queries.get(cursor, ATTACKER, VICTIMS_EXECUTION) is not None:
                return True
        except ExecutionNotFound:
            pass
        return queries.outcome(cursor, ATTACKER, VICTIMS_EXECUTION) is not None


@attack(
    "Claiming another tenant's execution by a forged message to its own queue", schema=STOPPED, role=STOPPED
)
def _(stage: Stage) -> bool:
    with stage.database.statement() as cursor:
        return (
            executions.claim(
                cursor, ATTACKER, VICTIMS_EXECUTION, attempt=1, worker_id=1, lease_ttl=15.0, policy=None
            )
            is not None
        )


@attack("Changing or deleting its own executions", schema=OPEN, role=OPEN, login=OPEN)
def _(stage: Stage) -> bool:
    with stage.database.statement() as cursor:
        executions.submit(cursor, ATTACKER, submission(execution_id="own"))
    return stage.gets_through(
        "UPDATE cloacina_executions SET result = '1'", "DELETE FROM cloacina_executions"
    )


@attack("Reading names out of `pg_catalog`: schemas, tables, roles", schema=OPEN, role=OPEN, login=OPEN)
def _(stage: Stage) -> bool:
    with stage.session() as run:
        return run(
            f"SELECT 1 FROM pg_class WHERE relnamespace = '{VICTIM}'::regnamespace AND relname = 'secrets'"
        ) == [(1,)]


def _shadows_the_next(stage: Stage, backend: int) -> bool:
    with ExitStack() as stack:
        # A pooler lends which connection it likes: all of them, until it is the attacker's.
        for _ in range(30):
            run = stack.enter_context(stage.session(VICTIM))
            if run("SELECT pg_backend_pid()") == [(backend,)]:
                return run("SELECT secret FROM secrets") == [("caught",)]
    raise AssertionError("not the same connection: this shows nothing")


def _touch_as_the_reaper(stage: Stage) -> None:
    """Do to the attacker's rows what the reaper does, all of it on its login's own connections."""
    with stage.database.statement() as cursor:
        executions.submit(cursor, ATTACKER, submission(execution_id="touched"))
        recovery.glance(cursor, [ATTACKER], stranded_after=10.0)
        recovery.lock_expired(cursor, ATTACKER, limit=10)
        ringing.ring_due(cursor, ATTACKER, limit=10)
        ringing.ring_stranded(cursor, ATTACKER, limit=10, stranded_after=0.0)
        ringing.count_rung(cursor, ATTACKER)
        queries.cancel(cursor, ATTACKER, "touched", reason="test")
