"""Which threads act for the tenant of the code that started them."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import pytest

from cloacina_celery.runtime.context import bind_tenant, bound_tenant
from cloacina_celery.runtime.threads import let_threads_inherit


@pytest.fixture(autouse=True)
def threads_inherit() -> None:
    let_threads_inherit()


def seen_in_a_thread(thread_class: type[threading.Thread] = threading.Thread) -> str | None:
    seen: list[str | None] = []
    thread = thread_class(target=lambda: seen.append(bound_tenant()))
    thread.start()
    thread.join()
    return seen[0]


def test_a_thread_acts_for_the_tenant_of_the_code_that_started_it() -> None:
    with bind_tenant("tenant_a"):
        assert seen_in_a_thread() == "tenant_a"
    assert seen_in_a_thread() is None


def test_a_thread_with_a_run_of_its_own_inherits_too() -> None:
    seen: list[str | None] = []

    class Own(threading.Thread):
        def run(self) -> None:
            seen.append(bound_tenant())

    with bind_tenant("tenant_a"):
        thread = Own()
        thread.start()
    thread.join()
    assert seen == ["tenant_a"]


def test_a_thread_of_a_thread_inherits() -> None:
    seen: list[str | None] = []
    with bind_tenant("tenant_a"):
        outer = threading.Thread(target=lambda: seen.append(seen_in_a_thread()))
        outer.start()
    outer.join()
    assert seen == ["tenant_a"]


def test_an_executors_thread_serves_each_submitter_as_itself_and_nobody_as_another() -> None:
    with ThreadPoolExecutor(max_workers=1) as pool:
        with bind_tenant("tenant_a"):
            first = pool.submit(bound_tenant)
        with bind_tenant("tenant_b"):
            second = pool.submit(bound_tenant)
        third = pool.submit(bound_tenant)
        assert [one.result() for one in (first, second, third)] == ["tenant_a", "tenant_b", None]


def test_a_thread_pool_made_for_one_tenant_does_not_act_for_it_later() -> None:
    with bind_tenant("tenant_a"):
        pool = ThreadPool(1)
    with pool:
        assert pool.apply(bound_tenant) is None


def test_tasks_of_asyncio_and_threads_it_lends_inherit() -> None:
    async def both() -> list[str | None]:
        async def here() -> str | None:
            return bound_tenant()

        return [await asyncio.create_task(here()), await asyncio.to_thread(bound_tenant)]

    with bind_tenant("tenant_a"):
        assert asyncio.run(both()) == ["tenant_a", "tenant_a"]
