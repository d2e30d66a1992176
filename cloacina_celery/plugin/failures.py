"""What an exception says: how a row keeps it, which policies match it, and when it wants to be tried again."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from celery import Task
from celery.exceptions import Reject

from cloacina_celery.core.retry import class_name, lineage
from cloacina_celery.errors import CloacinaError, DatabaseUnavailable


def describe_error(task: Task, error: BaseException, traceback: str | None) -> dict[str, Any]:
    """Describe an exception the way a row keeps it and Celery rebuilds it."""
    return {**task.backend.prepare_exception(error, "json"), "traceback": traceback}


def retry_after(error: BaseException) -> float | None:
    """Read how long an exception asks us to wait, in seconds.

    Either its ``retry_after`` (seconds or a timedelta), or the ``Retry-After`` header of its ``response``
    (RFC 9110, section 10.2.3: seconds or a date), as the exceptions of requests and httpx carry it.
    """
    wish: Any = getattr(error, "retry_after", None)
    if wish is None:
        headers: Any = getattr(getattr(error, "response", None), "headers", None)
        wish = headers.get("Retry-After") if hasattr(headers, "get") else None
    if isinstance(wish, timedelta):
        wish = wish.total_seconds()
    if isinstance(wish, str):
        wish = _seconds_of(wish)
    if isinstance(wish, (int, float)) and not isinstance(wish, bool) and math.isfinite(wish):
        return max(float(wish), 0.0)
    return None


def _seconds_of(header: str) -> float | None:
    try:
        return float(header)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return None


def lineage_of(error: BaseException) -> tuple[str, ...]:
    """Name an exception's class and its bases, as far as a policy may match them."""
    is_ours = isinstance(error, CloacinaError) and not isinstance(error, DatabaseUnavailable)
    if is_ours or isinstance(error, Reject):
        # Ours say that something is wrong with the call itself; a second run would say it again.
        return (class_name(type(error)),)
    return lineage(type(error))
