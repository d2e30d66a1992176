"""The bazaar with structured logs, as the docs set them up."""

from __future__ import annotations

import logging
from typing import Any

from celery.signals import after_setup_logger, after_setup_task_logger
from celery.utils.log import get_task_logger

from cloacina_celery import TenantFilter
from tests.acceptance.bazaar import app, cloacina

FORMAT = "line of tenant=%(tenant)s execution=%(execution_id)s attempt=%(attempt)s: %(message)s"


@after_setup_logger.connect
@after_setup_task_logger.connect
def structure(logger: logging.Logger, **_: Any) -> None:
    for handler in logger.handlers:
        handler.addFilter(TenantFilter())
        handler.setFormatter(logging.Formatter(FORMAT))


@cloacina.task(name="logged.speak")
def speak() -> None:
    """Write one line as users' code does."""
    get_task_logger(__name__).info("spoken")


__all__ = ["app", "speak"]
