"""Guards as SQL: the ``WHERE`` of a statement is rendered, once, from the guard of its move."""

from __future__ import annotations

from cloacina_celery.core.protocol import MOVES, Attempt, Guard


def where(
    guard: Guard,
    *,
    row: str = "",
    id_: str = "$1::text",
    attempt: str = "$2::int",
    worker: str = "$1::bigint",
    stranded_after: str = "$2::float8",
) -> str:
    """Render the guard as conditions joined by ``AND``.

    Args:
        guard: what must hold.
        row: the table's alias with its point, where the statement has one.
        id_, attempt, worker, stranded_after: where the statement has the values that the guard asks for.
    """
    wanted = {Attempt.SAME: attempt, Attempt.NEXT: f"{attempt} - 1"}
    conditions = [
        f"{row}id = {id_}" if guard.one else "",
        f"{row}attempt = {wanted[guard.attempt]}" if guard.attempt else "",
        _state(guard, row) if guard.states else "",
        f"{row}rung_at IS NULL" if guard.is_unrung else "",
        f"{row}run_at <= now()" if guard.is_due else "",
        f"{row}rung_at = 'infinity'" if guard.is_waiting else "",
        f"{row}run_at = 'infinity'" if guard.is_parked else "",
        f"{row}lease_expires_at < now()" if guard.is_expired else "",
        f"{row}rung_at < now() - make_interval(secs => {stranded_after})" if guard.is_stranded else "",
        f"{row}worker_id = {worker}" if guard.of_worker else "",
        "" if guard.has_message is None else f"{row}message {'<>' if guard.has_message else '='} ''",
    ]
    return " AND ".join(condition for condition in conditions if condition)


def may(move: str, **places: str) -> str:
    """Render the guard of a move (see `core.protocol.MOVES`)."""
    return where(MOVES[move].guard, **places)


def _state(guard: Guard, row: str) -> str:
    if len(guard.states) == 1:
        return f"{row}state = '{guard.states[0]}'"
    listed = ", ".join(f"'{state}'" for state in guard.states)
    return f"{row}state IN ({listed})"
