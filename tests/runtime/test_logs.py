"""What a structured log says of the tenant."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from cloacina_celery import TenantFilter
from cloacina_celery.runtime.context import bind_tenant
from cloacina_celery.telemetry import log

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What a handler with the filter has written on the root logger, as `tenant execution_id attempt`."""
    written: list[str] = []

    class Into(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(self.format(record))

    handler = Into()
    handler.addFilter(TenantFilter())
    handler.setFormatter(logging.Formatter("%(tenant)s %(execution_id)s %(attempt)s"))
    logging.getLogger().addHandler(handler)
    yield written
    logging.getLogger().removeHandler(handler)


def test_a_line_of_anybodys_carries_the_bound_tenant_or_none(lines: list[str]) -> None:
    logging.getLogger("shop").warning("before")
    with bind_tenant("tenant_acme"):
        logging.getLogger("shop").warning("within")
    assert lines == ["None None None", "tenant_acme None None"]


def test_an_event_of_ours_carries_what_it_is_about_and_not_what_happens_to_be_bound(lines: list[str]) -> None:
    with bind_tenant("tenant_acme"):
        log("settle.fenced", tenant="tenant_other", execution_id="x", attempt=2)
    assert lines == ["tenant_other x 2"]


def test_a_line_that_has_a_tenant_of_its_own_keeps_it(lines: list[str]) -> None:
    logging.getLogger("shop").warning("for somebody", extra={"tenant": "tenant_mine"})
    assert lines == ["tenant_mine None None"]
