"""What runs around an execution and in the background: scopes, leases, the keeper and the reaper. No Celery."""
