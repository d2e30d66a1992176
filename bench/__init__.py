"""The benchmark: the same no-op tasks through plain Celery and through this package, in one run."""
