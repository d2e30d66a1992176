"""A child that is forked while another thread holds a lock of ours has that lock free, and asks what it must know."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from cloacina_celery.plugin.breaker import Breaker

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.plugin.conftest import Place

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def holds_in_a_child(claim: Callable[[], bool]) -> bool:
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        holds = False
        try:
            holds = claim()
        finally:
            os._exit(0 if holds else 1)
    return os.waitpid(pid, 0)[1] == 0


def test_a_child_forked_while_its_parent_asks_who_is_limited_asks_at_once(place: Place, tenant: str) -> None:
    limiter = place.shop.cloacina.parts.limiter
    assert not limiter.is_limited(tenant)
    place.shop.cloacina.tenants.limit(tenant, max_concurrent_tasks=1)
    with limiter._asking:
        assert holds_in_a_child(lambda: limiter.is_limited(tenant))


def test_a_child_forked_while_its_parent_notes_an_answer_goes_by_a_breaker_that_works() -> None:
    breaker = Breaker()
    with breaker._lock:
        assert holds_in_a_child(lambda: breaker.admits(patience=1.0))
