"""Plain tasks of an app with the plugin: as if it were not there, with a result backend and without."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from celery import chain, chord, group

if TYPE_CHECKING:
    from tests.acceptance.stage import Stage


@pytest.mark.parametrize("with_backend", [False, True])
def test_plain_tasks_of_the_same_app_are_untouched(stage: Stage, broker_url: str, with_backend: bool) -> None:
    backend = broker_url if with_backend else None
    bazaar = stage.bazaar
    bazaar.app.conf.result_backend = backend
    bazaar.app._backend_cache = None
    bazaar.app._local.__dict__.pop("backend", None)
    stage.worker(tenants=[stage.tenant, "celery"], env={"BAZAAR_RESULT_BACKEND": backend})
    plain = bazaar.plain_record.delay("value", stage.tenant, "plain")
    stage.wait_for_runs("plain", 1)
    durable = stage.send("add", 2, 3)
    assert durable.get(timeout=15) == 5
    assert durable.successful()
    with bazaar.cloacina.tenant(stage.tenant):
        assert group(bazaar.add.s(1, 1), bazaar.add.s(2, 2)).delay().get(timeout=15) == [2, 4]
        assert chord([bazaar.add.s(1, 1), bazaar.add.s(2, 2)])(bazaar.total.s()).get(timeout=15) == 6
    if not with_backend:
        with pytest.raises(NotImplementedError):
            plain.get(timeout=1)
        return
    assert plain.get(timeout=15) == "value"
    assert bazaar.plain_flaky.delay().get(timeout=15) == 1
    assert chain(bazaar.plain_add.s(1, 1), bazaar.plain_add.s(2)).delay().get(timeout=15) == 4
    assert group(bazaar.plain_add.s(n, n) for n in range(3)).delay().get(timeout=15) == [0, 2, 4]
    assert chord([bazaar.plain_add.s(1, 1)], bazaar.plain_record.s()).delay().get(timeout=15) == [2]
    with bazaar.cloacina.tenant(stage.tenant):
        mixed = group(bazaar.plain_add.s(1, 1), bazaar.add.s(2, 2)).delay()
        assert mixed.get(timeout=15) == [2, 4]
