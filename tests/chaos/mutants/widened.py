"""The sound build, with pauses where the broken ones have their races: it has to pass."""

from cloacina_celery.chaos.app import app
from tests.chaos.mutants.races import widen_claim, widen_sweep

widen_claim()
widen_sweep()

__all__ = ["app"]
