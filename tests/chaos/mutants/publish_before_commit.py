"""Messages that leave when they are made, and not when the transaction around them has committed."""

from __future__ import annotations

from cloacina_celery.chaos.app import app
from cloacina_celery.runtime.units import Action, CursorUnit, SessionUnit


def at_once(_unit: object, action: Action) -> None:
    """Do now what is to be done after the commit."""
    action()


CursorUnit.after_commit = at_once  # type: ignore[method-assign]
SessionUnit.after_commit = at_once  # type: ignore[method-assign]

__all__ = ["app"]
