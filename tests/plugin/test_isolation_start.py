"""A worker's start: the first one creates its tenants, the next one only looks, and a wrong schema is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.plugin.conftest import Place

NO_DDL = """
CREATE FUNCTION public.refuse_ddl() RETURNS event_trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'DDL at a later start: %', tg_tag; END $$;
CREATE EVENT TRIGGER refuse_ddl ON ddl_command_start EXECUTE FUNCTION public.refuse_ddl();
"""
NO_DDL_ANY_MORE = "DROP EVENT TRIGGER refuse_ddl; DROP FUNCTION public.refuse_ddl()"


@pytest.fixture
def ddl_is_refused(place: Place) -> Iterator[Callable[[], None]]:
    """A function after which Postgres refuses any DDL, until the test ends."""
    with place.observer.cursor() as cursor:
        yield lambda: cursor.execute(NO_DDL)
        cursor.execute(NO_DDL_ANY_MORE)


def test_a_worker_creates_its_tenants_at_its_first_start_and_runs_no_ddl_at_the_next(
    place: Place, new_tenant_name: Callable[[], str], ddl_is_refused: Callable[[], None]
) -> None:
    queues = [new_tenant_name(), new_tenant_name()]
    first = place.processes.worker(queues=queues).wait_ready()
    assert set(queues) <= {tenant.name for tenant in place.shop.cloacina.tenants.list()}
    ddl_is_refused()
    for worker in (first, place.processes.worker(queues=queues).wait_ready()):
        result = place.shop.add.apply_async((1, 2), tenant=queues[0])
        assert result.get(timeout=30) == 3
        worker.terminate()
        assert worker.wait_exit() == 0
        assert "DDL at a later start" not in worker.log


@pytest.mark.parametrize(
    ("change", "mend"),
    [
        ("UPDATE {}.cloacina_version SET version_num = 'z9999'", "upgrade cloacina_celery in this process"),
        ("DELETE FROM {}.cloacina_version", "run `celery -A <app> cloacina schema migrate {}`"),
    ],
    ids=["newer", "older"],
)
def test_a_worker_refuses_a_schema_that_it_cannot_work_with_and_says_what_mends_it(
    place: Place, tenant: str, change: str, mend: str
) -> None:
    with place.observer.cursor() as cursor:
        cursor.execute(change.format(tenant))
    worker = place.processes.worker(queues=[tenant])
    assert worker.wait_exit() == 78
    assert f"cannot start: schema '{tenant}' is at revision" in worker.log
    assert mend.format(tenant) in worker.log
