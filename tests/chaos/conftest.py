"""The fixture of all chaos tests."""

from __future__ import annotations

import pytest

from tests.chaos.runs import Chaos


@pytest.fixture
def chaos(database_server: str, broker_url: str) -> Chaos:
    """Chaos runs on the session's Postgres, each in a database of its own, and on this test's broker."""
    return Chaos(database_url=database_server, broker_url=broker_url)
