"""Threads inherit the bound tenant, as asyncio's tasks do.

Python has a thread begin with an empty context unless it runs with ``-X thread_inherit_context`` (3.14). For the
tenant alone this gives every Python what that option means, at the two places where work changes threads: a
thread's start, and an executor's submit. A pool's own threads inherit nothing, since they outlive the block that
made them and would carry one tenant into another one's work; what is submitted to a
``concurrent.futures.ThreadPoolExecutor`` runs as the tenant of its submitter, and as none if there was none.
The approach is that of OpenTelemetry's threading instrumentation.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import thread as executor_threads
from multiprocessing.dummy import DummyProcess
from typing import Any

from cloacina_celery.runtime.context import bind_tenant, bound_tenant

_MARK = "_inherits_cloacina_tenant"


def let_threads_inherit() -> None:
    """Have threads that are started from now on inherit the tenant of the code that starts them."""
    if hasattr(threading.Thread.start, _MARK):
        return
    start: Callable[..., None] = threading.Thread.start
    submit: Any = ThreadPoolExecutor.submit

    @functools.wraps(start)
    def start_inheriting(self: threading.Thread) -> None:
        tenant = bound_tenant()
        if tenant is not None and not _belongs_to_pool(self):
            self.run = _Inherited(tenant, self.run)  # type: ignore[method-assign]  # this thread's run alone
        start(self)

    @functools.wraps(submit)
    def submit_inheriting(
        self: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Future[Any]:
        tenant = bound_tenant()
        future: Future[Any] = submit(self, fn if tenant is None else _Inherited(tenant, fn), *args, **kwargs)
        return future

    setattr(start_inheriting, _MARK, True)
    patched: Any = threading.Thread
    patched.start = start_inheriting
    patched = ThreadPoolExecutor
    patched.submit = submit_inheriting


class _Inherited:
    """A callable that runs as a tenant."""

    def __init__(self, tenant: str, function: Callable[..., Any]) -> None:
        self._tenant = tenant
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with bind_tenant(self._tenant):
            return self._function(*args, **kwargs)


def _belongs_to_pool(thread: threading.Thread) -> bool:
    target = getattr(thread, "_target", None)
    return isinstance(thread, DummyProcess) or target is executor_threads._worker
