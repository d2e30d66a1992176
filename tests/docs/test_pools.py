"""docs/pools.md says of each pool which time limits it ignores; it ignores those and no others."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest

from tests.docs.markdown import table
from tests.support import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from tests.support.processes import Processes

APP = "tests.docs.limits_app"
POOLS = ["prefork", "threads", "gevent", "solo"]
ROWS = {
    row[0]: dict(zip(POOLS, row[1:], strict=True)) for row in table(ROOT / "docs" / "pools.md", "", *POOLS)
}
ENDS = {"time_limit": "TimeLimitExceeded", "soft_time_limit": "SoftTimeLimitExceeded"}


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_ignores_the_limits_that_the_document_says_it_ignores(
    pool: str, processes: Processes, import_app: Callable[[str], ModuleType], tenant_name: str
) -> None:
    if pool == "gevent" and not importlib.util.find_spec("psycogreen"):
        pytest.skip("psycogreen is not installed: it comes with the extra 'gevent'")
    limits = import_app(APP)
    processes.worker(
        APP, queues=[tenant_name], pool=pool, concurrency=1 if pool == "solo" else 2
    ).wait_ready()
    for limit, task in (("time_limit", limits.hard), ("soft_time_limit", limits.soft)):
        outcome = task.apply_async(tenant=tenant_name).get(timeout=30, propagate=False)
        seen = outcome if isinstance(outcome, str) else type(outcome).__name__
        assert seen == ("ran on" if ROWS[limit][pool] == "**ignored**" else ENDS[limit]), limit
