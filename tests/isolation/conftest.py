"""One stage per level and module: the attacks leave no trace that another one would see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.isolation import stages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.databases import Databases


@pytest.fixture(scope="module", params=stages.LEVELS)
def stage(
    request: pytest.FixtureRequest, session_databases: Databases, database_server: str
) -> Iterator[stages.Stage]:
    """Both tenants at one level, on a login that may create roles and is no superuser."""
    with stages.stage(session_databases, database_server, request.param) as made:
        yield made
