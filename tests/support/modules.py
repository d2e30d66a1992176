"""App modules that are configured by the environment at import, imported anew for each test's environment."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest import mock

from celery import Celery, _state
from kombu import pools

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import ModuleType


@contextmanager
def imported_anew(name: str, settings: Mapping[str, str]) -> Iterator[ModuleType]:
    """Yield a fresh copy of the app module `name`, imported under these environment variables.

    Worker processes import such a module from their environment, once. A test process outlives many
    environments, so it takes a copy per test, through the same code as the workers; the copy's `app` is
    closed afterwards.
    """
    earlier = sys.modules.pop(name, None)
    try:
        # Celery hands each app's tasks on to every app that is finalized later. A copy's tasks must not reach
        # the next copy, where they would stand in the way of its own; so they go to a set that we drop.
        with (
            mock.patch.dict(os.environ, settings),
            mock.patch.object(_state, "_on_app_finalizers", set(_state._on_app_finalizers)),
        ):
            module = importlib.import_module(name)
            app = module.app
            assert isinstance(app, Celery)
            app.finalize()
        try:
            yield module
        finally:
            _disconnect(app)
    finally:
        sys.modules.pop(name, None)
        if earlier is not None:
            sys.modules[name] = earlier


def _disconnect(app: Celery) -> None:
    """Close also what `app.close()` leaves open: connections that wait for results, and pools that send."""
    consumer = getattr(app.backend, "result_consumer", None)
    if consumer is not None:
        consumer.stop()
    pools.reset()
    app.close()
