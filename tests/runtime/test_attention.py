"""A sweep looks at tenants that may have work each time, and at each other one within the audit's time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cloacina_celery.core.settings import Settings
from cloacina_celery.runtime import housekeeping
from cloacina_celery.runtime.attention import AUDIT_INTERVAL, Attention
from cloacina_celery.runtime.housekeeping import Housekeeping
from cloacina_celery.runtime.looks import Troubled
from cloacina_celery.runtime.watch import Watch
from cloacina_celery.store import busy, catalog, executions, outbox, settlements
from cloacina_celery.store.database import Database
from tests.store.rows import EXECUTION_ID, claim, submission

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cloacina_celery.store.database import Cursor

NAMES = [f"tenant_{n:03}" for n in range(90)]


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database with one tenant that has its tables; the others are names."""
    made = Database(database_url)
    catalog.create(made, "tenant_real")
    yield made
    made.dispose()


@pytest.fixture
def cursor(database: Database) -> Iterator[Cursor]:
    """A cursor on which each statement commits."""
    with database.statement() as lent:
        yield lent


class Clock:
    """Seconds that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        """Read them."""
        return self.now


def test_a_marked_tenant_is_looked_at_each_time_and_others_take_turns(
    database: Database, cursor: Cursor
) -> None:
    busy.mark(cursor, NAMES[7])
    clock = Clock()
    attention = Attention(database, clock)
    assert attention.choose(NAMES) == [NAMES[7]]
    seen: list[str] = []
    for _ in range(30):
        clock.now += AUDIT_INTERVAL / 30
        chosen = attention.choose(NAMES)
        assert NAMES[7] in chosen
        assert len(chosen) <= 1 + 89 / 30 + 1
        seen += [name for name in chosen if name != NAMES[7]]
    assert sorted(seen) == [name for name in NAMES if name != NAMES[7]]


def test_tenants_that_come_and_go_between_two_turns_rob_nobody_of_theirs(database: Database) -> None:
    clock = Clock()
    attention = Attention(database, clock)
    seen: set[str] = set()
    for number in range(60):
        clock.now += AUDIT_INTERVAL / 30
        seen.update(attention.choose([*NAMES, *(f"tenant_000_{number}_{n}" for n in range(number % 7))]))
    assert seen >= set(NAMES)


def test_after_a_long_pause_each_is_looked_at_once(database: Database) -> None:
    clock = Clock()
    attention = Attention(database, clock)
    clock.now += 10 * AUDIT_INTERVAL
    assert attention.choose(NAMES) == NAMES
    assert attention.choose(NAMES) == []


@pytest.mark.parametrize("work", ["pending", "delayed", "running", "letter", None])
def test_a_mark_goes_only_where_nothing_is_left_to_do(cursor: Cursor, work: str | None) -> None:
    tenant = "tenant_real"
    busy.mark(cursor, tenant)
    cursor.execute("UPDATE cloacina.busy SET marked_at = now() - interval '1 hour'")
    if work == "letter":
        outbox.put(cursor, tenant, "plain", "[]")
    elif work is not None:
        executions.submit(cursor, tenant, submission(delay=60.0 if work == "delayed" else None))
    if work == "running":
        assert claim(cursor, tenant)
    assert busy.old(cursor, limit=9) == [tenant]
    assert busy.renew_or_remove(cursor, tenant) is (work is not None)
    assert busy.old(cursor, limit=9) == []
    assert (tenant in busy.marked(cursor)) is (work is not None)


def test_a_mark_that_was_made_since_it_was_looked_at_stays(cursor: Cursor) -> None:
    busy.mark(cursor, "tenant_real")
    assert busy.old(cursor, limit=9) == []
    assert busy.renew_or_remove(cursor, "tenant_real") is False
    assert "tenant_real" in busy.marked(cursor)


def test_the_mark_of_a_tenant_that_is_gone_goes(cursor: Cursor) -> None:
    busy.mark(cursor, "tenant_gone")
    cursor.execute(
        "UPDATE cloacina.busy SET marked_at = now() - interval '1 hour' WHERE tenant = 'tenant_gone'"
    )
    assert busy.renew_or_remove(cursor, "tenant_gone") is False
    assert "tenant_gone" not in busy.marked(cursor)


def test_thousands_that_fell_idle_at_once_are_tidied_in_portions(
    database: Database, cursor: Cursor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "TENANTS_AT_ONCE", 2)
    for name in ("tenant_a", "tenant_b"):
        catalog.create(database, name)
    cursor.execute("UPDATE cloacina.busy SET marked_at = '-infinity'")
    settings = Settings(retain_succeeded=1.0)
    tidier = Housekeeping(database, settings, Troubled(database, Watch(database, settings)))
    tenants = catalog.tenants(database)
    names = [tenant.name for tenant in tenants]
    for name in names:
        executions.submit(cursor, name, submission())
        assert claim(cursor, name) is not None
        settlements.succeed(cursor, name, EXECUTION_ID, 1, None)
        cursor.execute(f"UPDATE {name}.cloacina_executions SET settled_at = now() - interval '1 h'")
    for left in (1, 0):
        tidier.tidy(tenants, chosen=names)
        assert len(busy.marked(cursor)) == left
        cursor.execute(" UNION ALL ".join(f"SELECT id FROM {name}.cloacina_executions" for name in names))
        assert len(cursor.fetchall()) == left
