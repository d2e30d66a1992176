"""The only part that knows Celery and kombu: installing on an app, sending, running and answering for tasks."""
