"""Tests of the harness itself, on a plain Celery app, so that a red acceptance test means the product."""
